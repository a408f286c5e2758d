"""`moe evaluate`: which checkpoint, on which tasks of the harness, and how."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config.choices import Precision
from moe.config.generate import check_source
from moe.config.rules import MAX_COUNT, filled, is_seed, not_negative, positive, require


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """`checkpoint`, `device`, `dtype` and `check_memory` are those of `moe generate`; the others are lm_eval's.

    `tasks` are names, or YAML files, with commas between them; `include_path` is a folder of task YAMLs, or one of
    them. `limit` is a number of documents of each task, or a share of them below 1. `max_gen_toks` is for tasks that
    state none. `bootstrap_iters` are resamplings for the standard error of metrics that aren't means (0: no standard
    errors). `output` is the JSON file (null: RUN/evaluation/DATE.json); with `log_samples` it also has every document
    with its requests and answers. Code that a task's own files bring runs only with `trust_task_code`; tasks that run
    what the model writes need `confirm_run_unsafe_code` too.
    """

    checkpoint: str = ""
    tasks: str = ""
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    max_gen_toks: int = 256
    fewshot_random_seed: int = 1234
    bootstrap_iters: int = 1000
    log_samples: bool = False
    output: str | None = None
    trust_task_code: bool = False
    confirm_run_unsafe_code: bool = False
    device: str = "auto"
    dtype: Precision = Precision.float32
    check_memory: bool = True

    def __post_init__(self) -> None:
        check_source(self.checkpoint, self.device)
        require(bool(self.task_names), "tasks='' must name a task, or several, as in tasks=arc_easy,hellaswag")
        twice = [name for name in self.task_names if self.task_names.count(name) > 1]
        require(not twice, f"tasks={self.tasks}: {', '.join(twice[:1])} is named twice")
        filled("", self, "include_path", "output")
        positive("", self, "batch_size", "max_gen_toks", "limit")
        not_negative("", self, "num_fewshot", "bootstrap_iters")
        is_seed("", self, "fewshot_random_seed")
        require(
            self.limit is None or self.limit < 1 or (self.limit.is_integer() and self.limit <= MAX_COUNT),
            f"limit={self.limit} must be a whole number of documents, or a share of them below 1",
        )

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]
