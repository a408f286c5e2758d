"""Names and shapes decide where a metric goes: a new one needs no entry."""

from __future__ import annotations

from moe.train.panels import Matrix, panels


def test_each_shape_has_its_panel() -> None:
    metrics = {
        "step": 3, "time": 1.0, "lm_loss": 2.0, "mfu": 0.5, "val_loss": 4.0, "val_new": {"prose": 5.0, "code": None},
        "new_entropy": 0.25, "new_entropy_layers": [0.5, None], "new_overlap_layers": [0.2],
        "new_bias": [[0.0, 1.0], [None, 2.0]], "expert_shares": [], "empty": [[None]], "note": "text", "absent": None,
    }  # fmt: skip
    scalars = {"train/lm_loss": 2.0, "speed/mfu": 0.5, "val/loss": 4.0, "val/new/prose": 5.0}
    scalars |= {"balance/new_entropy": 0.25}
    assert panels(metrics, layers=[1, 3], detailed=False) == scalars
    details = {"layers/new_entropy_01": 0.5, "layers/new_overlap_01": 0.2}
    details |= {"experts/new_bias": Matrix([[0.0, 1.0], [None, 2.0]])}
    assert panels(metrics, layers=[1, 3], detailed=True) == scalars | details
    all_known = panels({"new_entropy_layers": [0.5, 0.75]}, layers=[1, 3], detailed=True)
    assert all_known == {"layers/new_entropy_01": 0.5, "layers/new_entropy_03": 0.75}, "the model's numbers"
