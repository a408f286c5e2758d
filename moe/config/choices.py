"""What a key may name. Members are written in YAML and on the command line by their names."""

from __future__ import annotations

from enum import Enum


class Mlp(Enum):
    """What follows attention in a block: one SwiGLU (Mistral) or a router over many (Mixtral)."""

    dense = "dense"
    sparse = "sparse"


class AttentionBackend(Enum):
    """`auto` is `varlen` or `flex` on CUDA and `block` on CPU; `naive` is the quadratic reference."""

    auto = "auto"
    naive = "naive"
    block = "block"
    varlen = "varlen"
    flex = "flex"


class Recompute(Enum):
    """Activations that the backward pass computes again instead of keeping: none, each MLP's, or each block's."""

    none = "none"
    mlp = "mlp"
    block = "block"


class ExpertBackend(Enum):
    """`auto` takes the fastest that runs here and says which; an explicit one that can't run is an error."""

    auto = "auto"
    loop = "loop"
    grouped_mm = "grouped_mm"
    megablocks = "megablocks"


class DropPolicy(Enum):
    """Which choices an expert over its capacity loses: the latest in the sequence, or the least probable."""

    position = "position"
    probability = "probability"


class SourceFormat(Enum):
    """`auto` looks at the file names; `dataset` is anything `datasets` loads from disk or the Hub."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"
    stdlib = "stdlib"


class TokenizerKind(Enum):
    """`sentencepiece` trains one on the corpus; the others read an existing one."""

    sentencepiece = "sentencepiece"
    model_file = "model_file"
    huggingface = "huggingface"
    mistral = "mistral"


class Schedule(Enum):
    """Learning rate after warm-up: half a cosine, flat with a decay at the end (WSD), or flat."""

    cosine = "cosine"
    warmup_stable_decay = "warmup_stable_decay"
    constant = "constant"


class EngineKind(Enum):
    """What trains: `deepspeed` on any number of ranks; `plain` in one process, torch alone, which starts faster."""

    deepspeed = "deepspeed"
    plain = "plain"


class Precision(Enum):
    """Arithmetic of the model; the optimizer's weights, accumulation, communication and the router stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class TrackingBackend(Enum):
    wandb = "wandb"
    none = "none"


class DeviceKind(Enum):
    """What the ranks of a planned run compute on."""

    cpu = "cpu"
    cuda = "cuda"


class Sampler(Enum):
    """Who chooses the next point of a sweep: every one in turn, chance, TPE, NSGA-II, or the list `sweep.points`."""

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
