"""How it is trained: optimizer, ranks, tracking, checkpoints, steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.choices import Precision, Schedule, TrackingBackend
from moe.config.rules import filled, is_seed, not_negative, positive, require

MAX_HANG_SECONDS = 850.0  # × 2 for the first step < moe.distributed.rendezvous.COLLECTIVE_TIMEOUT


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW. `warmup_steps` null is a twentieth of train.steps, WSD's `decay_steps` null a fifth; a decay ends at
    `lr × min_lr_ratio`."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: Schedule = Schedule.cosine
    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        positive("optim", self, "lr", "eps", "max_grad_norm", "decay_steps")
        not_negative("optim", self, "weight_decay", "warmup_steps")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1), as in optim.betas=[0.9,0.95]",
        )
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
        require(
            self.decay_steps is None or self.schedule is Schedule.warmup_stable_decay,
            f"optim.decay_steps={self.decay_steps} needs optim.schedule=warmup_stable_decay, not {self.schedule.name}",
        )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """`expert_parallel_size` ranks share one set of experts; every rank is data-parallel for the rest.

    `expert_across_nodes` allows a set to span nodes, whose exchange then crosses the network; `offload_optimizer` keeps
    the optimizer's state (float32 weights, moments) in the host's memory (CUDA only).
    """

    expert_parallel_size: int = 1
    expert_across_nodes: bool = False
    zero_stage: int = 1
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        positive("parallel", self, "expert_parallel_size")
        reasons = {
            0: "DeepSpeed's stage 0 reports a wrong gradient norm with experts, so clipping would be wrong",
            3: "stage 3 gathers parameters inside the expert exchange and hangs when routing differs between ranks",
        }
        stage = self.zero_stage
        require(
            stage in (1, 2),
            f"parallel.zero_stage={stage} must be 1 or 2" + (f": {reasons[stage]}" if stage in reasons else ""),
        )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """W&B: `project` and `name` are wandb.init's; WANDB_MODE and the key come from the environment only."""

    backend: TrackingBackend = TrackingBackend.wandb
    project: str = "moe"
    name: str | None = None

    def __post_init__(self) -> None:
        filled("tracking", self, "project", "name")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Save `every` so many steps and at the end; keep the newest `keep`, and for good each `keep_every`-th step's.

    `background` writes a snapshot while training goes on; after `max_failures` failed saves in a row the run stops.
    `allow_changes` lets a resume go on with another mathematics than the checkpoint's (see `moe.train.run_directory`).
    `init_from` (a run directory, one of its checkpoints or a folder with a model) is where a new run takes its first
    weights from; a run that has checkpoints of its own goes on from those.
    """

    every: int = 200
    keep: int = 2
    keep_every: int | None = None
    background: bool = True
    max_failures: int = 3
    allow_changes: bool = False
    init_from: str | None = None

    def __post_init__(self) -> None:
        require(
            self.init_from != "",
            "checkpoint.init_from='' must name a run directory, one of its checkpoints or a folder with a model; "
            "null starts from random weights",
        )
        positive("checkpoint", self, "every", "keep", "keep_every", "max_failures")
        require(
            self.keep_every is None or self.keep_every % self.every == 0,
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}: "
            "no other step is saved",
        )


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """When a step is skipped, when a rank counts as hung.

    A step whose loss or gradient is not finite is always skipped on all ranks; so is, if `spike_sigmas` is set, one
    whose gradient norm is more than so many standard deviations above the mean of the last `spike_window` accepted
    steps (once there are half as many). After `max_skipped` skipped steps in a row the run stops. A rank that makes no
    progress for `hang_seconds` ends the run, so that the launcher can start it again (null: never).
    `name_stragglers` times every collective (it patches torch's process groups in this process) and warns of a rank
    that the others wait for.
    """

    max_skipped: int = 5
    spike_sigmas: float | None = None
    spike_window: int = 128
    hang_seconds: float | None = 600.0
    name_stragglers: bool = False

    def __post_init__(self) -> None:
        positive("guard", self, "max_skipped", "spike_sigmas", "spike_window", "hang_seconds")
        require(
            self.hang_seconds is None or self.hang_seconds >= 1,
            f"guard.hang_seconds={self.hang_seconds} must be ≥ 1 (or null): a step may take as long",
        )
        require(
            self.hang_seconds is None or self.hang_seconds <= MAX_HANG_SECONDS,
            f"guard.hang_seconds={self.hang_seconds} must be ≤ {MAX_HANG_SECONDS:g} (or null): the first step may take "
            "twice as long, and after half an hour a collective times out by itself, without naming a rank",
        )
        require(
            self.spike_window >= 8, f"guard.spike_window={self.spike_window} must be ≥ 8: a deviation needs a few norms"
        )


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
    """The collapse alarm (`moe.train.alarm`). It is armed once the routers have settled, at the latest `after` so many
    steps (null: no alarm). With `stop` the run ends at its first alarm."""

    after: int | None = 220
    stop: bool = False

    def __post_init__(self) -> None:
        positive("alarm", self, "after")
        require(not self.stop or self.after is not None, "alarm.stop=true needs an alarm: alarm.after must not be null")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Batch sizes are in sequences; `eval_sequences` bounds the held-out sequences scored at each evaluation.

    `sample_prompt` null is the beginning of a held-out document (`Corpus.opening`).
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
    sample_prompt: str | None = None
    sample_tokens: int = 64
    log_every: int = 10
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        positive("train", self, "steps", "sequence_length", "micro_batch_size", "global_batch_size", "eval_every")
        positive("train", self, "eval_sequences", "sample_every", "sample_tokens", "log_every", "peak_tflops")
        is_seed("train", self, "seed")
