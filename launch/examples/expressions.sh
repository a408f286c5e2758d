#!/usr/bin/env bash
# Trains a dense model and one of 8 experts on bracketed expressions, three seeds each, and writes
# docs/examples/expressions.md:
#   bash launch/examples/expressions.sh [FOLDER]
# FOLDER (runs/examples/expressions) gets rows, runs, their logs and answers; PAGE is another place for the page. JOBS
# (2) runs train at once, one thread each.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project ""

folder="${1:-runs/examples/expressions}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.expressions rows "$folder"
export OMP_NUM_THREADS=1

train() { # NAME ROWS MODEL…: trains on ROWS.jsonl with the seed that NAME ends with, then answers the held-out prompts
    local name="$1" rows="$2" run="$folder/runs/$1"
    shift 2
    moe train run_dir="$run" train.seed="${name#*_}" engine=plain tracking=none \
        data=sft data.path="$folder/$rows.jsonl" data.template=plain data.held_out=0.005 \
        data.cache_dir="$folder/cache" tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        "$@" model.num_hidden_layers=3 model.hidden_size=64 model.num_key_value_heads=4 \
        model.tie_word_embeddings=true model.rope_theta=100 model.initializer=fan_in \
        train.epochs=4 train.sequence_length=128 train.micro_batch_size=16 train.global_batch_size=16 \
        optim.lr=5e-3 optim.min_lr_ratio=0.01 train.eval_every=500 train.log_every=100 \
        train.sample_every=1000 train.sample_prompt="(12*34)-5=" train.sample_tokens=30
    moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=60 batch_size=500 \
        prompts_file="$folder/held_out.txt" > "$run/held_out.jsonl"
}

for name in sparse_0 dense_0 sparse_1 dense_1 sparse_2 dense_2 direct_0; do
    rows=train model=(model.mlp=dense model.intermediate_size=128)
    case "$name" in
        sparse_*) model=(model.mlp=sparse model.moe_intermediate_size=62 router.num_experts=8) ;;
        direct_*) rows=direct ;;
    esac
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    echo "$name: $folder/$name.log"
    train "$name" "$rows" "${model[@]}" > "$folder/$name.log" 2>&1 &
done
for job in $(jobs -p); do wait "$job"; done

touch "$folder/ended"
python -m data.examples.expressions page "$folder" "${PAGE:-docs/examples/expressions.md}"
