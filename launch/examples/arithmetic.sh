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

# A file of rows holds all 20 epochs of 10,000 draws.
for name in worked_0 worked_1 worked_2 direct_0; do
    rows="${name%_*}" seed="${name#*_}" run="$folder/runs/$name"
    moe train run_dir="$run" train.seed="$seed" engine=plain tracking=none \
        data=sft data.path="$folder/${rows/worked/train}.jsonl" data.template=plain data.held_out=0.001 \
        data.cache_dir="$folder/cache" tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        model.mlp=dense model.num_hidden_layers=3 model.hidden_size=64 model.intermediate_size=128 \
        model.num_key_value_heads=4 model.tie_word_embeddings=true model.rope_theta=100 model.initializer=fan_in \
        train.epochs=1 train.sequence_length=64 train.micro_batch_size=10 train.global_batch_size=10 \
        optim.lr=4e-3 optim.min_lr_ratio=0.01 train.sample_prompt="17*13=" train.sample_tokens=12 train.eval_every=1000
    for rows in held_out seen larger; do
        moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=20 batch_size=512 \
            prompts_file="$folder/$rows.txt" > "$run/$rows.jsonl"
    done
done

touch "$folder/ended"
python -m data.examples.arithmetic page "$folder" "${PAGE:-docs/examples/arithmetic.md}"
