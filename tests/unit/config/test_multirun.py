"""The jobs that `moe train -m` makes of overrides."""

from __future__ import annotations

import pytest

from moe.config.multirun import expand, split_hydra


def test_the_first_keys_values_change_slowest() -> None:
    assert expand(["router=topk", "optim.lr=1e-3,2e-3", "router.top_k=range(1,3)"]) == [
        ["router=topk", "optim.lr=0.001", "router.top_k=1"],
        ["router=topk", "optim.lr=0.001", "router.top_k=2"],
        ["router=topk", "optim.lr=0.002", "router.top_k=1"],
        ["router=topk", "optim.lr=0.002", "router.top_k=2"],
    ]


def test_lists_and_paths_are_one_value() -> None:
    plain = ["optim.betas=[0.9,0.95]", "data.path=my file(1).txt"]
    assert expand(plain) == [plain]


def test_an_interval_has_no_list_of_values() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr=interval\(0,1\): interval\(…\) has no list of values"):
        expand(["optim.lr=interval(0,1)"])


def test_of_hydras_settings_only_the_launcher_is_read() -> None:
    own, rest = split_hydra(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "model=tiny"])
    assert (own, rest) == (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["model=tiny"])
    with pytest.raises(ValueError, match=r"hydra\.job\.name=x: of Hydra's own settings only"):
        split_hydra(["hydra.job.name=x"])
