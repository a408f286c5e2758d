"""One training run: all sections and the rules between them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from moe.config.adapter import AdapterConfig, fits
from moe.config.choices import EngineKind, ExpertBackend, Mlp, OptimizerKind, Recompute, Schedule
from moe.config.data import DataConfig, TokenizerConfig
from moe.config.migrate import CONFIG_VERSION
from moe.config.model import FP8_MULTIPLE, ExpertsConfig, ModelConfig
from moe.config.optim import OptimConfig
from moe.config.router import RouterConfig
from moe.config.router_kinds import TopKRouterConfig
from moe.config.rules import MAX_REAL, MIN_REAL, filled, require
from moe.config.train import (
    AlarmConfig,
    CheckpointConfig,
    GuardConfig,
    ParallelConfig,
    TrackingConfig,
    TrainConfig,
)

PROFILED = range(5, 9)  # the first steps are slower: memory is allocated, kernels are chosen


@dataclass(kw_only=True, slots=True)
class Config:
    """One training run. It writes config.yaml, metrics.jsonl, checkpoints/, samples.jsonl, report.html to `run_dir`.

    `config_version` is incremented whenever a key is renamed, so that saved configurations stay readable
    (`moe.config.migrate`). `init_from` (a run directory, one of its checkpoints or a folder with a model) gives a new
    run its initial weights, and its model, router and tokenizer unless the command states others; a run that has
    checkpoints of its own resumes from those. `check_memory=false` starts the run even if, by its plan, it needs more
    memory than this machine has (`moe.plan.fit`). `profile=true` records where the time of some steps goes
    (`moe.train.profile`).
    """

    config_version: int = CONFIG_VERSION
    run_dir: str = "runs/default"
    init_from: str | None = None
    check_memory: bool = True
    profile: bool = False
    engine: EngineKind = EngineKind.deepspeed
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=TopKRouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        train, model, optim = self.train, self.model, self.optim
        filled("", self, "run_dir")
        self.run_dir = os.path.expanduser(self.run_dir)
        require(
            self.init_from != "",
            "init_from='' must name a run directory, one of its checkpoints or a folder with a model; null starts from "
            "random weights",
        )
        require(
            self.config_version == CONFIG_VERSION,
            f"config_version={self.config_version} must be {CONFIG_VERSION}, this code's: leave it out",
        )
        require(
            bool(self.data.all_sources()) or not self.starts,
            "data.path=null must name a file, folder, glob or data set, as in data.path='corpus/*.txt'",
        )
        require(
            train.sequence_length <= model.max_position_embeddings,
            f"train.sequence_length={train.sequence_length} must be ≤ "
            f"model.max_position_embeddings={model.max_position_embeddings}",
        )
        require(
            train.sample_tokens < model.max_position_embeddings,
            f"train.sample_tokens={train.sample_tokens} must be < "
            f"model.max_position_embeddings={model.max_position_embeddings}: the prompt needs positions too",
        )
        require(
            not self.profile or train.epochs is not None or train.steps >= PROFILED[-1],
            f"profile=true needs train.steps ≥ {PROFILED[-1]}, and train.steps={train.steps}: it profiles steps "
            f"{PROFILED[0]} to {PROFILED[-1]}",
        )
        pieces = self.tokenizer.vocab_size
        require(
            pieces is None or pieces <= model.vocab_size,
            f"tokenizer.vocab_size={pieces} must be ≤ model.vocab_size={model.vocab_size}",
        )
        tail = (optim.decay_steps or 0) + (optim.warmup_steps or 0)
        require(
            optim.schedule is Schedule.constant or train.epochs is not None or tail <= train.steps,
            f"optim.warmup_steps={optim.warmup_steps} plus optim.decay_steps={optim.decay_steps} must be ≤ "
            f"train.steps={train.steps}",
        )
        routed = model.sparse_layer_numbers
        for layer in self.router.layers:
            require(
                layer in routed or model.mlp is Mlp.dense,
                f"router.layers.{layer}: layers with a router are {', '.join(map(str, routed))}",
            )
        require(
            not self.adapter.trains_adapter or self.init_from is not None or not self.starts,
            f"adapter.kind={self.adapter.kind.name} needs init_from: the run directory or model that it adapts",
        )
        require(
            MIN_REAL <= self.peak_rate <= MAX_REAL,
            f"optim.lr={optim.lr} × optim.base_hidden_size={optim.base_hidden_size} / "
            f"model.hidden_size={model.hidden_size} = {self.peak_rate:g} must be between {MIN_REAL:g} and {MAX_REAL:g}",
        )
        if self.experts.two_batch_overlap:
            self._check_halves()
        if self.experts.fp8:
            self._check_fp8()
        if optim.kind is OptimizerKind.muon:
            self._check_muon()
        if self.adapts_experts:
            self._check_adapted_experts()
        self._check_added_tokens()
        if self.engine is EngineKind.plain:
            self._check_plain_engine()

    @property
    def adapts_experts(self) -> bool:
        """Whether experts get adapters."""
        blocks = (f"model.layers.{layer}.mlp.experts" for layer in self.model.sparse_layer_numbers)
        return self.adapter.trains_adapter and any(self.adapter.adapts(name) for name in blocks)

    @property
    def peak_rate(self) -> float:
        """The highest learning rate of the run: `optim.lr`, or where `optim.base_hidden_size` says at which width that
        rate was found, the rate for this width. It is in inverse proportion to the width: an Adam step of the same rate
        changes a wider matrix's output more (arXiv 2203.03466)."""
        base = self.optim.base_hidden_size
        return self.optim.lr if base is None else self.optim.lr * base / self.model.hidden_size

    def _check_halves(self) -> None:
        rows, stated = self.train.micro_batch_size, "experts.two_batch_overlap=true"
        require(rows > 1, f"{stated} must have train.micro_batch_size ≥ 2, not {rows}: a micro-batch is halved by rows")
        require(
            self.model.recompute is not Recompute.mlp,
            f"{stated} has no model.recompute=mlp: use model.recompute=block or none",
        )

    def _check_fp8(self) -> None:
        sizes = self.model.hidden_size, self.model.expert_size
        require(self.model.mlp is Mlp.sparse, "experts.fp8=true has no effect with model.mlp=dense: leave it out")
        require(
            not any(size % FP8_MULTIPLE for size in sizes),
            f"experts.fp8=true must have multiples of {FP8_MULTIPLE} as sizes, not hidden and expert size {sizes}: "
            "change model.hidden_size or model.moe_intermediate_size, or leave experts.fp8 out",
        )

    def _check_adapted_experts(self) -> None:
        require(
            self.experts.backend in (ExpertBackend.auto, ExpertBackend.grouped_mm, ExpertBackend.loop),
            f"experts.backend={self.experts.backend.name} has no adapters on experts: use experts.backend=auto",
        )
        require(
            not self.experts.fp8,
            "experts.fp8=true has no adapters on experts: leave it out, or adapt attention alone",
        )

    def _check_muon(self) -> None:
        adapter = self.adapter
        require(
            not adapter.trains_adapter or bool(adapter.modules_to_save),
            f"optim=muon with adapter.kind={adapter.kind.name} would leave Muon nothing to train: A and B, the factors "
            "of a change, are AdamW's: set optim=adamw",
        )
        require(
            not self.parallel.offload_optimizer,
            "optim=muon with parallel.offload_optimizer=true would orthogonalise every matrix on the host's processor: "
            "set parallel.offload_optimizer=false, or optim=adamw",
        )

    def _check_added_tokens(self) -> None:
        """Rows for added tokens must train: nothing else gives them a meaning."""
        if not self.tokenizer.add_special_tokens or self.init_from is None:
            return
        rows = ["embed_tokens"] if self.model.tie_word_embeddings else ["embed_tokens", "lm_head"]
        for name in ("model.embed_tokens", "lm_head")[: len(rows)]:
            trains = not self.adapter.trains_adapter or any(
                fits(pattern, name) or fits(pattern, f"{name}.weight") for pattern in self.adapter.modules_to_save
            )
            require(
                trains,
                f"tokenizer.add_special_tokens adds rows to {name}, which an adapter leaves as they are: set "
                f"adapter.modules_to_save=[{','.join(rows)}]",
            )
            frozen = next((one for one in self.optim.freeze if fnmatchcase(f"{name}.weight", one)), None)
            require(
                frozen is None,
                f"tokenizer.add_special_tokens adds rows to {name}, which optim.freeze={frozen} keeps from training: "
                "leave that pattern out",
            )

    def _check_plain_engine(self) -> None:
        parallel = self.parallel
        for key, value, only in (
            ("expert_parallel_size", parallel.expert_parallel_size, 1),
            ("zero_stage", parallel.zero_stage, 1),
            ("offload_optimizer", parallel.offload_optimizer, False),
        ):
            stated, needed = (f"parallel.{key}={str(x).lower()}" for x in (value, only))
            require(value == only, f"{stated} needs engine=deepspeed: engine=plain is one process; or set {needed}")

    @property
    def starts(self) -> bool:
        """Whether this configuration starts a run, which needs data and an adapter's base; a plan needs neither."""
        return True

    def check_world(self, world_size: int, node_size: int | None = None) -> None:
        """Rules that depend on the number of ranks, and on the number of ranks of a node (None: one node has them all).

        Raises UserError.
        """
        train, size = self.train, self.parallel.expert_parallel_size
        require(
            self.engine is EngineKind.deepspeed or world_size == 1,
            f"engine=plain runs on one rank, not on {world_size}: set engine=deepspeed, or start one rank",
        )
        micro = train.micro_batch_size * world_size
        require(
            train.global_batch_size % micro == 0,
            f"train.global_batch_size={train.global_batch_size} must be divisible by train.micro_batch_size="
            f"{train.micro_batch_size} × {world_size} ranks = {micro}, as "
            f"{-(-train.global_batch_size // micro) * micro} is",
        )
        stated = f"parallel.expert_parallel_size={size}"
        if self.model.mlp is Mlp.dense:
            require(size == 1, f"{stated} must be 1 with model.mlp=dense: there are no experts")
        require(
            world_size % size == 0,
            f"{stated} must divide the number of ranks, {world_size} "
            "(torchrun --nproc-per-node=N starts N on a machine)",
        )
        require(
            self.router.num_experts % size == 0, f"{stated} must divide router.num_experts={self.router.num_experts}"
        )
        node = node_size or world_size
        require(
            self.parallel.expert_across_nodes or node % size == 0,
            f"{stated} must divide the {node} ranks of a node: the exchange would cross the network; to let it, set "
            "parallel.expert_across_nodes=true",
        )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * world_size)
