"""Enums for keys with a fixed set of values. YAML and the command line use the members' names."""

from __future__ import annotations

from enum import Enum


class Mlp(Enum):
    """A block's feed-forward layer: one SwiGLU (Mistral) or several experts behind a router (Mixtral)."""

    dense = "dense"
    sparse = "sparse"


class Initializer(Enum):
    """Standard deviations of initial weights: one for all, less into the residual stream, by fan-in, or by fan-in with
    a sparse layer's output like a dense one's. moe/model/initialize.py has the formulas."""

    normal = "normal"
    depth_scaled = "depth_scaled"
    fan_in = "fan_in"
    equal_output = "equal_output"


class AdapterKind(Enum):
    """What trains beside frozen weights: nothing, so that all weights train, or LoRA."""

    none = "none"
    lora = "lora"


class AttentionBackend(Enum):
    """`auto` is the first of `flash3`, `varlen` and `flex` that runs on CUDA, and `block` on CPU. `varlen` is
    FlashAttention 2, `flash3` FlashAttention 3; `naive` is the quadratic reference."""

    auto = "auto"
    naive = "naive"
    block = "block"
    varlen = "varlen"
    flash3 = "flash3"
    flex = "flex"


class QkNorm(Enum):
    """RMSNorm of queries and keys before they are rotated: none, over a layer's whole projections (OLMoE), or over each
    head's dimensions with a weight that the heads share (Qwen3)."""

    none = "none"
    projection = "projection"
    head = "head"


class Recompute(Enum):
    """Which activations the backward pass recomputes instead of storing: none, each MLP's, or each block's."""

    none = "none"
    mlp = "mlp"
    block = "block"


class ExpertBackend(Enum):
    """`auto` picks the fastest back-end that runs here and logs which; naming one that can't run is an error.

    `loop` is the plain reference, one expert after the other. The others compute all experts' rows in a pass: by torch
    (`grouped_mm`), by Triton kernels (`triton`, CUDA), with one product per expert (`per_expert`), or by MegaBlocks and
    grouped_gemm (`megablocks`, CUDA). On a CPU `grouped_mm` is one product per expert too."""

    auto = "auto"
    loop = "loop"
    grouped_mm = "grouped_mm"
    triton = "triton"
    per_expert = "per_expert"
    megablocks = "megablocks"


class DropPolicy(Enum):
    """Which choices are dropped when an expert is over capacity: the last in the sequence, or the least probable."""

    position = "position"
    probability = "probability"


class ScoringFunction(Enum):
    """What makes scores of a router's logits: softmax over the experts, or each expert's own sigmoid."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class BiasUpdate(Enum):
    """How the loss-free balancing bias moves: not at all, by a fixed step up or down, or in proportion to the error."""

    none = "none"
    sign = "sign"
    proportional = "proportional"


class SourceFormat(Enum):
    """`auto` looks at the file names; `dataset` is anything `datasets` loads from disk or the Hub."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"
    dataset = "dataset"
    stdlib = "stdlib"


class RecordKind(Enum):
    """What a row of data is. `documents`: text for pre-training, packed end to end. The others are fine-tuning's, one
    sequence a row: `auto` looks at the columns, the rest name them. moe/data/records.py has the columns of each."""

    documents = "documents"
    auto = "auto"
    text = "text"
    prompt_completion = "prompt_completion"
    messages = "messages"
    alpaca = "alpaca"
    sharegpt = "sharegpt"


class Packing(Enum):
    """How documents for pre-training become sequences. `concat`: end to end, cut wherever a sequence ends. `best_fit`:
    only documents longer than a sequence are cut, and sequences are filled up with padding (arXiv 2404.10830)."""

    concat = "concat"
    best_fit = "best_fit"


class TemplateName(Enum):
    """How a conversation becomes text: by the tokenizer's own template, or one of moe/data/chat_templates.py. `auto`:
    the tokenizer's own where it has one, else `mistral`, which needs no token of its own."""

    auto = "auto"
    tokenizer = "tokenizer"
    mistral = "mistral"
    chatml = "chatml"
    plain = "plain"


class AnswerMetric(Enum):
    """What evaluations measure of answers to held-out rows (`moe.train.answer_metrics`)."""

    exact_match = "exact_match"
    json_valid = "json_valid"
    sql_valid = "sql_valid"


class LossOn(Enum):
    """Which tokens of a conversation are targets: all assistant turns, the last one, or everything."""

    completion = "completion"
    last_turn = "last_turn"
    everything = "everything"


class LongRows(Enum):
    """What happens to a row longer than a sequence: its end is cut off, it becomes several, or it is left out."""

    truncate = "truncate"
    split = "split"
    drop = "drop"


class TokenizerKind(Enum):
    """`sentencepiece` trains one on the corpus; the others read an existing one."""

    sentencepiece = "sentencepiece"
    model_file = "model_file"
    huggingface = "huggingface"
    mistral = "mistral"


class OptimizerKind(Enum):
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest."""

    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    """Learning rate after warm-up: half a cosine, a straight line, flat with a decay at the end (WSD), or flat."""

    cosine = "cosine"
    linear = "linear"
    warmup_stable_decay = "warmup_stable_decay"
    constant = "constant"


class EngineKind(Enum):
    """The training engine: `deepspeed` on any number of ranks; `plain` in one process, without DeepSpeed, which starts
    faster."""

    deepspeed = "deepspeed"
    plain = "plain"


class Precision(Enum):
    """Dtype of the model's arithmetic; the optimizer's weights, gradient accumulation, communication and the router
    stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ExportFormat(Enum):
    """What `moe export` writes: a Hugging Face folder, a GGUF file for llama.cpp, or an adapter alone, for peft."""

    huggingface = "huggingface"
    gguf = "gguf"
    peft = "peft"


class ExportDtype(Enum):
    """Dtype of an exported model's weights: each one's own, or one for all."""

    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TrackingBackend(Enum):
    wandb = "wandb"
    none = "none"


class DeviceKind(Enum):
    """The device type of a planned run's ranks."""

    cpu = "cpu"
    cuda = "cuda"


class Sampler(Enum):
    """How a sweep's next point is chosen: every one in turn, at random, by TPE, by NSGA-II, or from `sweep.points`."""

    grid = "grid"
    random = "random"
    tpe = "tpe"
    nsga2 = "nsga2"
    points = "points"


class Pruner(Enum):
    """Which trials of a sweep end early: none, those worse than the median, or by Hyperband's brackets."""

    none = "none"
    median = "median"
    hyperband = "hyperband"
