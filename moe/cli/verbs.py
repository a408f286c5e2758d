"""The verbs of `moe`: each is a thin function that passes overrides to the part of the package that does the work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError

# Each verb imports what it needs when it runs: a misspelt command is answered before Hydra, let alone torch, is loaded.
if TYPE_CHECKING:
    from moe.config import (
        AnalyzeConfig,
        Config,
        EvaluateConfig,
        ExportConfig,
        ImportConfig,
        SweepConfig,
        TokenizerConfig,
        UpcycleConfig,
    )


def load(overrides: list[str], verb: str = "train") -> Any:
    """The verb's configuration, composed and checked. Unless the overrides state them, a run's vocabulary size comes
    from an existing tokenizer, and its model, router and tokenizer come from `init_from`. Raises UserError."""
    from moe.config import Config
    from moe.config.keys import check_form, check_names

    composed_as = schema(verb)
    check_form(overrides)
    check_names(overrides, verb, composed_as)
    from moe.config.compose import load_config

    of_run = (_count_pieces, _read_source) if issubclass(composed_as, Config) else (None, None)
    return load_config(overrides, verb, composed_as, *of_run)


def _read_source(init_from: str, run_dir: str | None) -> Any:
    from moe.interop.source import read_source

    return read_source(init_from, run_dir)


def _count_pieces(tokenizer: TokenizerConfig) -> int:
    from moe.data.tokenizer import count_pieces

    return count_pieces(tokenizer)


def _train(overrides: list[str]) -> None:
    """Pre-train or go on with a run: composes configs/train.yaml, writes run_dir; with -m (--multirun) one run for each
    combination of values, as in `moe train -m optim.lr=1e-3,2e-3 run_dir=runs/rates`."""
    if any(one in MULTIRUN for one in overrides):
        from moe.sweep.multirun import run_jobs

        _require_one_rank("train -m")
        run_jobs([one for one in overrides if one not in MULTIRUN], load)
        return
    from moe.cli.limits import require_address_space, require_open_files
    from moe.distributed.environment import world_from_environment

    config: Config = load(overrides)
    _, world_size, _, node_size = world_from_environment()
    config.check_world(world_size, node_size)
    require_open_files(world_size)
    require_address_space(config.engine)
    from moe.train.loop import train

    train(config)


def _require_one_rank(verb: str) -> None:
    from moe.distributed.environment import world_from_environment

    _, world_size, _, _ = world_from_environment()
    if world_size > 1:
        raise ConfigError(f"{verb}: starts the processes that train by itself; start it without torchrun")


def _sweep(overrides: list[str]) -> None:
    """Search settings of the router, or any: trains the trials of a study, writes run_dir/trials.csv and report.html;
    keys of `moe train`, as in `moe sweep sweep=router_quick model=small`, apply to every trial."""
    from moe.sweep.definition import split

    own, fixed = split(overrides)
    config: SweepConfig = load(own, "sweep")
    from moe.sweep.run import run_sweep

    _require_one_rank("sweep")
    run_sweep(config, fixed, load)


def _plan(overrides: list[str]) -> None:
    """What a run would need before it is launched: memory, bytes on the links, time; every override of `moe train`.

    Exit code 2 when it doesn't fit the stated hardware.
    """
    config = load(overrides, "plan")
    from moe.plan.show import run_plan

    run_plan(config)


def _prepare(overrides: list[str]) -> None:
    """Write the token shards that `moe train` with the same data and tokenizer keys would use; `verify=true` checks
    the content of shards that are there. Under torchrun rank 0 writes what the other ranks, on any nodes, encode."""
    config = load(overrides, "prepare")
    from moe.cli.prepare import run_prepare

    run_prepare(config)


def _validate(overrides: list[str]) -> None:
    """Check the rows of a fine-tuning run (`data=sft data.path=FILE`): every bad row, lengths, what is learnt, how long
    it takes; `page=rows.html` writes a page, `fixed=rows.jsonl` a copy without the bad rows."""
    config = load(overrides, "validate")
    from moe.validate.run import run_validate

    run_validate(config)


def _generate(overrides: list[str]) -> None:
    """Continue a prompt, or every line of a file, from a checkpoint."""
    from moe.config.overrides import quote_texts

    config = load(quote_texts(overrides), "generate")
    from moe.inference.command import run_generate

    run_generate(config, *_checkpoint(config))


def _chat(overrides: list[str]) -> None:
    """Talk to a fine-tuned checkpoint in the terminal, or answer each line of standard input; /help lists what can be
    said to it."""
    from moe.config.overrides import quote_texts

    config = load(quote_texts(overrides), "chat")
    from moe.inference.terminal import run_chat

    run_chat(config, *_checkpoint(config))


def _evaluate(overrides: list[str]) -> None:
    """Score a checkpoint on tasks of EleutherAI's lm-evaluation-harness, its own or yours (`include_path=FOLDER`); a
    table, and a JSON file."""
    config: EvaluateConfig = load(overrides, "evaluate")
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ConfigError("moe evaluate needs lm_eval: pip install 'moe-train[evaluate]', or 'lm_eval>=0.4.13,<0.5'")
    from moe.evaluate.run import run_evaluate

    run_evaluate(config)


def _checkpoint(config: Any) -> tuple[Any, Any]:
    """The model and the tokenizer of `config.checkpoint`. Raises UserError."""
    from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
    from moe.data.tokenizer import load_saved
    from moe.kernels.policy import choose_device, torch_dtype

    device, dtype = choose_device(config.device), torch_dtype(config.dtype)
    folder = resolve(Path(config.checkpoint).expanduser(), lambda line: print(f"warning: {line}", file=sys.stderr))
    model = read_model(folder, device=device, dtype=dtype, check_memory=config.check_memory)
    return model, load_saved(tokenizer_folder(folder))


def _import(overrides: list[str]) -> None:
    """Turn a Hugging Face model folder into a checkpoint, for `moe generate`, `moe analyze` and a run's init_from."""
    config: ImportConfig = load(overrides, "import")
    from moe.interop.importing import run_import

    print(run_import(config))


def _export(overrides: list[str]) -> None:
    """Write a checkpoint's model as a Hugging Face folder, which transformers and others read."""
    config: ExportConfig = load(overrides, "export")
    from moe.interop.exporting import run_export

    print(run_export(config, lambda line: print(f"warning: {line}", file=sys.stderr)))


def _upcycle(overrides: list[str]) -> None:
    """Make a sparse model of a dense one: every expert begins as a copy of the layer's feed-forward."""
    config: UpcycleConfig = load(overrides, "upcycle")
    from moe.interop.upcycling import run_upcycle

    print(run_upcycle(config, lambda line: print(f"warning: {line}", file=sys.stderr)))


def _report(overrides: list[str]) -> None:
    """Write RUN_DIR/report.html: curves, balance, expert shares, a text coloured by expert; of a sweep, what it
    found, also as a table in a Markdown page (`markdown=PAGE.md reference=POINT`). No network needed."""
    from moe.cli.report import run_report

    run_report(overrides)


def _analyze(overrides: list[str]) -> None:
    """Write RUN/analysis/: what a checkpoint's routers learnt, from its held-out text or another (`data=…`)."""
    config: AnalyzeConfig = load(overrides, "analyze")
    from moe.analysis.run import run_analysis

    print(run_analysis(config))


def _bench(overrides: list[str]) -> None:
    """Run a benchmark, as `peers` (a training step beside transformers') or `step` (where its time goes); without a
    name `moe bench` lists all of them."""
    from moe.bench import run_bench

    run_bench(overrides)


def _doctor(arguments: list[str]) -> None:
    """Check this machine: packages, GPU, back-ends, cores, memory, disk, W&B, ports; `--json` for one JSON object."""
    from moe.doctor import run_doctor

    run_doctor(arguments)


def _ls(arguments: list[str]) -> None:
    """List the groups and their presets; `moe ls GROUP` says what each preset is, and where it lies if it is yours."""
    from moe.cli.presets import list_presets

    if len(arguments) > 1:
        raise ConfigError(f"ls {' '.join(arguments)}: give one group, as in `moe ls model`, or none")
    if not arguments:
        print("Verbs (`moe VERB --help`):")
        for verb, run in VERBS.items():
            print(f"  {verb:{max(map(len, VERBS))}}  {(run.__doc__ or '').partition('; ')[0].rstrip('.')}")
    print(list_presets(*arguments))


def _cp(arguments: list[str]) -> None:
    """Copy a preset to edit: `moe cp model/small mine.yaml`, then `moe train model=mine.yaml`."""
    from moe.cli.presets import copy_preset

    if len(arguments) != 2:
        raise ConfigError(f"cp {' '.join(arguments)}: give a preset and a file, as in `moe cp model/small mine.yaml`")
    print(copy_preset(*arguments))


def _completion(arguments: list[str]) -> None:
    """Print a completion script for bash, or for zsh with bashcompinit: `eval "$(moe completion bash)"`."""
    from moe.cli.completion import completion_script

    if arguments != ["bash"]:
        raise ConfigError(f"completion {' '.join(arguments)}: must be `moe completion bash`; zsh takes it too")
    print(completion_script(), end="")


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sweep": _sweep,
    "plan": _plan,
    "prepare": _prepare,
    "validate": _validate,
    "generate": _generate,
    "chat": _chat,
    "evaluate": _evaluate,
    "import": _import,
    "export": _export,
    "upcycle": _upcycle,
    "report": _report,
    "analyze": _analyze,
    "bench": _bench,
    "doctor": _doctor,
    "ls": _ls,
    "cp": _cp,
    "completion": _completion,
}
MULTIRUN = ("-m", "--multirun")
# Options of a verb beside --help, --cfg and --config-dir.
OPTIONS = {"doctor": ("--json",), "train": MULTIRUN}


# What a verb composes, from configs/VERB.yaml: a dataclass of moe.config.
SCHEMAS = {
    "train": "Config",
    "sweep": "SweepConfig",
    "prepare": "PrepareConfig",
    "validate": "ValidateConfig",
    "plan": "PlanConfig",
    "analyze": "AnalyzeConfig",
    "import": "ImportConfig",
    "export": "ExportConfig",
    "upcycle": "UpcycleConfig",
    "generate": "GenerateConfig",
    "chat": "ChatConfig",
    "evaluate": "EvaluateConfig",
}


def schema(verb: str) -> type:
    """The dataclass of a verb in SCHEMAS."""
    import moe.config

    return getattr(moe.config, SCHEMAS[verb])
