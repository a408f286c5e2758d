#!/usr/bin/env bash
# Trains models to add, subtract and multiply, and writes docs/examples/arithmetic.md:
#   bash launch/examples/arithmetic.sh [FOLDER]
# FOLDER (runs/examples/arithmetic) gets rows, runs and answers; PAGE is another place for the page.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project ""

folder="${1:-runs/examples/arithmetic}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.arithmetic rows "$folder"

for split_seed in problems_0 problems_1 problems_2 pairs_0; do
    split="${split_seed%_*}" seed="${split_seed#*_}" run="$folder/runs/$split_seed"
    moe train run_dir="$run" train.seed="$seed" engine=plain tracking=none \
        data=sft data.path="$folder/$split/train.jsonl" data.template=plain data.held_out=0.001 \
        data.cache_dir="$folder/cache" tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        model.mlp=dense model.num_hidden_layers=3 model.hidden_size=64 model.intermediate_size=128 \
        model.num_key_value_heads=4 model.tie_word_embeddings=true model.attention=naive \
        model.initializer=fan_in model.hidden_dropout=0.1 \
        train.epochs=20 train.sequence_length=64 train.micro_batch_size=5 train.global_batch_size=5 \
        optim.lr=3e-3 optim.min_lr_ratio=0.01 optim.weight_decay=1 train.sample_prompt="7*8=" train.eval_every=1000
    for rows in held_out seen; do
        moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=5 batch_size=256 \
            prompts_file="$folder/$split/$rows.txt" > "$run/$rows.jsonl"
    done
done

python -m data.examples.arithmetic page "$folder" "${PAGE:-docs/examples/arithmetic.md}"
