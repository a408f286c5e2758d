"""What an adapter in peft's format can't hold is refused before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe.adapters.attach import attach
from moe.adapters.merge import is_part
from moe.config.compose import load_config
from moe.errors import UserError
from moe.interop import peft_adapter
from moe.interop.peft_adapter import CONFIG, export_adapter
from moe.interop.tensor_files import TensorInfo
from moe.model.transformer import Transformer
from tests.e2e.conftest import SMALL


class Trained:
    """A checkpoint's tensors, those of an adapter that was never trained."""

    def __init__(self, model: Transformer) -> None:
        self._tensors = {name: value.detach() for name, value in model.named_parameters() if is_part(name)}
        self.read = self._tensors.__getitem__

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in self._tensors.items()}


@pytest.mark.parametrize("others", ["", "up_proj", "gate_proj", "down_proj", "gate", "experts"])
def test_dora_on_a_part_of_the_modules(others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ",".join(["q_proj", *filter(None, [others])])
    words = ["model.n_shared_experts=1", "adapter=lora", "adapter.use_dora=true", f"adapter.target_modules=[{targets}]"]
    config = load_config([*SMALL, *words, "init_from=base"])
    model = Transformer(config.model, config.router, config.experts)
    attach(model, config.adapter, 0)
    monkeypatch.setattr(peft_adapter, "CheckpointTensors", lambda _: Trained(model))
    path = tmp_path / "adapter"
    if not others:
        export_adapter(tmp_path, config, tmp_path, path)
        assert json.loads((path / CONFIG).read_text())["use_dora"] is True
        return
    with pytest.raises(UserError, match=re.escape("adapter.use_dora=True: peft has DoRA on all modules or none")):
        export_adapter(tmp_path, config, tmp_path, path)
    assert not path.exists()
