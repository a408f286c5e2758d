"""The report page: what it shows, which runs it rejects, and that nothing in it can execute or load anything."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moe.config.compose import load_config, to_yaml
from moe.errors import UserError
from moe.report import facts, palette
from moe.report.page import write_report
from moe.report.plots import Axis, Chart, Reference, Series, line_chart, value_axis
from moe.report.reader import read_run
from moe.report.rows import FRAMES
from moe.report.scales import count, downsample, linear_ticks, log_ticks, scientific, short, tick_label

OVERRIDES = """def read(path, mode='r'):
    with open(path, mode) as file:
        return file.read()

The quick brown fox. 12 + 30 = 42
"""


def shares_at(rng: np.random.Generator, layers: int, experts: int, skew: float) -> list[list[float]]:
    loads = np.exp(skew * rng.standard_normal((layers, experts)))
    return (loads / loads.sum(-1, keepdims=True)).round(6).tolist()


def metrics_line(step: int, steps: int, rng: np.random.Generator, *, layers: int = 4, experts: int = 8) -> dict:
    """The metrics of one step of a run with falling loss and a router that becomes balanced."""
    done = step / steps
    loss = 3.3 + 4.3 * math.exp(-7 * done) + 0.06 * float(rng.standard_normal())
    skew = 0.12 + 0.7 * math.exp(-9 * done)
    shares = shares_at(rng, layers, experts, skew)
    per_layer = [1 + 0.5 * skew * skew * float(rng.random() + 0.5) for _ in range(layers)]
    line = {
        "step": step,
        "tokens": step * 4096,
        "loss": loss + 0.01,
        "lm_loss": loss,
        "load_balancing_loss": float(np.mean(per_layer)),
        "router_z_loss": 4.4 - 0.9 * done,
        "grad_norm": 0.6 + 5 * math.exp(-30 * done) + 0.1 * float(rng.random()),
        "lr": 1e-3 * (min(1, step / 20) if step < 20 else 0.55 + 0.45 * math.cos(math.pi * done)),
        "tokens_per_second": 9200 + 300 * float(rng.standard_normal()) - (4000 if step == 1 else 0),
        "mfu": 0.41,
        "step_seconds": 0.44,
        "max_violation": float(np.mean([max(layer) * experts - 1 for layer in shares])),
        "router_entropy": math.log(experts) - 1.1 * done,
        "dead_experts": 3 if step < 6 else 0,
        "dropped_fraction": 0.0,
        "expert_shares": shares,
        "load_balancing_loss_layers": per_layer,
    }
    if step % max(1, steps // 6) == 0 or step == steps:
        val = loss + 0.08
        by_source = {"python": val - 0.3, "prose": val + 0.6, "arithmetic": val - 1.2}
        line |= {
            "val_loss": val,
            "val_bits_per_byte": val / 2.2,
            "val_unigram_entropy": 6.02,
            "val_loss_by_source": by_source,
        }
    return line


def fake_run(
    folder: Path, *, steps: int = 300, layers: int = 4, experts: int = 8, seed: int = 0, dense: bool = False
) -> Path:
    """A run directory like one of `moe train`, with invented metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    overrides = [
        "tracking=none",
        f"train.steps={steps}",
        f"model.num_hidden_layers={layers}",
        f"router.num_experts={experts}",
    ]
    overrides += ["model.mlp=dense"] if dense else []
    overrides += ["optim.warmup_steps=1"] if steps < 20 else []
    (folder / "config.yaml").write_text(to_yaml(load_config(overrides)), encoding="utf-8")
    router_keys = ("load_balancing_loss", "router_z_loss", "max_violation", "router_entropy", "dead_experts")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            line = metrics_line(step, steps, rng, layers=layers, experts=experts)
            if dense:
                line |= dict.fromkeys((*router_keys, "dropped_fraction"))
                line |= {"expert_shares": [], "load_balancing_loss_layers": []}
            file.write(json.dumps(line) + "\n")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for step in range(max(1, steps // 3), steps + 1, max(1, steps // 3)):
            file.write(
                json.dumps({"step": step, "prompt": "def ", "text": f"def read_{step}(path):\n    return path"}) + "\n"
            )
    if not dense:
        tokens = re.findall(r" ?\w+|\s|[^\w\s]", OVERRIDES * 8)
        ids = [[(len(token) * 3 + ord(token[-1]) + layer) % experts for token in tokens] for layer in range(layers)]
        routing = {"step": steps, "tokens": tokens, "experts": ids, "num_experts": experts}
        (folder / "routing.json").write_text(json.dumps(routing), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The parsed page: elements with their attributes, scripts, and the text a reader sees."""

    VOID = frozenset({"meta", "link", "input", "path", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self.open and self.open[-1] != "style":
            self.text += data


def report(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def test_page_shows_the_runs_metrics(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "tiny-stdlib")
    text, page = report(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert write_report(folder) == folder / "report.html"
    assert "tiny-stdlib" in page.text
    for value in (last["val_loss"], last["val_bits_per_byte"], 6.02 - last["val_loss"], last["max_violation"]):
        assert short(value) in page.text
    assert "of 300" in page.text
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "MaxVio", "Load-balancing loss"):
        assert f"<h3>{title}</h3>" in text
    for title in ("Router entropy", "Dead experts", "Dropped choices", "Validation loss by source", "Expert share"):
        assert f"<h3>{title}</h3>" in text
    assert "unigram entropy 6.020" in page.text
    assert "minimum 1" in page.text
    assert "def read_300(path)" in page.text
    assert "num_key_value_heads" in page.text
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [], "nothing left beside"


def _with_metrics(folder: Path, change: Callable[[dict], dict]) -> Path:
    path = folder / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_whatever_a_router_measured_is_charted_by_its_name(tmp_path: Path) -> None:
    """The report has no list of names: it charts every metric that is also given per layer."""
    folder = _with_metrics(
        fake_run(tmp_path / "run", steps=30),
        lambda line: (
            line | {"bias_range": 0.25, "bias_range_layers": [None, 0.125, 0.375]} if line["step"] > 10 else line
        ),
    )
    run = read_run(folder)
    assert "bias_range" in run.router_metrics
    assert np.isnan(run.series["bias_range"][:10]).all()
    assert (run.series["bias_range"][10:] == 0.25).all()
    assert (run.series["bias_range_highest_layer"][10:] == 0.375).all()
    assert "<h3>Bias range</h3>" in report(folder)[0]


def test_many_diagnostics_are_folded_and_rare_ones_have_dots(tmp_path: Path) -> None:
    names = [f"figure_{index}" for index in range(15)]

    def add(line: dict) -> dict:
        every = {name: 1.0 for name in names} | {f"{name}_layers": [0.5, 1.5] for name in names}
        churn = {"router_churn": 0.2, "router_churn_layers": [0.1, 0.3]}
        return line | every | (churn if "val_loss" in line else {}) | {"max_violation_layers": [0.1, 0.2]}

    text, _ = report(_with_metrics(fake_run(tmp_path / "run"), add))
    shown, folded = text.split("<details><summary>16 more, each by its name</summary>")
    assert "Figure 3" not in shown
    assert all(f"<h3>Figure {index}</h3>" in folded for index in range(15))
    assert "<h3>Router churn</h3>" in folded
    assert text.count("<h3>MaxVio</h3>") == 1
    assert "Max violation" not in text, "MaxVio is charted once, with its highest layer"


def test_alarms_matrices_and_pairs_are_shown(tmp_path: Path) -> None:
    alarm = {"layer": 1, "expert": 2, "metric": "load_<b>", "value": 0.97, "since": 8}
    broken = {"layer": 0, "expert": 1, "metric": "expert_weights", "value": None, "since": 9}

    def add(line: dict) -> dict:
        new = {"new_alarms": [alarm, broken]} if line["step"] == 20 else {}
        return line | {"alarms": 1} | new | {"expert_output_norm": [[0.25, None], [0.5, line["step"]]]}

    folder = _with_metrics(fake_run(tmp_path / "run", steps=30), add)
    lifts = [[[None, 0.5, 2.5], [0.5, None, 1.0], [2.5, 1.0, None]]]
    (folder / "coactivation.json").write_text(json.dumps({"step": 30, "layers": lifts}))
    text, _ = report(folder)
    assert "Step 20: <b>layer 1, expert 2</b>, load_&lt;b&gt; 0.9700, since step 8" in text
    assert "expert_weights not finite, since step 9" in text
    assert "Expert output norm, step 30" in text
    assert "<td>–</td>" in text
    assert "<td>30</td>" in text
    assert "<td>0 + 2: 2.50</td>" in text
    assert "Collapse alarms" not in report(fake_run(tmp_path / "healthy", steps=3))[0]


def test_a_coactivation_that_cant_be_read_is_named(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    (folder / "coactivation.json").write_text('{"layers": [[1, 2]]}')
    with pytest.raises(UserError, match=r"coactivation.json: layers must be a square of numbers a layer"):
        read_run(folder)


def test_a_router_without_a_balance_loss_has_no_chart_of_one(tmp_path: Path) -> None:
    gone = ("load_balancing_loss_layers", "router_z_loss", "router_entropy")
    folder = _with_metrics(
        fake_run(tmp_path / "run", steps=30),
        lambda line: {key: value for key, value in line.items() if key not in gone} | {"load_balancing_loss": None},
    )
    text, page = report(folder)
    assert "<h3>MaxVio</h3>" in text
    assert "<h3>Load-balancing loss</h3>" not in text
    assert "dense model" not in page.text


def test_a_token_that_no_expert_took_has_no_colour(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    routing = json.loads((folder / "routing.json").read_text())
    routing["experts"][0][1] = None
    (folder / "routing.json").write_text(json.dumps(routing))
    _, page = report(folder)
    spans = [a for tag, a in page.elements if tag == "span" and (a.get("class") or "").split(" ")[0] == "t"]
    assert [a["data-e"] for a in spans[:3]] == [str(routing["experts"][0][0]), "–", str(routing["experts"][0][2])]
    assert spans[1]["class"] == "t"


def test_heatmap_shows_every_share_of_the_last_step(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=3, experts=6)
    text, _ = report(folder)
    shares = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["expert_shares"]
    cells = re.findall(r"<td [^>]*>([\d.]+)</td>", text)
    assert cells == [f"{100 * share:.1f}" for layer in shares for share in layer]
    strengths = [int(percent) for percent in re.findall(r"<td [^>]*--p:(\d+)%", text)]
    assert strengths == [round(100 * min(1, abs(share * 6 - 1))) for layer in shares for share in layer]


def test_slider_holds_first_and_last_step_and_stays_small(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run"))
    assert (run.frame_steps[0], run.frame_steps[-1], len(run.frames)) == (1, 300, FRAMES)
    big = read_run(fake_run(tmp_path / "big", steps=20, layers=56, experts=256))
    assert len(big.frames) * 56 * 256 <= 60_000


def test_tokens_are_coloured_by_their_first_expert(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", experts=12)
    _, page = report(folder)
    routing = json.loads((folder / "routing.json").read_text())
    spans = [a for tag, a in page.elements if tag == "span" and (a.get("class") or "").startswith("t c")]
    assert [int(a["data-e"] or "") for a in spans] == routing["experts"][0][: len(spans)]
    assert all(a["class"] == f"t {palette.expert_class(int(a['data-e'] or ''))}" for a in spans)
    layers = [a for tag, a in page.elements if tag == "input" and a.get("name") == "layer"]
    assert len(layers) == 4


def _layers_shown(folder: Path) -> list[list[str]]:
    """The layers' numbers in the heatmap, a table of single experts, the pairs of experts, and the text's buttons."""
    text, page = report(folder)
    tables = [re.findall(r'<th scope="row">(\d+)</th>', table) for table in re.findall(r"<tbody>.*?</tbody>", text)]
    held = [json.loads(body) for attributes, body in page.scripts if attributes.get("type") == "application/json"]
    for one in held:
        if "layers" in one:
            assert [str(layer) for layer in one["layers"]] == tables[0], "what page.js names"
    assert sum("layers" in one for one in held) == 2
    fullest = re.search(r"Fullest: expert \d+ of layer (\d+) ", page.text)
    assert fullest is not None
    last = read_run(folder).frames[-1]
    assert fullest[1] == tables[0][max(range(len(last)), key=lambda place: max(last[place]))]
    return [*tables, re.findall(r'name="layer" value="\d+"[^>]*><span>(\d+)</span>', text)]


def test_layers_have_the_models_numbers(tmp_path: Path) -> None:
    """Of a model whose layers 1 and 3 are sparse; without a config.yaml that says which, they are counted."""
    folder = _with_metrics(
        fake_run(tmp_path / "run", steps=30, layers=2), lambda line: line | {"new_norm": [[1.0, 2.0], [3.0, 4.0]]}
    )
    lifts = [[[None, 0.5], [0.5, None]]] * 2
    (folder / "coactivation.json").write_text(json.dumps({"step": 30, "layers": lifts}))
    config = load_config(["model.num_hidden_layers=4", "model.sparse_layers=[3,1]"])
    (folder / "config.yaml").write_text(to_yaml(config))
    assert _layers_shown(folder) == [["1", "3"]] * 4
    for text in ("", "model: {num_hidden_layers: 4, sparse_layers: [1, 2, 3]}", "model: {unknown: 1}"):
        (folder / "config.yaml").write_text(text)
        assert _layers_shown(folder) == [["0", "1"]] * 4


PAYLOAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_text_of_the_run_is_never_markup(tmp_path: Path) -> None:
    clean, folder = fake_run(tmp_path / "clean"), fake_run(tmp_path / "<b onclick=alert(3)>&")
    config = (
        (folder / "config.yaml").read_text().replace("sample_prompt: 'def '", f"sample_prompt: {json.dumps(PAYLOAD)}")
    )
    assert "alert" in config
    (folder / "config.yaml").write_text(config + f"{json.dumps(PAYLOAD)}: 1\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 300, "prompt": PAYLOAD, "text": PAYLOAD * 2}) + "\n")
    routing = json.loads((folder / "routing.json").read_text())
    routing["tokens"][:2] = [PAYLOAD, "half a pair \ud800, a bell \a"]
    (folder / "routing.json").write_text(json.dumps(routing))
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(json.loads(last) | {"step": 301, "val_loss_by_source": {PAYLOAD: 1.0, "b": 2.0}}) + "\n")
    text, page = report(folder)
    _, expected = report(clean)
    assert page.text.count("<script>alert(1)</script>") >= 6, "shown as text, wherever the run wrote it"
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in expected.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    acting = [body for attributes, body in page.scripts if "type" not in attributes]
    assert acting == [body for attributes, body in expected.scripts if "type" not in attributes]
    for attributes, body in page.scripts:
        if attributes.get("type") == "application/json":
            json.loads(body)
    assert "\\x07" in text


def test_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    text, page = report(fake_run(tmp_path / "run"))
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "img", "base", "form"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert re.search(r"script-src 'sha256-[^']+';", policy), "only the page's own script may run"


def test_charts_tell_a_screen_reader_what_they_show(tmp_path: Path) -> None:
    _, page = report(fake_run(tmp_path / "run"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    images = [a for tag, a in page.elements if tag == "svg"]
    assert len(images) == 12
    for image in images:
        assert set((image["aria-labelledby"] or "").split()) <= set(ids)
    assert "training: from" in page.text
    canvases = [a for _, a in page.elements if a.get("class") == "canvas"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in canvases)


def test_dense_model_has_no_router_sections(tmp_path: Path) -> None:
    text, page = report(fake_run(tmp_path / "run", dense=True))
    assert page.text.count("dense model: no router") == 4  # balance, shares, text, and the MaxVio tile
    assert 'id="heat"' not in text
    assert "NaN" not in page.text
    assert "nan" not in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; train first"),
        ("", "is empty; train at least one step"),
        ('{"step": 1, "lm_l', "holds no step in its 1 line;"),
        ('{"st\n[1]\n', "holds no step in its 2 lines;"),
        ('{"loss": 1}\n[1]\n', ":1: step is missing"),
    ],
)
def test_no_step_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "metrics.jsonl"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run directory"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("routing.json", "{", "not valid JSON"),
        (
            "routing.json",
            '{"tokens": ["a"], "experts": [[8]], "num_experts": 8}',
            "experts[0] needs 1 expert ids in 0…",
        ),
        ("routing.json", '{"tokens": ["a"], "experts": [[1, 2]], "num_experts": 8}', "experts[0] needs 1 expert ids"),
        ("config.yaml", "a: [", "not readable as YAML"),
        ("config.yaml", "- a\n", "not a mapping"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report(folder)
    assert str(caught.value).startswith(str(folder / name))
    assert "\n" not in str(caught.value)


ODD_VALUES: dict[str, list[object]] = {
    "step": [True, "1", 1.5, -1, 10**400, None, {"a": 1}],
    "lm_loss": [True, "1", [1], {"a": 1}, 10**400],
    "load_balancing_loss_layers": ["x", {"a": 1}, [True], [[1]], 3],
    "expert_shares": ["x", [1, 2], [[1, 0], [1]], [[0.5, "x"]], [[2.0, -1.0]], {"a": 1}],
    "val_loss_by_source": [[1], 3, {"a": "x"}, {"a": True}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD_VALUES.items() for value in values])
def test_a_value_of_another_type_is_named_with_its_line(tmp_path: Path, key: str, value: object) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1][key] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as caught:
        write_report(folder)
    assert str(caught.value).startswith(f"{folder / 'metrics.jsonl'}:2: {key}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", "0", "-1", "true", "1.5", "[1]", "{a: 1}", "9" * 30])
@pytest.mark.parametrize("key", ["num_attention_heads", "head_dim", "hidden_size"])
def test_a_size_that_is_none_is_named(tmp_path: Path, key: str, value: str) -> None:
    """The page computes with them: num_attention_heads=0 was a division by zero."""
    folder = fake_run(tmp_path / "run", steps=3)
    (folder / "config.yaml").write_text(f"model:\n  {key}: {value}\n")
    with pytest.raises(UserError, match=rf"config.yaml: model.{key}=.* must be a whole number from 1 to 10{{9}};"):
        write_report(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "routing.json", "samples.jsonl"])
def test_a_fifo_is_refused_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: must be a regular file, not a FIFO: remove it"):
        write_report(folder)


@pytest.mark.parametrize(
    ("line", "key"),
    [('{"text": 3}', "text"), ('{"prompt": [], "text": ""}', "prompt"), ('{"step": "x", "text": ""}', "step")],
)
def test_a_sample_of_another_type_is_named(tmp_path: Path, line: str, key: str) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    (folder / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"samples.jsonl:1: {key}="):
        write_report(folder)


def test_the_report_does_not_follow_a_link(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=3)
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("report.html", f".report.{os.getpid()}.html"):
        (folder / name).symlink_to(other)
    write_report(folder)
    assert other.read_text() == "mine"


def test_torn_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=30)
    whole = read_run(folder)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    torn = [*lines[:10], b'{"step": 11, "lm_lo\xe2\x82\n', *lines[10:], lines[-1][:60]]
    (folder / "metrics.jsonl").write_bytes(b"".join(torn))
    again = read_run(folder)
    np.testing.assert_array_equal(again.steps, whole.steps)
    np.testing.assert_array_equal(again.series["lm_loss"], whole.series["lm_loss"])
    assert again.frames == whole.frames
    assert "2 unreadable lines skipped" in report(folder)[1].text


def test_steps_trained_again_count_once_with_their_last_line(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=30)
    rng = np.random.default_rng(1)
    again = [metrics_line(step, 30, rng) for step in range(21, 31)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    run = read_run(folder)
    assert run.steps.tolist() == list(range(1, 31))
    assert run.series["lm_loss"][20:].tolist() == [line["lm_loss"] for line in again]
    assert run.frames[-1] == again[-1]["expert_shares"]
    assert "10 lines replaced" in report(folder)[1].text


def test_values_that_are_not_finite_leave_a_gap_and_a_note(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=40)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[9]["lm_loss"], lines[10]["lm_loss"], lines[20]["grad_norm"] = math.nan, None, math.inf
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, page = report(folder)
    assert "2 of 40 steps have no finite value here." in page.text
    loss = re.search(r'id="loss".*?class="line s0" d="([^"]+)"', text, re.DOTALL)
    assert loss is not None
    assert loss[1].count("M") == 2, "the curve is interrupted"


def test_only_metrics_and_one_step(tmp_path: Path) -> None:
    """The minimal run directory gives a page too."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 7.5}')
    text, page = report(tmp_path)
    assert "no config.yaml" in page.text.lower()
    assert "dense model: no router" in page.text
    assert 'class="dots s0"' in text


def test_long_runs_stay_small(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    fake_run(folder, steps=2)
    rng = np.random.default_rng(0)
    pattern = [metrics_line(step, 1000, rng) for step in range(1, 1001)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            line = pattern[(step - 1) // 100] | {"step": step}
            if step == 54_321:
                line |= {"lm_loss": 31.25}
            file.write(json.dumps(line) + "\n")
    text, page = report(folder)
    assert len(text.encode()) < 2_000_000
    assert "100,000" in page.text
    assert "mean of about 209 steps" in page.text
    assert "highest 31.25" in page.text, "one spike among 100,000 steps is still told and drawn"


def test_downsampling_keeps_mean_and_range() -> None:
    steps, values = np.arange(1, 10_001), np.random.default_rng(0).standard_normal(10_000)
    values[7] = math.nan
    points = downsample(steps, values, limit=100)
    assert len(points.steps) == 100
    assert (points.steps[0], points.steps[-1], points.stride) == (1, 10_000, 100)
    chunks = values.reshape(100, 100)
    np.testing.assert_allclose(points.values, np.nanmean(chunks, axis=1))
    np.testing.assert_array_equal(points.low, np.nanmin(chunks, axis=1))
    np.testing.assert_array_equal(points.high, np.nanmax(chunks, axis=1))
    few = downsample(steps, np.where(steps % 500 == 0, 1.0, math.nan), sparse=True)
    assert few.steps.tolist() == list(range(500, 10_001, 500))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.31, 7.62), (0, 1e-3), (0.99, 1.02), (-3, 4), (1, 100_000), (0, 46e9)]
)
def test_ticks_are_round_few_and_told_apart(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high * (1 + 1e-9)
    gaps = np.diff(ticks)
    np.testing.assert_allclose(gaps, gaps[0])
    mantissa = gaps[0] / 10 ** math.floor(math.log10(gaps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6
    labels = [tick_label(tick, ticks) for tick in ticks]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 7


def test_numbers_read_well() -> None:
    assert [tick_label(tick, [0, 2.5e-4, 5e-4]) for tick in (0, 2.5e-4, 5e-4)] == ["0", "2.5e-4", "5e-4"]
    assert [tick_label(tick, [0, 50_000, 100_000]) for tick in (0, 50_000)] == ["0", "50k"]
    assert [short(value) for value in (3.14159, 0.0123456, 12345.6, math.nan, 0, 6e-5)] == [
        "3.142",
        "0.01235",
        "12,346",
        "–",
        "0",
        "6e-5",
    ]
    assert [count(value) for value in (812, 46_702_792_704, 12_879_925_248, 1_886_000, 9200, 99_960)] == [
        "812",
        "46.7 B",
        "12.9 B",
        "1.89 M",
        "9,200",
        "100 k",
    ]
    assert scientific(1e-10) == "1e-10"
    assert log_ticks(0.1, 100) == pytest.approx([0.1, 1, 10, 100])
    assert log_ticks(0.4, 20) == pytest.approx([0.5, 1, 2, 5, 10, 20])


def test_axis_holds_curve_and_reference_and_quiet_series_stay_flat() -> None:
    steps = np.arange(1, 11)
    noise = 1 + 1e-9 * np.arange(10)
    chart = Chart("t", "u", [Series("a", downsample(steps, noise))], [Reference("r", 1.0)], least_span=0.02)
    axis = value_axis(chart)
    assert axis.high - axis.low >= 0.02
    constant = value_axis(Chart("t", "u", [Series("a", downsample(steps[:1], np.array([1.5423])))]))
    assert len({tick_label(tick, constant.ticks) for tick in constant.ticks}) == len(constant.ticks) > 1
    loss = Chart("t", "u", [Series("a", downsample(steps, np.linspace(7, 3, 10)))], [Reference("r", 9.0)])
    assert value_axis(loss).low < 3 < 9 < value_axis(loss).high
    assert Axis(1, 100, [], log=True).place(10) == pytest.approx(0.5)
    spiky = Chart("t", "u", [Series("a", downsample(steps, np.array([1.0] * 9 + [500])))], may_log=True)
    assert value_axis(spiky).log
    assert line_chart(Chart("t", "u", [Series("a", downsample(steps, np.full(10, math.nan)))]), "k") == ""


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        ("mistral_7b", 7_241_732_096, 7_241_732_096),
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
    ],
)
def test_parameter_counts_are_the_published_ones(tmp_path: Path, model: str, total: int, active: int) -> None:
    folder = fake_run(tmp_path / "run", steps=1)
    (folder / "config.yaml").write_text(to_yaml(load_config([f"model={model}"])))
    found = facts.parameters(read_run(folder))
    assert found is not None
    assert (found.total, found.active) == (total, active)


# Simulated dichromacy, linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.0
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear_rgb(colour: str) -> np.ndarray:
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's perceptual space: a distance of about 0.02 is just seen."""
    lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    lab = [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(rgb, 0, 1))


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""
    low, high = sorted(float(linear_rgb(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("fills", [palette.EXPERT_FILLS_LIGHT, palette.EXPERT_FILLS_DARK], ids=["light", "dark"])
def test_expert_colours_differ_with_every_colour_vision(fills: tuple[str, ...], sight: str) -> None:
    seen = [oklab(np.array(SIGHT[sight]) @ linear_rgb(fill)) for fill in fills]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 0.06


def test_text_is_readable_on_every_expert_colour() -> None:
    assert min(contrast(fill, palette.INK_LIGHT) for fill in palette.EXPERT_FILLS_LIGHT) >= 4.5
    assert min(contrast(fill, palette.INK_DARK) for fill in palette.EXPERT_FILLS_DARK) >= 4.5
