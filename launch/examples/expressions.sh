#!/usr/bin/env bash
# Trains a dense model and one of 8 experts on bracketed expressions, three seeds each, and writes
# docs/examples/expressions.md:
#   bash launch/examples/expressions.sh [FOLDER]
# FOLDER (runs/examples/expressions) gets rows, runs and answers; PAGE is another place for the page.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project ""

folder="${1:-runs/examples/expressions}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.expressions rows "$folder"

dense=(model.mlp=dense model.intermediate_size=128)
sparse=(model.mlp=sparse model.moe_intermediate_size=62 router.num_experts=8)

one_run() { # NAME ROWS MODEL…: trains on ROWS.jsonl with the seed that NAME ends with, then answers the held-out prompts
    local run="$folder/runs/$1" rows="$2" seed="${1#*_}"
    shift 2
    moe train run_dir="$run" train.seed="$seed" "$@" engine=plain tracking=none \
        data=sft data.path="$folder/$rows.jsonl" data.template=plain data.held_out=0.005 \
        data.cache_dir="$folder/cache" tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        model.num_hidden_layers=3 model.hidden_size=64 model.num_key_value_heads=4 model.tie_word_embeddings=true \
        model.rope_theta=100 model.initializer=fan_in \
        train.epochs=3 train.sequence_length=128 train.micro_batch_size=16 train.global_batch_size=16 \
        optim.lr=5e-3 optim.min_lr_ratio=0.01 train.eval_every=500 train.log_every=100 \
        train.sample_prompt="(12*34)-5=" train.sample_tokens=30
    moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=60 batch_size=500 \
        prompts_file="$folder/held_out.txt" > "$run/held_out.jsonl"
}

for seed in 0 1 2; do # each pair side by side, one thread each
    OMP_NUM_THREADS=1 one_run "dense_$seed" train "${dense[@]}" &
    OMP_NUM_THREADS=1 one_run "sparse_$seed" train "${sparse[@]}"
    wait $!
done
one_run direct_0 direct "${dense[@]}"

python -m data.examples.expressions page "$folder" "${PAGE:-docs/examples/expressions.md}"
