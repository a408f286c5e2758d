#!/usr/bin/env bash
# Pre-trains a small sparse model, fine-tunes it to chat about maths problems, and writes docs/examples/maths_chat.md:
#   bash launch/examples/maths_chat.sh [FOLDER]
# reads gsm8k_train.jsonl (launch/examples/real_data.sh says where). FOLDER (runs/examples/maths_chat) gets rows and runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
source launch/examples/real_data.sh
real_data gsm8k_train.jsonl 'JSONL made of GSM8K (github.com/openai/grade-school-math, MIT): the column messages, a user turn with the question and an assistant turn with the worked answer'
install_project ""

folder="${1:-runs/examples/maths_chat}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.maths rows "$rows" "$folder"

moe train run_dir="$folder/runs/base" engine=plain tracking=none data.cache_dir="$folder/cache" \
    model.initializer=equal_output optim.lr=2e-3 train.steps=150 train.sample_every=150

moe validate data=sft data.path="$folder/rows.jsonl" data.held_out=0.1 init_from="$folder/runs/base" \
    train.sequence_length=512 train.global_batch_size=8 samples=1 page="$folder/rows.html" >"$folder/validate.txt"

tune=(
    experiment=sft init_from="$folder/runs/base" engine=plain tracking=none
    data.path="$folder/rows.jsonl" data.held_out=0.1 data.cache_dir="$folder/cache"
    train.micro_batch_size=4 train.global_batch_size=8 train.eval_sequences=64
)
moe train "${tune[@]}" run_dir="$folder/runs/base_on_rows" train.steps=1 optim.lr=1e-12
moe train "${tune[@]}" run_dir="$folder/runs/chat" train.steps=150 optim.lr=2e-3 train.eval_every=50 train.sample_every=150

moe generate checkpoint="$folder/runs/chat" chat=true temperature=0 max_new_tokens=160 batch_size=4 \
    prompts_file="$folder/held_out.txt" >"$folder/runs/chat/held_out.jsonl"
times >"$folder/times"
python -m data.examples.maths page "$folder" "${PAGE:-docs/examples/maths_chat.md}"
