"""`moe bench decode`: equal tokens first, then the ratio; bad overrides give one-line errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from moe.bench import decode, run_bench
from moe.bench.peer import peer_model
from moe.bench.peers import parse
from moe.model.build import build_model
from moe.sparse import Router
from moe.sparse.balance import max_violation
from tests.unit.bench.test_peers import SMALL


def test_decode_runs_and_ends_with_the_ratio(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(decode, "BATCHES", (1, 3))
    run_bench(["decode", "rounds=2", "steps=4", *SMALL, "train.sequence_length=5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("prompts:")] == [
        "prompts: 3; both sides generate the same 12 tokens",
        "prompts: 1; both sides generate the same 4 tokens",
    ]
    rows = [line.split() for line in lines if re.match(r"\s+[13]  (ours|transformers, )", line)]
    assert [row[0] for row in rows] == ["3", "3", "1", "1"]
    assert all(0 < int(ours[-2]) < int(peer[-2]) for ours, peer in (rows[:2], rows[2:]))
    assert all(0 < float(ours[-1]) == float(peer[-1]) for ours, peer in (rows[:2], rows[2:]))
    assert lines[-2].startswith("ratio tokens/s, 3 prompts: ")
    ratio = lines[-1].split()
    assert ratio[:2] == ["ratio", "tokens/s"]
    assert float(ratio[2]) > 0


def test_sides_that_generate_other_tokens_are_not_compared() -> None:
    pytest.importorskip("transformers")
    _, config = parse(SMALL)
    ours = build_model(config, torch.device("cpu")).eval()
    peer = peer_model(config).eval()
    peer.load_state_dict(ours.state_dict())
    peer.config.update({"use_cache": True, "output_router_logits": False})
    prompts = torch.randint(320, (2, 4), generator=torch.Generator().manual_seed(0))
    decode.same_tokens(ours, peer, prompts, 6)
    with torch.no_grad():
        peer.get_parameter("lm_head.weight").mul_(-1)
    with pytest.raises(RuntimeError, match="different tokens, first in prompt 0 at token 0"):
        decode.same_tokens(ours, peer, prompts, 6)


def test_max_violation_is_of_the_tokens_that_a_decoder_takes_in() -> None:
    _, config = parse(SMALL)
    ours = build_model(config, torch.device("cpu")).eval()
    prompts = torch.randint(320, (3, 4), generator=torch.Generator().manual_seed(0))
    found = decode.routing_violation(ours, prompts, 5)
    counts: dict[nn.Module, list[Tensor]] = {}
    for module in ours.modules():
        if isinstance(module, Router):  # a hook makes the model decode by its own forward pass, a token at a time
            module.register_forward_hook(lambda gate, _, output: counts.setdefault(gate, []).append(output.counts_E))
    decode.our_tokens(ours)(prompts, 5)
    decoded = [torch.stack(each[-4:]).sum(0) for each in counts.values()]  # the prompts' pass is before them
    assert [int(each.sum()) for each in decoded] == [3 * 4 * 2] * 2
    assert found == pytest.approx(float(max_violation(torch.stack(decoded)).mean()))


def test_the_ratio_is_taken_inside_each_round() -> None:
    rounds = [
        decode.Generated(ours=1, peer=2, our_first=1, peer_first=1),
        decode.Generated(ours=10, peer=30, our_first=1, peer_first=2),
        decode.Generated(ours=1, peer=4, our_first=1, peer_first=3),
    ]
    rows, note, ratio = decode.summary(rounds, 1, 10, "eager", (10, 20), 0.5)
    assert ratio == 3
    assert [row[0] for row in rows] == ["ours", "transformers, eager"]
    assert "first token 2.00 × as fast; ratio per round 2.00 to 4.00; the rounds disagree" in note


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["rounds=0"], "rounds=0 must be ≥ 1"),
        (["precision=bfloat16"], "train.precision=bfloat16 must be float32"),
        (["model=mistral_7b"], "model.mlp=dense must be sparse"),
        (["model.vocab_size=40000"], "model.vocab_size=40000 must be ≤ 35328"),
    ],
)
def test_bad_overrides_are_one_line(overrides: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace(".", r"\.")) as caught:
        run_bench(["decode", *overrides])
    assert "\n" not in str(caught.value)
