#!/usr/bin/env bash
# Questions to SQL, learnt from scratch on two CPU cores, two seeds side by side:
#   bash launch/examples/sql.sh [FOLDER]
# reads wikisql_train.jsonl (launch/examples/real_data.sh says where) and writes docs/examples/sql.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
source launch/examples/real_data.sh
real_data wikisql_train.jsonl 'JSONL made of WikiSQL (github.com/salesforce/WikiSQL, BSD-3-Clause): the columns prompt (the question) and completion (SELECT [AGGREGATE] column FROM table [WHERE column = value AND …])'
install_project ""

folder="${1:-runs/examples/sql}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.sql_rows "$rows" "$folder"

learn() { # SEED
    local run="$folder/runs/seed_$1"
    moe train run_dir="$run" train.seed="$1" engine=plain tracking=none \
        data=sft data.path="$folder/train.jsonl" data.template=plain data.held_out=0.01 data.cache_dir="$folder/cache" \
        tokenizer.vocab_size=2048 model.mlp=dense model.sliding_window=null model.intermediate_size=384 \
        model.num_key_value_heads=4 model.tie_word_embeddings=true model.qk_norm=head model.initializer=equal_output \
        train.epochs=1 train.sequence_length=256 train.micro_batch_size=4 train.global_batch_size=4 \
        optim=muon optim.lr=2e-3 optim.min_lr_ratio=0.02 train.eval_every=500 train.sample_every=500
    moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=160 batch_size=64 \
        prompts_file="$folder/held_out.txt" >"$run/held_out.jsonl"
}

export OMP_NUM_THREADS=1 # a seed a core
learn 0 &
first=$!
learn 1
wait "$first"

times >"$folder/times"
python -m data.examples.sql_page "$folder" "${PAGE:-docs/examples/sql.md}"
