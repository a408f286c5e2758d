"""`moe bench NAME key=value …`: benchmarks. Each also times its reference in the same run."""

from __future__ import annotations

import importlib

from moe.errors import UserError

# Name → what it measures. The module of that name has `run(overrides)`.
BENCHMARKS = {
    "peers": "our training step beside transformers' MixtralForCausalLM",
    "decode": "generating text beside transformers' generate",
    "expert_parallel": "experts split over ranks beside plain data parallelism (under torchrun)",
    "saving": "what a checkpoint costs the training beside it",
    "attention": "windowed attention: work and time per token at several sequence lengths",
    "diagnostics": "what the routers' diagnostics cost a training step",
    "prepare": "text to token shards: MB a second and core, and what more processes bring",
    "memory": "the plan's memory beside that of real steps",
    "memory_peers": "the peak memory of our step's process beside transformers'",
    "gpu": "a report about one GPU: peaks, tests, training, kernels, profile (launch/gpu_report.sh)",
}


def run_bench(overrides: list[str]) -> None:
    """Runs the benchmark named by the first override, with the others as its keys. Raises UserError."""
    name, keys = (overrides[0], overrides[1:]) if overrides else ("", [])
    if name not in BENCHMARKS:
        from moe.config.suggest import closest  # here, since moe.bench.gpu must start where packages may be missing

        near = closest(name, list(BENCHMARKS))
        meant = f"did you mean {near}?" if near else f"one of {', '.join(BENCHMARKS)}"
        raise UserError(f"bench {name}: no such benchmark; {meant}")
    importlib.import_module(f"moe.bench.{name}").run(keys)
