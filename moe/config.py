"""Every configuration dataclass, its types, defaults and rules.

The YAML under ``configs/`` holds chosen values; this file owns what is allowed. A broken rule raises ``ValueError``
whose text names the key, its value and the rule; `moe.compose` turns it into one line on stderr and exit code 2.
Field names are Hugging Face's wherever Hugging Face has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


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


class Precision(Enum):
    """Arithmetic of the model; master weights, accumulation, communication and the router stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class TrackingBackend(Enum):
    wandb = "wandb"
    none = "none"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(prefix: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value is None or (value > 0 and math.isfinite(value)), f"{prefix}.{name}={value} must be > 0")


def _not_negative(prefix: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(math.isfinite(value) and value >= 0, f"{prefix}.{name}={value} must be ≥ 0")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The backbone. `head_dim=None` means hidden_size / num_attention_heads; `sliding_window=None` means full."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    mlp: Mlp = Mlp.sparse
    attention: AttentionBackend = AttentionBackend.auto

    def __post_init__(self) -> None:
        _positive("model", self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        _positive("model", self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        _positive("model", self, "rope_theta", "rms_norm_eps", "initializer_range")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"model.num_attention_heads={heads} must be divisible by model.num_key_value_heads={kv_heads}",
        )
        _require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"model.hidden_size={self.hidden_size} must be divisible by model.num_attention_heads={heads}, "
            "or model.head_dim set",
        )
        _require(self.head_size % 2 == 0, f"model.head_dim={self.head_size} must be even: RoPE rotates pairs")
        window = self.sliding_window
        _require(
            window is None or window >= 1,
            f"model.sliding_window={window} must be ≥ 1: it counts the query's own key (null means full attention)",
        )

    @property
    def head_size(self) -> int:
        """Dimensions of one head. NOTE: not stored into `head_dim`, or the default model's would become every model's:
        the schema is an instance, and YAML that says nothing of head_dim would inherit its number."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    """Top-k token-choice router. `capacity_factor=None` is dropless; coefficients scale losses, not metrics."""

    num_experts: int = 8
    top_k: int = 2
    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.001
    capacity_factor: float | None = None
    drop_policy: DropPolicy = DropPolicy.position

    def __post_init__(self) -> None:
        _positive("router", self, "num_experts", "top_k", "capacity_factor")
        _not_negative("router", self, "aux_loss_coef", "z_loss_coef")
        _require(
            self.top_k <= self.num_experts,
            f"router.top_k={self.top_k} must be ≤ router.num_experts={self.num_experts}",
        )


@dataclass(kw_only=True, slots=True)
class ExpertsConfig:
    backend: ExpertBackend = ExpertBackend.auto


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One corpus: a file, folder, glob, data set name, or a built-in domain (`format=stdlib`).

    `text_field` is the text column of JSONL, Parquet and data sets; `subset` and `split` are `datasets.load_dataset`'s;
    `weight` is the share of training samples (null: in proportion to tokens; all sources or none state one).
    """

    path: str = ""
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    weight: float | None = None
    subset: str | None = None
    split: str = "train"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Corpora. `data.path` is short for one source named `text`; a mixture names its sources in `data.sources`."""

    path: str | None = None
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    sources: dict[str, Any] = field(
        default_factory=dict
    )  # name → SourceConfig; Any, so that `+data.sources.x.path=` works
    held_out: float = 0.05
    cache_dir: str = "~/.cache/moe"

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, f"data.held_out={self.held_out} must be between 0 and 1: a share of documents")
        both = self.path is not None and self.sources
        _require(not both, f"data.path={self.path} and data.sources can't both be set: name one")
        self.sources = {name: _source(name, value) for name, value in self.sources.items()}
        weights = [source.weight for source in self.sources.values()]
        for name, source in self.sources.items():
            _positive(f"data.sources.{name}", source, "weight")
            _require(bool(source.path), f"data.sources.{name}.path='' must name a file, folder, glob or data set")
        stated = [weight for weight in weights if weight is not None]
        _require(
            len(stated) in (0, len(weights)),
            f"data.sources weights={weights} must be stated for every source or for none",
        )

    def all_sources(self) -> dict[str, SourceConfig]:
        """Every source by name, `data.path` included."""
        if self.path is not None:
            return {"text": SourceConfig(path=self.path, format=self.format, text_field=self.text_field)}
        return dict(self.sources)


def _source(name: str, value: Any) -> SourceConfig:
    """A source as written in YAML, typed. Raises ValueError naming the key."""
    if isinstance(value, SourceConfig):
        return value
    _require(isinstance(value, dict), f"data.sources.{name}={value} must be a mapping with a path")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), value))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        rule = str(error).splitlines()[0]
        raise ValueError(f"data.sources.{name}={value}: {rule}") from error


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`vocab_size` (pieces to train) and `train_bytes` (text sampled for it) belong to `kind=sentencepiece`; `path` to
    the kinds that read a file or folder; `kind=mistral` needs neither (mistral-common carries its own)."""

    kind: TokenizerKind = TokenizerKind.sentencepiece
    path: str | None = None
    vocab_size: int | None = None
    train_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        trains, kind = self.kind is TokenizerKind.sentencepiece, self.kind.value
        reads = self.kind in (TokenizerKind.model_file, TokenizerKind.huggingface)
        _positive("tokenizer", self, "vocab_size", "train_bytes")
        _require(not reads or bool(self.path), f"tokenizer.path={self.path} must name a file for tokenizer.kind={kind}")
        _require(
            reads or self.path is None,
            f"tokenizer.path={self.path} must be null for tokenizer.kind={kind}: it reads no file",
        )
        _require(
            trains == (self.vocab_size is not None),
            f"tokenizer.vocab_size={self.vocab_size} must be "
            + ("set for tokenizer.kind=sentencepiece" if trains else f"null for tokenizer.kind={kind}: it has its own"),
        )
        _require(
            self.vocab_size is None or self.vocab_size >= 300,
            f"tokenizer.vocab_size={self.vocab_size} must be ≥ 300: 256 byte pieces, 4 special ones and some characters",
        )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW; `min_lr_ratio` is where a decay ends, `decay_steps` the length of WSD's last stretch (null: a fifth)."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 20
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "eps", "max_grad_norm", "decay_steps")
        _not_negative("optim", self, "weight_decay", "warmup_steps")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1)",
        )
        _require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
        _require(
            self.decay_steps is None or self.schedule is Schedule.warmup_stable_decay,
            f"optim.decay_steps={self.decay_steps} needs optim.schedule=warmup_stable_decay",
        )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """`expert` ranks share one set of experts; every rank is data-parallel for the rest."""

    expert: int = 1
    zero_stage: int = 1

    def __post_init__(self) -> None:
        _positive("parallel", self, "expert")
        reasons = {
            0: "DeepSpeed's stage 0 reports a wrong gradient norm with experts, so clipping would be wrong",
            3: "stage 3 gathers parameters inside the expert exchange and hangs when routing differs between ranks",
        }
        stage = self.zero_stage
        _require(
            stage in (1, 2),
            f"parallel.zero_stage={stage} must be 1 or 2" + (f": {reasons[stage]}" if stage in reasons else ""),
        )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """W&B: `project`, `name` and `mode` are wandb.init's; the key comes from the environment only."""

    backend: TrackingBackend = TrackingBackend.wandb
    project: str = "moe"
    name: str | None = None


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Save `every` so many steps and at the end; keep the newest `keep` of them."""

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every", "keep")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Batch sizes are in sequences; `eval_sequences` bounds the held-out sequences scored at each evaluation.

    `peak_tflops` is the hardware's stated peak for MFU, per rank (null: a matrix product is timed at start-up).
    """

    steps: int = 300
    seed: int = 0
    sequence_length: int = 256
    micro_batch_size: int = 8
    global_batch_size: int = 16
    precision: Precision = Precision.float32
    eval_every: int = 50
    eval_sequences: int = 128
    sample_every: int = 100
    sample_prompt: str = "def "
    sample_tokens: int = 64
    log_every: int = 10
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        _positive("train", self, "steps", "sequence_length", "micro_batch_size", "global_batch_size", "eval_every")
        _positive("train", self, "eval_sequences", "sample_every", "sample_tokens", "log_every", "peak_tflops")
        _not_negative("train", self, "seed")


@dataclass(kw_only=True, slots=True)
class Config:
    """One training run. `run_dir` receives config.yaml, metrics.jsonl, checkpoints/, samples.jsonl, report.html."""

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(kind=TokenizerKind.mistral))
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        train, model, optim = self.train, self.model, self.optim
        _require(bool(self.data.all_sources()), "data.path=null must name a file, folder, glob or data set")
        _require(
            train.sequence_length <= model.max_position_embeddings,
            f"train.sequence_length={train.sequence_length} must be ≤ "
            f"model.max_position_embeddings={model.max_position_embeddings}",
        )
        pieces = self.tokenizer.vocab_size
        _require(
            pieces is None or pieces <= model.vocab_size,
            f"tokenizer.vocab_size={pieces} must be ≤ model.vocab_size={model.vocab_size}",
        )
        tail = (optim.decay_steps or 0) + optim.warmup_steps
        _require(
            optim.schedule is Schedule.constant or tail <= train.steps,
            f"optim.warmup_steps={optim.warmup_steps} plus decay_steps={optim.decay_steps} must be ≤ "
            f"train.steps={train.steps}",
        )

    def check_world(self, world_size: int) -> None:
        """Rules that need the number of ranks. Raises ValueError."""
        train, expert = self.train, self.parallel.expert
        micro = train.micro_batch_size * world_size
        _require(
            train.global_batch_size % micro == 0,
            f"train.global_batch_size={train.global_batch_size} must be divisible by train.micro_batch_size="
            f"{train.micro_batch_size} × {world_size} ranks = {micro}",
        )
        if self.model.mlp is Mlp.dense:
            _require(expert == 1, f"parallel.expert={expert} must be 1 with model.mlp=dense: there are no experts")
        _require(world_size % expert == 0, f"parallel.expert={expert} must divide the number of ranks, {world_size}")
        _require(
            self.router.num_experts % expert == 0,
            f"parallel.expert={expert} must divide router.num_experts={self.router.num_experts}",
        )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * world_size)
