"""Our model for the harness = the harness's own class on the exported model, request by request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
from moe.config import EvaluateConfig, ExportConfig, ImportConfig, TemplateName
from moe.data.chat_templates import OURS
from moe.data.tokenizer import load_saved
from moe.distributed import rendezvous
from moe.distributed.mesh import Mesh
from moe.errors import UserError
from moe.interop.exporting import run_export
from moe.interop.importing import run_import
from tests.ranks import run_ranks
from tests.unit.interop.made import hub_model, small_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from moe.evaluate.harness_model import HarnessModel

ALONE = Mesh(0, 1, 0, 1, 1, torch.device("cpu"))
LONG = "def read(path):\n    return json.loads(path.read_text())\n" * 8  # more tokens than the model's positions
PAIRS = [
    ("", "import json"),
    ("def ", "read"),
    ("The answer is", " 1"),
    ("The answer is", " 2"),
    ("The answer is", " 25 of them"),
    ("for key in ", "value.items():"),
    (LONG, " # the end"),
    ("x", " = 'a b'"),
]
TEXTS = ["", "x", "json.loads of a text\n", LONG, LONG * 2 + "end"]


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, 0, ("made", place, 1)) for place, one in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a checkpoint, the Hugging Face folder that it is exported to)."""
    folder = tmp_path_factory.mktemp("exported")
    model, tokenizer = hub_model("mixtral", vocab_size=500), small_tokenizer()
    with torch.no_grad():  # bytes, which need not make characters, become improbable
        model.lm_head.weight[3:259] = 0
    model.save_pretrained(folder / "hub")
    (folder / "hub/tokenizer.model").write_bytes(tokenizer.files()["tokenizer.model"])
    run_import(ImportConfig(checkpoint=str(folder / "hub"), run_dir=str(folder / "run")))
    run_export(ExportConfig(checkpoint=str(folder / "run"), path=str(folder / "out")), print)
    return folder / "run", folder / "out"


def ours(run: Path, mesh: Mesh = ALONE, template: str | None = None, **settings: Any) -> HarnessModel:
    folder = resolve(run)
    tokenizer = load_saved(tokenizer_folder(folder))
    tokenizer.chat_template = template
    config = EvaluateConfig(checkpoint=str(run), tasks="made", batch_size=3, max_gen_toks=12, **settings)
    return HarnessModel(read_model(folder), tokenizer, mesh, config)


def theirs(out: Path, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    with pytest.MonkeyPatch.context() as patch:  # left by other tests, they look like a launch by torchrun
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        return HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=3, **settings)


def test_log_likelihoods(exported: tuple[Path, Path]) -> None:
    run, out = exported
    requests = asked("loglikelihood", *PAIRS)
    found, expected = ours(run).loglikelihood(requests), theirs(out).loglikelihood(requests)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_rolling_log_likelihoods_with_one_beginning(exported: tuple[Path, Path]) -> None:
    run, out = exported
    requests = asked("loglikelihood_rolling", *[(text,) for text in TEXTS])
    found = ours(run).loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs(out, add_bos_token=False).loglikelihood_rolling(requests), abs=1e-4)
    assert found[0] == 0
    assert found != pytest.approx(theirs(out).loglikelihood_rolling(requests), abs=1e-4)  # two of them


def test_texts(exported: tuple[Path, Path]) -> None:
    run, out = exported
    ways = [(["\n"], 20), ([], 5), (["e", "self"], 12)]
    stated = [{"until": until, "max_gen_toks": most} for until, most in ways]
    prompts = ["def ", "import json\n", "x", LONG]
    requests = asked("generate_until", *[(prompt, dict(one)) for one in stated for prompt in prompts])
    found = ours(run).generate_until(requests)
    assert found == theirs(out).generate_until(requests)
    assert len(set(found)) > 5


def test_a_greedy_text_that_repeats_less(exported: tuple[Path, Path]) -> None:
    run, out = exported
    stated = {"until": [], "max_gen_toks": 20}
    ways = [stated, stated | {"repetition_penalty": 3.0}, stated | {"top_k": 1, "top_p": 0.5}]
    requests = asked("generate_until", *[("import json\n", dict(one)) for one in ways])
    found = ours(run).generate_until(requests)
    assert found == theirs(out).generate_until(requests)
    assert found[0] == found[2] != found[1]


def test_conversations(exported: tuple[Path, Path]) -> None:
    run, out = exported
    template = OURS[TemplateName.mistral]
    mine, hf = ours(run, template=template, apply_chat_template=True), theirs(out)
    hf.tokenizer.chat_template = template
    history = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    history += [{"role": "user", "content": "def read"}]
    texts = [mine.apply_chat_template(history), mine.apply_chat_template([history[0]])]
    assert texts == [hf.apply_chat_template(history), hf.apply_chat_template([history[0]])]
    begun = [history[0], {"role": "assistant", "content": "It is"}]
    texts.append(mine.apply_chat_template(begun, add_generation_prompt=False))
    assert texts[2] == hf.apply_chat_template(begun, add_generation_prompt=False)
    pairs = asked("loglikelihood", *[(text, answer) for text in texts for answer in ("because", " 25")])
    found, expected = mine.loglikelihood(pairs), hf.loglikelihood(pairs)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    requests = asked("generate_until", *[(text, {"until": ["\n"], "max_gen_toks": 12}) for text in texts])
    assert mine.generate_until(requests) == hf.generate_until(requests)


def test_a_templates_token_ends_a_text(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ChatML's <|im_end|>, where the sequence's end is another token: here it is what the model writes third."""
    source = "{% for m in messages %}{{ m.content }}{{ '<end>' if m.role == 'assistant' else '\\n' }}{% endfor %}"
    tokenizer = small_tokenizer()
    specials = tokenizer.special_tokens()
    monkeypatch.setattr(type(tokenizer), "special_tokens", lambda _: specials | {"<end>": end})

    def text(asked_for: int) -> str:
        mine = ours(exported[0], template=source, apply_chat_template=True)
        prompt = mine.apply_chat_template([{"role": "user", "content": "def read"}])
        [found] = mine.generate_until(asked("generate_until", (prompt, {"until": [], "max_gen_toks": asked_for})))
        return found

    end = tokenizer.bos_id
    begun, third = text(2), text(3)
    [end] = tokenizer.encode(third.removeprefix(begun))
    assert text(12) == begun != third


def test_a_special_token_in_a_content_is_text(exported: tuple[Path, Path]) -> None:
    mine = ours(exported[0], template=OURS[TemplateName.mistral], apply_chat_template=True)
    ids = mine._prompt_ids(mine.apply_chat_template([{"role": "user", "content": "what is </s>?"}]))
    assert mine.eot_token_id not in ids
    assert ids.count(mine.prefix_token_id) == 1


def on_ranks(run: Path) -> list[Any]:
    mesh = rendezvous.start(1)
    lm = ours(run, mesh)
    sampled = {"until": [], "do_sample": True, "temperature": 0.8, "max_gen_toks": 8}
    found = [
        lm.loglikelihood(asked("loglikelihood", *PAIRS)),
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in TEXTS])),
        lm.generate_until(asked("generate_until", *[(text, dict(sampled)) for text in TEXTS[1:]])),
    ]
    rendezvous.stop()
    return found


def test_two_ranks_answer_as_one_does(exported: tuple[Path, Path]) -> None:
    [alone] = run_ranks(1, on_ranks, exported[0])
    assert run_ranks(2, on_ranks, exported[0]) == [alone, alone]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("why", ""), "task made, document 0: what is to be scored is empty"),
        ("loglikelihood", ("", LONG), "must be 1 to model.max_position_embeddings=96"),
        ("generate_until", ("x", {"max_gen_toks": 96}), "max_gen_toks=96 must be less than model.max_position_emb"),
        ("generate_until", ("x", {"num_beams": 4}), "document 0: generation_kwargs: num_beams: not an option here"),
        ("generate_until", ("x", {"max_gen_toks": "many"}), "document 0: generation_kwargs: "),
        ("generate_until", ("x", {"do_sample": True, "temperature": -1.0}), "temperature=-1.0 must be"),
    ],
)
def test_requests_that_can_not_be_answered(
    exported: tuple[Path, Path], kind: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(ours(exported[0]), kind)(asked(kind, arguments))


def test_a_tokenizer_without_a_template(exported: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="apply_chat_template=true: the checkpoint's tokenizer has no chat template"):
        ours(exported[0], apply_chat_template=True)


def test_weights_that_are_not_finite(exported: tuple[Path, Path]) -> None:
    lm = ours(exported[0])
    with torch.no_grad():
        lm._model.lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        lm.loglikelihood(asked("loglikelihood", *PAIRS[:1]))
    assert lm.answering
