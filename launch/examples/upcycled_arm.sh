#!/usr/bin/env bash
# The router ablation's upcycled arm, beside the arms of a finished study; writes its section of docs/router-ablation.md:
#   bash launch/examples/upcycled_arm.sh STUDY [FOLDER]
# STUDY is the run_dir of `moe sweep sweep=router_ablation`; FOLDER (runs/examples/upcycled_arm) gets the runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project "examples"

study="${1:?the run_dir of a finished \`moe sweep sweep=router_ablation\`}"
folder="${2:-runs/examples/upcycled_arm}"
mapfile -t same < <(python -m data.examples.upcycled_arm overrides)
mapfile -t not_the_model < <(printf '%s\n' "${same[@]}" | grep -v '^model')
half=(train.steps=390) # of the study's 780
export OMP_NUM_THREADS=1

# Half of the tokens train the study's dense model, half the sparse one that comes of it: each of 4 copies of a dense
# feed-forward of 512 is cut into 2 experts of 256, so that a token uses as many parameters before and after.
arm() {
    moe train "${same[@]}" "${half[@]}" model.mlp=dense model.intermediate_size=512 train.seed="$((100 + $1))" \
        run_dir="$folder/runs/dense_$1"
    moe upcycle checkpoint="$folder/runs/dense_$1" run_dir="$folder/runs/sparse_$1" granularity=2 seed="$1"
    moe train "${not_the_model[@]}" "${half[@]}" init_from="$folder/runs/sparse_$1" train.seed="$1" \
        router.aux_loss_coef=0.01 router.z_loss_coef=0 run_dir="$folder/runs/upcycled_$1"
}

arm 0 &
first=$!
arm 1
wait "$first"
arm 2
python -m data.examples.upcycled_arm table "$study" "$folder" "${PAGE:-docs/router-ablation.md}"
