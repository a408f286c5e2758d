"""Parallelism, tracking, checkpoints, guard and training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moe.config.choices import AnswerMetric, Precision, TrackingBackend
from moe.config.rules import default_of, filled, is_seed, positive, require

MAX_TAG = 64  # characters that W&B takes
# The first step is given twice as long, which must stay below moe.distributed.rendezvous.COLLECTIVE_TIMEOUT.
MAX_HANG_SECONDS = 850.0


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """`expert_parallel_size` ranks hold one set of experts between them; all other weights are on every rank.

    `expert_across_nodes` allows such a group of ranks to span nodes, so that its exchanges cross the network.
    `offload_optimizer` keeps the optimizer's state (float32 weights, moments) in host memory (CUDA only).
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
    """W&B: `project`, `name`, `group` and `tags` are wandb.init's; WANDB_MODE and the key come from the environment
    only.

    What has a value for each layer or expert is sent in the first step, the last one and every `detail_every`-th;
    metrics.jsonl has it in every step. `report` uploads report.html as an artifact when training ends.
    """

    backend: TrackingBackend = TrackingBackend.wandb
    project: str = "moe"
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    detail_every: int = 10
    report: bool = False

    def __post_init__(self) -> None:
        filled("tracking", self, "project", "name", "group")
        require(
            all(0 < len(tag.strip()) <= MAX_TAG for tag in self.tags),
            f"tracking.tags={self.tags} must each have 1 to {MAX_TAG} characters, as in tracking.tags=[sweep,small]",
        )
        positive("tracking", self, "detail_every")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Saves at every multiple of `every` steps and at the end. Keeps the newest `keep` checkpoints, and those at
    multiples of `keep_every` for good.

    `background` writes a snapshot while training continues; after `max_failures` failed saves in a row the run stops.
    `allow_changes` allows a resume with keys that change the mathematics of the run (see `moe.train.run_directory`).
    With `metric_for_best_model` (a metric of the evaluations, as val_loss) the step of each best evaluation so far is
    saved and kept, and RUN_DIR/checkpoints/best names it; smaller is better unless `greater_is_better`. Training ends
    after `early_stopping_patience` evaluations in a row that were not better.
    """

    every: int = 200
    keep: int = 2
    keep_every: int | None = None
    background: bool = True
    max_failures: int = 3
    allow_changes: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool = False
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every", "keep", "keep_every", "max_failures", "early_stopping_patience")
        filled("checkpoint", self, "metric_for_best_model")
        for name, used in (
            ("early_stopping_patience", self.early_stopping_patience is not None),
            ("greater_is_better", self.greater_is_better),
        ):
            require(
                not used or self.metric_for_best_model is not None,
                f"checkpoint.{name}={str(getattr(self, name)).lower()} needs checkpoint.metric_for_best_model, as in "
                "checkpoint.metric_for_best_model=val_loss",
            )
        require(
            self.keep_every is None or self.keep_every % self.every == 0,
            f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}: "
            "no other step is saved",
        )


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """When a step is skipped, and when a rank counts as hung.

    A step whose loss or gradient is not finite is always skipped on all ranks. With `spike_sigmas`, so is a step whose
    gradient norm is more than that many standard deviations above the mean of the last `spike_window` accepted steps
    (once half as many are known). After `max_skipped` skipped steps in a row the run stops. If a rank makes no progress
    for `hang_seconds`, the run ends, so that the launcher can restart it (null: never). `name_stragglers` times every
    collective (it patches torch's process groups in this process) and warns about a rank that the others wait for.
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
    """Batch sizes are in sequences; each evaluation scores at most `eval_sequences` held-out sequences. With `epochs`
    the number of `steps` is that of so many passes over the training data.

    `sample_prompt=null` uses the beginning of a held-out document (`Corpus.opening`). `peak_tflops` is a rank's peak,
    which MFU is relative to (null: a matrix product is timed at start-up). `neftune_noise_alpha` adds
    noise to the embeddings in training (arXiv 2310.05914); null: none.

    With `answer_metrics` each evaluation lets the model answer at most `answer_rows` held-out rows for fine-tuning, in
    at most `answer_tokens` tokens each; the metrics are defined in `moe.train.answer_metrics`.
    """

    steps: int = 300
    epochs: float | None = None
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
    answer_metrics: list[AnswerMetric] = field(default_factory=list)
    answer_rows: int = 64
    answer_tokens: int = 64
    log_every: int = 10
    peak_tflops: float | None = None
    neftune_noise_alpha: float | None = None

    def __post_init__(self) -> None:
        positive(
            "train", self, "steps", "epochs", "sequence_length", "micro_batch_size", "global_batch_size", "eval_every"
        )
        positive("train", self, "eval_sequences", "sample_every", "sample_tokens", "log_every", "peak_tflops")
        positive("train", self, "answer_rows", "answer_tokens")
        require(
            len(set(self.answer_metrics)) == len(self.answer_metrics),
            f"train.answer_metrics=[{','.join(one.name for one in self.answer_metrics)}] names one twice",
        )
        positive("train", self, "neftune_noise_alpha")
        is_seed("train", self, "seed")
        require(
            self.epochs is None or self.steps == default_of(self, "steps"),
            f"train.epochs={self.epochs} and train.steps={self.steps} both say how long: leave one out",
        )

    def steps_for(self, samples: int) -> int:
        """Optimizer steps of the run, where one pass over the training data has so many samples."""
        return self.steps if self.epochs is None else max(1, math.ceil(self.epochs * samples / self.global_batch_size))
