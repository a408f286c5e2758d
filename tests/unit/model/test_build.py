"""Models built on the meta device, allocated on their device and filled once: values, tied weights, buffers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from moe.config import Config
from moe.config.compose import load_config
from moe.model import build, initialize
from moe.model.build import build_model, empty_model
from moe.model.transformer import Transformer

CPU = torch.device("cpu")
SMALL = [
    "model=tiny",
    "model.vocab_size=300",
    "tokenizer.vocab_size=300",
    "model.num_hidden_layers=2",
    "model.initializer=normal",
]


def config_of(*overrides: str) -> Config:
    return load_config([*SMALL, *overrides])


@pytest.mark.parametrize("overrides", [[], ["model.mlp=dense"], ["model.tie_word_embeddings=true"]], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_weights_are_those_of_a_model_made_at_once(overrides: list[str], threads: int, monkeypatch) -> None:
    monkeypatch.setattr(initialize, "_threads", lambda: threads)
    config = config_of(*overrides, "train.seed=7")
    model = build_model(config, CPU)
    at_once = Transformer(config.model, config.router, config.experts)
    for name, parameter in at_once.named_parameters():  # drawn by the definition, one parameter after another
        values = model.get_parameter(name)
        if name.endswith("norm.weight"):
            assert torch.equal(values, torch.ones_like(values))
        elif ".experts." in name:
            for expert, mine in enumerate(values):
                assert torch.equal(mine, drawn(parameter[expert], f"7/{name}/{expert}")), name
        else:
            assert torch.equal(values, drawn(parameter, f"7/{name}")), name
    assert model.state_dict().keys() == at_once.state_dict().keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.model.tie_word_embeddings


def drawn(like: torch.Tensor, text: str) -> torch.Tensor:
    import hashlib

    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    return torch.empty(like.shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))


def test_other_dtypes_get_the_same_values_rounded() -> None:
    config = config_of()
    model, wide = build_model(config, CPU).bfloat16(), build_model(config, CPU)
    model.init_weights(config.train.seed)
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16())


def test_building_a_model_loads_no_compiler() -> None:
    program = (
        "import sys, torch\n"
        "from moe.config.compose import load_config\n"
        "from moe.model.build import build_model\n"
        f"build_model(load_config({SMALL!r}), torch.device('cpu'))\n"
        "assert not {'torch._dynamo', 'torch._inductor.compile_fx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=100, check=True)


class WithBuffer(nn.Module):
    def __init__(self, *, resets: bool) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(4))
        if resets:
            self.reset_buffers = lambda: self.bias.fill_(0.5)


@pytest.mark.parametrize("resets", [True, False])
def test_buffers_get_their_initial_values(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffered(Transformer):
        def __init__(self, *args: object, **keywords: object) -> None:
            super().__init__(*args, **keywords)
            self.model.layers[0].extra = WithBuffer(resets=resets)

    monkeypatch.setattr(build, "Transformer", Buffered)
    if not resets:
        with pytest.raises(
            AssertionError, match=r"model.layers.0.extra \(WithBuffer\) has buffers but no reset_buffers"
        ):
            empty_model(config_of(), CPU)
        return
    assert build_model(config_of(), CPU).model.layers[0].extra.bias.tolist() == [0.5] * 4


def test_ranks_of_one_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialize, "usable_cpus", lambda: 24)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert initialize._threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "48")
    assert initialize._threads() == 1
