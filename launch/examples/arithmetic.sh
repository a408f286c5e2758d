#!/usr/bin/env bash
# Trains models to add, subtract and multiply, and writes docs/examples/arithmetic.md:
#   bash launch/examples/arithmetic.sh [FOLDER]
# FOLDER (runs/examples/arithmetic) gets rows, runs, their logs and answers; PAGE is another place for the page. JOBS (2)
# runs train at once, one thread each.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project ""

folder="${1:-runs/examples/arithmetic}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.arithmetic rows "$folder"
export OMP_NUM_THREADS=1

train() { # KIND_SEED: trains on KIND.jsonl, which holds 20 epochs of 10,000 draws, then answers
    local run="$folder/runs/$1"
    moe train run_dir="$run" train.seed="${1#*_}" engine=plain tracking=none \
        data=sft data.path="$folder/${1%_*}.jsonl" data.template=plain data.held_out=0.001 \
        data.cache_dir="$folder/cache" tokenizer=huggingface tokenizer.path="$folder/tokenizer" \
        model.mlp=dense model.num_hidden_layers=3 model.hidden_size=64 model.intermediate_size=128 \
        model.num_key_value_heads=4 model.tie_word_embeddings=true model.rope_theta=100 model.initializer=fan_in \
        train.epochs=1 train.sequence_length=64 train.micro_batch_size=5 train.global_batch_size=5 \
        optim.lr=4e-3 optim.min_lr_ratio=0.01 optim.weight_decay=0.3 train.eval_every=1000 train.log_every=100 \
        train.sample_every=1000 train.sample_prompt="17*13=" train.sample_tokens=12
    for rows in held_out seen larger; do
        moe generate checkpoint="$run" chat=true temperature=0 max_new_tokens=20 batch_size=512 \
            prompts_file="$folder/$rows.txt" > "$run/$rows.jsonl"
    done
}

for name in worked_0 worked_1 worked_2 direct_0; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    echo "$name: $folder/$name.log"
    train "$name" > "$folder/$name.log" 2>&1 &
done
for job in $(jobs -p); do wait "$job"; done

touch "$folder/ended"
python -m data.examples.arithmetic page "$folder" "${PAGE:-docs/examples/arithmetic.md}"
