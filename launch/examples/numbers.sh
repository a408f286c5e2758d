#!/usr/bin/env bash
# Trains models of 51 tokens to count, and writes docs/examples/numbers.md:
#   bash launch/examples/numbers.sh [FOLDER]
# FOLDER (runs/examples/numbers) gets rows, runs and answers; PAGE is another place for the page.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project ""

folder="${1:-runs/examples/numbers}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.numbers rows "$folder"

for seed in 0 1 2; do
    run="$folder/runs/seed_$seed"
    moe train run_dir="$run" train.seed="$seed" engine=plain tracking=none \
        data=sft data.path="$folder/train.jsonl" data.template=plain data.cache_dir="$folder/cache" \
        tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        model.mlp=dense model.num_hidden_layers=2 model.hidden_size=32 model.intermediate_size=64 \
        model.initializer=fan_in model.attention=naive \
        train.epochs=5 train.sequence_length=64 train.micro_batch_size=8 train.global_batch_size=8 \
        optim.lr=1e-2 optim.min_lr_ratio=0.01 train.sample_prompt="40 41 42"
    for rows in held_out starts; do
        moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=50 batch_size=256 \
            prompts_file="$folder/$rows.txt" > "$run/$rows.jsonl"
    done
done

touch "$folder/ended"
python -m data.examples.numbers page "$folder" "${PAGE:-docs/examples/numbers.md}"
