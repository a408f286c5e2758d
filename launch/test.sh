#!/usr/bin/env bash
# Every check and every test, in an environment of its own making: bash launch/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_project dev

ruff check .
ruff format --check .
pyright
python -m pytest "$@"
