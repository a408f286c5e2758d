"""`moe bench NAME key=value …`: measurements that compare with something timed in the same run, never with a memory.

moe bench peers               our training step beside transformers' MixtralForCausalLM
moe bench expert_parallel     experts split over ranks beside plain data parallelism (under torchrun)
moe bench saving              what a checkpoint costs the training beside it
moe bench memory              the plan's memory beside that of real steps
moe bench attention           windowed attention: work and time per token at several sequence lengths
"""

from __future__ import annotations

from moe.errors import UserError


def run_bench(overrides: list[str]) -> None:
    """Runs the benchmark that the first override names with the others as its keys. Raises UserError for the user."""
    name, keys = (overrides[0], overrides[1:]) if overrides else ("", [])
    if name == "peers":
        from moe.bench import peers

        peers.run(keys)
    elif name == "expert_parallel":
        from moe.bench.expert_parallel import run

        run(keys)
    elif name == "saving":
        from moe.bench.saving import run

        run(keys)
    elif name == "memory":
        from moe.bench.memory import run

        run(keys)
    elif name == "attention":
        from moe.bench.attention import bench_attention

        bench_attention(window=_window(keys))
    else:
        raise UserError(
            f"moe bench {name}: no such benchmark; one of peers, expert_parallel, saving, attention, memory"
        )


def _window(keys: list[str], default: int = 512) -> int:
    window = default
    for override in keys:
        key, _, value = override.partition("=")
        if key != "window" or not value.isdecimal() or int(value) < 1:
            raise UserError(f"moe bench attention {override}: its only key is window=N, a number of tokens ≥ 1")
        window = int(value)
    return window
