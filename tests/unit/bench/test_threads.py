"""`moe bench threads` on a tiny shape: both numbers of threads are used, the ratio is a round's, and its keys."""

from __future__ import annotations

import pytest
import torch

from moe.bench import run_bench, threads
from moe.bench.threads import ThreadTimes
from moe.errors import UserError
from tests.ranks import run_ranks
from tests.unit.bench.test_peers import SMALL


def _measured() -> tuple[list[int], list[str]]:
    """The number of threads of each step, and what is printed."""
    used, patch = list[int](), pytest.MonkeyPatch()
    step = threads.Stepper.__call__

    def counted(self: threads.Stepper) -> object:
        used.append(torch.get_num_threads())
        return step(self)

    patch.setattr(threads.Stepper, "__call__", counted)
    patch.setattr(threads, "usable_cores", lambda: 2)
    patch.setattr(threads, "measure_peak_flops", lambda device, dtype: 1e9 * torch.get_num_threads())
    before = torch.get_num_threads()
    results = threads.run(["rounds=3", "steps=1", *SMALL])
    assert torch.get_num_threads() == before
    one, two = results.tables[0].rows
    assert (one[0], two[0]) == ("1 thread", "2 threads")
    assert (one[4], two[4]) == (1, 2)
    assert all(float(row[6] or 0) > 0 for row in (one, two))
    return used, list(results.lines())


def test_both_numbers_of_threads_take_steps() -> None:
    ((used, lines),) = run_ranks(1, _measured)
    assert used == [1, 1, 2, 2, 1, 2, 2, 1, 1, 2]  # two to warm up each, then rounds that alternate
    assert ", load " in lines[3]
    assert lines[-2] == "ratio of a product 2.00"
    assert float(lines[-1].removeprefix("ratio tokens/s ")) > 0


def test_the_ratio_is_taken_inside_each_round() -> None:
    _, _, config = threads.parse([])
    times = {1: ThreadTimes([10, 100, 20], [2.0, 2, 2], 0.5), 2: ThreadTimes([15, 300, 40], [4.0, 4, 4], 0.5)}
    lines = list(threads.results(config, times).lines())
    assert lines[-4] == "2 threads ÷ 1, per round: step 1.50 to 3.00; the rounds disagree: the machine is busy"
    assert lines[-3] == "2 threads ÷ 1, per round: product 2.00 to 2.00"
    assert lines[-1] == "ratio tokens/s 2.00"


@pytest.mark.parametrize(
    ("override", "cores", "message"),
    [
        ("rounds=3", 1, "bench threads needs at least 2 cores: this process may use only 1"),
        ("threads=3", 2, "threads=3 must be 0 or from 2 to 2, the cores that this process may use"),
        ("threads=1", 4, "threads=1 must be 0 or from 2 to 4"),
        ("threads=two", 2, "threads=two must be a whole number"),
        ("steps=0", 2, "steps=0 must be ≥ 1"),
        ("model.hiden_size=3", 2, "model.hiden_size=3: no such key"),
    ],
)
def test_bad_keys_are_one_line(override: str, cores: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    with pytest.raises(UserError) as caught:
        run_bench(["threads", override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
