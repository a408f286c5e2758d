#!/usr/bin/env bash
# One node of a run, or the only one: bash launch/torchrun.sh VERB [KEY=VALUE …]
#   bash launch/torchrun.sh train model=mixtral_8x7b parallel.expert_parallel_size=8          every GPU of this machine
#   NPROC=2 bash launch/torchrun.sh train parallel.expert_parallel_size=2                     two processes, on a CPU too
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh train …      the same words on every node, NODE_RANK 0, 1, …
#
# NPROC              processes on this node (default: its GPUs)
# NNODES             nodes (default 1); more need NODE_RANK and MASTER_ADDR, node 0's name or address
# MASTER_PORT        a free port on node 0 (default 29500)
# NODE_ADDR          how the other nodes reach this one, where its host name doesn't say (default: the host name)
# RUN_ID             the same on all nodes, another for each launch that might overlap (default moe)
# MAX_RESTARTS       how often a dead process is started again; the run goes on from its last checkpoint (default 0)
# GRACE              seconds that a stopped run has for its checkpoint before it is killed (default 120)
# MOE_START_TIMEOUT  seconds to wait for the other nodes and ranks (default 300)
# VENV               the environment with moe in it (default .venv if it is there, else what is on PATH)
# SIGTERM, SIGUSR1 and Ctrl-C end it in good order: torchrun hands them to its processes, which save and stop, waits GRACE
# seconds for them, starts nothing again and exits with 1; the same command goes on. A third signal or kill -9 ends all at once.
# On several nodes GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between them, if it can't be guessed.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "launch/torchrun.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || fail "what to run? as in: NPROC=2 bash launch/torchrun.sh train parallel.expert_parallel_size=2"
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
command -v torchrun >/dev/null || fail "no torchrun on PATH: activate moe's environment, or name it with VENV=FOLDER"

NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
[ "$NPROC" != 0 ] || fail "no GPU here; NPROC=2 starts two processes on the CPU"
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC must be a number of processes"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-120}" # seconds, as torchrun calls it
[[ "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" =~ ^[1-9][0-9]*$ ]] || fail "GRACE=$GRACE must be whole seconds"
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
if [ "${NNODES:-1}" = 1 ]; then
    exec torchrun --signals-to-handle "$signals" --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" -m moe "$@"
fi

[[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NNODES must be a number of nodes"
[[ "${NODE_RANK:-}" =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK=${NODE_RANK:-} must be this node's number, 0 to $((NNODES - 1))"
[ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR must be node 0's name or address"
endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}"
export MOE_START_TIMEOUT="${MOE_START_TIMEOUT:-300}"
[[ "$MOE_START_TIMEOUT" =~ ^[1-9][0-9]*$ ]] || fail "MOE_START_TIMEOUT=$MOE_START_TIMEOUT must be whole seconds"
echo "launch/torchrun.sh: node $NODE_RANK of $NNODES meets the others at $endpoint within $MOE_START_TIMEOUT s;" \
    "a Rendezvous error below means that it didn't (is node 0 up, the port open, every node started?)" >&2
[ "$NODE_RANK" = 0 ] && host=true || host=false
exec torchrun --signals-to-handle "$signals" --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-id "${RUN_ID:-moe}" --rdzv-backend c10d --rdzv-endpoint "$endpoint" \
    --rdzv-conf "is_host=$host,join_timeout=$MOE_START_TIMEOUT,read_timeout=$MOE_START_TIMEOUT" \
    ${NODE_ADDR:+--local-addr "$NODE_ADDR"} -m moe "$@"
