"""`moe bench NAME key=value … [json=FILE] [plot=FILE.svg]`: benchmarks. Each also times its reference in the same run.

The last lines printed are the figures that the benchmark is about; `json=` also writes all results to a file, and
`plot=` draws its ratios and its losses against seconds.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from moe.durable import write_durably
from moe.errors import UserError

# Name → what it measures. The module of that name has `run(overrides)`, which returns its `Results` on rank 0.
BENCHMARKS = {
    "roofline": "the machine's matrix products by every route, copies, small operations: reference for all the rest",
    "kernels": "each part of a training step beside plain PyTorch, transformers' modules and DeepSpeed's MoE layer",
    "step": "where a training step's time goes: data wait, parts of the model, optimizer",
    "peers": "our training step beside transformers' MixtralForCausalLM, the sparse layer beside DeepSpeed's",
    "threads": "a training step on all cores beside one, and a matrix product's own gain",
    "startup": "start to first step of `moe train`, and what a mistake's answer costs",
    "decode": "generating text beside transformers' generate",
    "expert_parallel": "experts split over ranks beside plain data parallelism (under torchrun)",
    "exchange": "a sparse layer's exchange between ranks beside plain all-to-alls of its bytes (under torchrun)",
    "saving": "what a checkpoint costs the training beside it",
    "attention": "windowed attention: work and time per token at several sequence lengths",
    "scale": "whether a step's time grows as its formula says: sequence length, experts, tokens; ranks (torchrun)",
    "diagnostics": "what the routers' diagnostics cost a training step",
    "prepare": "text to token shards: MB a second and core, and what more processes bring",
    "memory": "the plan's memory beside that of real steps",
    "memory_peers": "the peak memory of our step's process beside transformers'",
    "time_to_loss": "held-out loss against seconds of training, beside a dense GPT",
    "all": "every benchmark of the CPU, and the measured part of docs/performance.md",
    "gpu": "a report about one GPU: peaks, tests, training, kernels, profile (launch/gpu_report.sh)",
}


WHOLE_REPORTS = ("gpu", "all")  # write files of their own


def run_bench(overrides: list[str]) -> None:
    """Runs the benchmark named by the first override, with the others as its keys; lists all without a name. Raises
    UserError."""
    if not overrides:
        print("\n".join(f"moe bench {name:<16} {about}" for name, about in BENCHMARKS.items()))
        return
    name, keys = overrides[0], overrides[1:]
    if name not in BENCHMARKS:
        from moe.config.suggest import closest  # here, since moe.bench.gpu must start where packages may be missing

        near = closest(name, list(BENCHMARKS))
        meant = f"did you mean {near}?" if near else f"one of {', '.join(BENCHMARKS)}"
        raise UserError(f"bench {name}: no such benchmark; {meant}")
    module = importlib.import_module(f"moe.bench.{name}")
    if name in WHOLE_REPORTS:
        module.run(keys)
        return
    files = {key: _file(keys, key) for key in FILES}
    measured = [key for key in keys if key.partition("=")[0] not in FILES]
    results = module.run(measured)
    if results is None:  # not rank 0
        return
    print("\n".join(results.lines()))
    if file := files["json"]:
        write_durably(file, json.dumps(results.values(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if file := files["plot"]:
        from moe.bench.plot import plot  # here for the same reason

        write_durably(file, plot({" ".join([name, *measured]): results.values()}))


FILES = ("json", "plot")  # keys that name a file to write


def _file(keys: list[str], key: str) -> Path | None:
    """What `key` names. Raises UserError where no file can be written there."""
    stated = [one.partition("=")[2] for one in keys if one.partition("=")[0] == key]
    if not stated:
        return None
    path = Path(stated[-1])
    if not stated[-1] or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{key}={stated[-1]} must be a file in a folder that exists")
    return path
