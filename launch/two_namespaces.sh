#!/usr/bin/env bash
# Two nodes on one machine, each with its own network stack and address, connected by a single link:
#   sudo bash launch/two_namespaces.sh VERB [KEY=VALUE …]
#   sudo RATE=100mbit bash launch/two_namespaces.sh train tracking=none parallel.expert_parallel_size=2 parallel.expert_across_nodes=true
# Needs root and iproute2 (`ip`, `tc`). Creates the network namespaces moe-a and moe-b and a veth pair, runs
# launch/torchrun.sh in both, prints both logs and the bytes sent, and removes the namespaces, also after a signal.
#
# RATE     the link's rate in each direction, in tc's notation (100mbit; default: unlimited)
# DELAY    latency added in each direction (5ms; default: none; needs the kernel's netem)
# NPROC    processes on each node (default 1)
# CORES_A  cores of node 0 in taskset's notation (0-3), so that the nodes don't share cores;
# CORES_B  cores of node 1; set both or none (default: all cores are shared)
# NAME     prefix of the namespaces' names (default moe)
# LOGS     folder for the two nodes' logs (default: a temporary one, removed at the end)
# TIMEOUT  seconds after which both nodes are killed (default 3600)
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "launch/two_namespaces.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || fail "no verb given; for example: bash launch/two_namespaces.sh train tracking=none"
[ "$(id -u)" = 0 ] || fail "network namespaces need root: sudo bash launch/two_namespaces.sh …"
for tool in ip tc; do
    command -v "$tool" >/dev/null || fail "$tool not found: install iproute2"
done
a="${NAME:-moe}-a" b="${NAME:-moe}-b" made=() logs="${LOGS:-$(mktemp -d)}"
mkdir -p "$logs"

# shellcheck disable=SC2329 # the trap calls it
clean_up() {
    trap '' INT TERM
    for namespace in "${made[@]}"; do
        ip netns pids "$namespace" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        ip netns delete "$namespace" # this also deletes its end of the link, and so the link
    done
    [ -n "${LOGS:-}" ] || rm -r "$logs" # mktemp's
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

for namespace in "$a" "$b"; do
    ip netns add "$namespace" || fail "namespace $namespace exists already or can't be created: choose another NAME"
    made+=("$namespace")
done
ip link add eth0 netns "$a" type veth peer name eth0 netns "$b"
for node in "$a 10.77.0.1" "$b 10.77.0.2"; do
    read -r namespace address <<<"$node"
    ip -n "$namespace" address add "$address/24" dev eth0
    ip -n "$namespace" link set lo up
    ip -n "$namespace" link set eth0 up
    if [ -n "${DELAY:-}" ]; then
        tc -n "$namespace" qdisc add dev eth0 root handle 1: netem delay "$DELAY" limit 100000 ||
            fail "DELAY=$DELAY: this kernel has no netem, or tc doesn't know that delay"
    fi
    if [ -n "${RATE:-}" ]; then # with a queue of up to 50 ms, like a switch
        [ -n "${DELAY:-}" ] && place="parent 1:1" || place=root
        # shellcheck disable=SC2086 # two words
        tc -n "$namespace" qdisc add dev eth0 $place tbf rate "$RATE" burst 256kb latency 50ms ||
            fail "RATE=$RATE: tc doesn't know that rate"
    fi
done

run_node() { # NODE_RANK NAMESPACE ADDRESS CORES VERB …
    local rank="$1" namespace="$2" address="$3" cores="$4"
    shift 4
    NNODES=2 NODE_RANK="$rank" NODE_ADDR="$address" MASTER_ADDR=10.77.0.1 NPROC="${NPROC:-1}" \
        GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 \
        exec timeout --kill-after=20 "${TIMEOUT:-3600}" ip netns exec "$namespace" \
        ${cores:+taskset -c "$cores"} bash launch/torchrun.sh "$@"
}
run_node 0 "$a" 10.77.0.1 "${CORES_A:-}" "$@" >"$logs/node_0.log" 2>&1 &
first=$!
run_node 1 "$b" 10.77.0.2 "${CORES_B:-}" "$@" >"$logs/node_1.log" 2>&1 &
second=$!

code=0
wait "$first" || code=$?
wait "$second" || code=$?
for node in 0 1; do # the nodes wrote to separate files; print one after the other
    sed "s/^/node $node | /" "$logs/node_$node.log"
done
sent() { ip netns exec "$1" cat /sys/class/net/eth0/statistics/tx_bytes; }
echo "link: node 0 sent $(sent "$a") bytes, node 1 sent $(sent "$b") bytes"
exit "$code"
