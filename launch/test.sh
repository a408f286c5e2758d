#!/usr/bin/env bash
# Creates the environment and runs every check and test: bash launch/test.sh [--slow] [pytest's arguments]
# Without --slow the tests marked slow are left out: long faults (such as 20 kills in one run), two nodes in network namespaces,
# planned compared with measured memory.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_project dev

ruff check .
ruff format --check .
pyright
selection=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    selection=()
    shift
fi
# Two files at a time, since most tests wait for other processes. A file's tests stay together: they share launches. Files
# keep their order: where torch has CUDA, a process can't fork ranks once it has run a backward pass of its own.
python -m pytest "${selection[@]}" -n 2 --dist loadfile --no-loadscope-reorder "$@"
