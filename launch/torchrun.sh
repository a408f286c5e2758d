#!/usr/bin/env bash
# One node of a run, or the only one: bash launch/torchrun.sh VERB [KEY=VALUE …]
#   bash launch/torchrun.sh train model=mixtral_8x7b tokenizer=mistral parallel.expert_parallel_size=8 parallel.zero_stage=2 \
#       parallel.offload_optimizer=true model.recompute=block train.precision=bfloat16 train.sequence_length=4096 \
#       train.micro_batch_size=1 train.global_batch_size=64 data=files data.path=corpus/ run_dir=runs/mixtral
#                                                                               every GPU of this machine, here 8 of 80 GB
#   NPROC=2 bash launch/torchrun.sh train parallel.expert_parallel_size=2       two processes, on a CPU too
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh train …      the same command on every node, NODE_RANK 0, 1, …
#
# NPROC              processes on this node (default: its GPUs)
# NNODES             nodes (default 1); more need NODE_RANK and MASTER_ADDR, node 0's name or address
# MASTER_PORT        a free port on node 0 (default 29500)
# NODE_ADDR          the address at which the other nodes reach this one (default: its host name)
# RUN_ID             the same on all nodes; different for launches that run at the same time (default moe)
# MAX_RESTARTS       how often the processes are restarted after one fails; they resume from the newest checkpoint (default 0)
# GRACE              seconds that a signalled run gets for its checkpoint before it is killed (default 120)
# MOE_START_TIMEOUT  seconds to wait for the other nodes and ranks (default 300)
# VENV               the virtual environment that has moe (default .venv if it exists, else the one on PATH)
# On SIGTERM, SIGUSR1 and Ctrl-C torchrun forwards the signal to its processes, which save and stop, waits up to GRACE seconds for
# them, restarts nothing and exits with 1; the same command resumes. A third signal or kill -9 ends everything at once.
# On several nodes GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface, if the default one is wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "launch/torchrun.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || fail "no verb given; for example: NPROC=2 bash launch/torchrun.sh train parallel.expert_parallel_size=2"
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
command -v torchrun >/dev/null || fail "no torchrun on PATH: activate the environment that has moe, or set VENV=FOLDER"

NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
[ "$NPROC" != 0 ] || fail "this machine has no GPU; NPROC=2 starts two processes on the CPU"
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC must be a number of processes"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-120}" # seconds; torchrun's name for GRACE
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
    "a Rendezvous error below means that a node is missing (is node 0 up, the port open, every node started?) or, on node 0, that the port is taken" >&2
[ "$NODE_RANK" = 0 ] && host=true || host=false
exec torchrun --signals-to-handle "$signals" --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-id "${RUN_ID:-moe}" --rdzv-backend c10d --rdzv-endpoint "$endpoint" \
    --rdzv-conf "is_host=$host,join_timeout=$MOE_START_TIMEOUT,read_timeout=$MOE_START_TIMEOUT" \
    ${NODE_ADDR:+--local-addr "$NODE_ADDR"} -m moe "$@"
