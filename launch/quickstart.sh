#!/usr/bin/env bash
# From a fresh clone to a small trained Mixtral; needs no GPU and no account, and downloads only Python packages:
#   bash launch/quickstart.sh [KEY=VALUE …]
# creates .venv, installs the project, pre-trains with 2 processes that each hold half of the experts, and prints a sample
# and the path of the report.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install_project ""

run=runs/quickstart
for argument in "$@"; do
    [[ $argument != run_dir=* ]] || run=${argument#run_dir=}
done
# A run that exists keeps its precision. A new one on a CPU takes bfloat16 where the processor's own bfloat16 products pay:
# docs/performance.md, "Time to loss".
precision=float32
if [[ -f $run/config.yaml ]]; then
    precision=$(sed -n 's/^  precision: //p' "$run/config.yaml")
elif [[ ! -e /dev/nvidia0 ]]; then
    precision=$(python -c "from moe.kernels.bfloat16_products import choose; print('float32' if choose().widened else 'bfloat16')")
fi
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m moe train experiment=quickstart train.precision="$precision" run_dir="$run" "$@"

echo
echo "A sample from the trained model:"
moe generate checkpoint="$run" prompt="def " max_new_tokens=80
echo
echo "Report, to open in a browser: $PWD/$run/report.html"
