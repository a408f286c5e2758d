#!/usr/bin/env bash
# From a fresh clone to a trained small Mixtral, on a machine without a GPU, an account or a download but packages:
#   bash launch/quickstart.sh [KEY=VALUE …]
# makes .venv, installs, pre-trains with 2 processes and the experts split over both, shows a sample and the report's place.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_project ""

run=runs/quickstart
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m moe train experiment=quickstart run_dir="$run" "$@"

echo
echo "A sample from the trained model:"
moe generate checkpoint="$run" prompt="def " max_new_tokens=80
echo
echo "Report, to open in a browser: $PWD/$run/report.html"
