#!/usr/bin/env bash
# Every check and every test, in an environment of its own making: bash launch/test.sh [--slow] [pytest's arguments]
# Without --slow those marked slow are left out: many kills and other long faults, two nodes in network namespaces, planned against
# measured memory.
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
python -m pytest "${selection[@]}" "$@"
