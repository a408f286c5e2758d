#!/usr/bin/env bash
# What one GPU makes of this project, in one command of at most 540 s, without a network:
#   bash launch/gpu_report.sh [--dry-run] [WHEELS_FOLDER]
# WHEELS_FOLDER is what launch/gpu_wheels.sh made, for a machine that has only PyTorch; its wheels are installed into a temporary
# folder, and its data is trained on. Without it everything must be installed. Each stage runs in a process of its own with a
# time limit; a stage that fails or hangs is recorded, and the others go on. The report begins with what is required of an H200, what
# was measured, and whether that is met. Without a GPU it says so and exits with 0.
# --dry-run takes every stage on the CPU with tiny sizes: it finds errors, its numbers mean nothing.
#
# OUT      folder for report.json, summary.md, log.txt, pytest.log, profile.txt, trace.json.gz (default gpu_report)
# SECONDS_IN_ALL  time for everything (default 540); a stage is skipped if half its limit is over the rest
# STAGES   some of machine,layer,step,peers,memory,cuda_tests,training,kernels,attention,profiler,offload,flex (default: all)
# VENV     the environment with moe in it (default .venv if it is there, else the python3 on PATH)
# Exit code 0: every stage passed, or no GPU; 1: a stage failed or ran out of time; 2: a mistake in the command.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "launch/gpu_report.sh: $*" >&2; exit 2; }

keys=()
if [ "${1:-}" = --dry-run ]; then
    keys+=(dry_run=true)
    shift
fi
[ $# -le 1 ] || fail "at most one folder of wheels, not: $*"
folder="${1:-}"
[[ "$folder" != -* ]] || fail "$folder: the only option is --dry-run"
limit="${SECONDS_IN_ALL:-540}"
[[ "$limit" =~ ^[1-9][0-9]*$ ]] || fail "SECONDS_IN_ALL=$limit must be whole seconds"
PATH="${VENV:-$PWD/.venv}/bin:$PATH"

if [ -n "$folder" ]; then
    compgen -G "$folder/*.whl" >/dev/null || fail "$folder holds no wheels: make them with launch/gpu_wheels.sh"
    keys+=(folder="$(realpath "$folder")")
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$folder"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 -m moe.bench.gpu "${keys[@]}" ${STAGES:+stages="$STAGES"} out="${OUT:-gpu_report}" seconds=$((limit - SECONDS))
