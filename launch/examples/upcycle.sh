#!/usr/bin/env bash
# A dense model that others could have published becomes a sparse one, is fine-tuned with LoRA, and answers in
# transformers; writes docs/examples/upcycle.md:
#   bash launch/examples/upcycle.sh [FOLDER]
# FOLDER (runs/examples/upcycle) gets rows, runs and exports. Only Python packages are downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
install_project "examples"

folder="${1:-runs/examples/upcycle}"
mkdir -p "$folder" && touch "$folder/began"
python -m data.examples.upcycle rows "$folder"
quiet=(engine=plain tracking=none data.cache_dir="$folder/cache" train.global_batch_size=8 train.sample_every=1000)

# A dense model as a Hugging Face folder: what a published checkpoint is.
moe train "${quiet[@]}" run_dir="$folder/runs/dense" model.mlp=dense model.sliding_window=null \
    model.initializer=equal_output optim.lr=2e-3 train.steps=200
moe export checkpoint="$folder/runs/dense" path="$folder/published"

# In, and sparse: 8 copies of each feed-forward, 2 of them for a token.
moe import checkpoint="$folder/published" run_dir="$folder/runs/imported"
moe upcycle checkpoint="$folder/runs/imported" run_dir="$folder/runs/upcycled"

# Fine-tuned with LoRA on rows of one's own, and measured on rows that are held out.
moe validate data=sft data.path="$folder/train.jsonl" init_from="$folder/runs/upcycled" \
    train.sequence_length=128 samples=1 page="$folder/rows.html"
moe train "${quiet[@]}" experiment=sft init_from="$folder/runs/upcycled" adapter=lora optim.lr=4e-3 \
    data.path="$folder/train.jsonl" train.sequence_length=128 train.steps=300 run_dir="$folder/runs/lora"
moe evaluate checkpoint="$folder/runs/lora" tasks=parity include_path="$folder/tasks" apply_chat_template=true \
    batch_size=64 output="$folder/evaluation.json"

# Out, into another program.
moe export checkpoint="$folder/runs/lora" path="$folder/exported"
moe generate checkpoint="$folder/runs/lora" prompts_file="$folder/asked.txt" chat=true temperature=0 max_new_tokens=16 \
    >"$folder/answers.jsonl"
python -m data.examples.upcycle compare "$folder"

# What the copies are worth: the same tokens once more, from the upcycled model and from scratch.
for seed in 0 1; do
    more=("${quiet[@]}" optim.lr=2e-3 train.steps=60 train.eval_every=15 train.seed="$seed")
    moe train "${more[@]}" init_from="$folder/runs/upcycled" run_dir="$folder/runs/from_upcycled_$seed"
    moe train "${more[@]}" model.sliding_window=null model.initializer=equal_output run_dir="$folder/runs/from_scratch_$seed"
done
times >"$folder/times"
python -m data.examples.upcycle page "$folder" "${PAGE:-docs/examples/upcycle.md}"
