"""Shards of rows for fine-tuning: packing changes no row's loss, the mask is what the model writes, the split leaks
nothing, and loaders at any number of ranks see the same."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import DataConfig, LongRows, LossOn, RecordKind, TemplateName, TokenizerConfig, TokenizerKind
from moe.config.compose import load_config
from moe.data.loader import Loader, held_out_batches
from moe.data.packing import NO_TARGET, pack
from moe.data.prepare import prepare
from moe.data.readers import DataError
from moe.data.shards import PADDING
from moe.model.build import build_model

MISTRAL = TokenizerConfig(kind=TokenizerKind.mistral)
WORDS = ["ka", "lo", "mi", "Über", "😀", "日本", "x = 1\n", "tor", "</s>", "[INST]", "vex"]
LENGTH = 64


def chat(dice: random.Random) -> dict:
    def content():
        return " ".join(dice.choices(WORDS, k=dice.randrange(1, 6)))

    messages = [{"role": "system", "content": content()}] if dice.random() < 0.3 else []
    for _ in range(dice.randrange(1, 4)):
        messages += [{"role": "user", "content": content()}, {"role": "assistant", "content": content()}]
    return {"messages": messages}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path, cache, length=LENGTH, logged=None, tokenizer=MISTRAL, **keys):
    data = DataConfig(path=str(path), cache_dir=str(cache), **({"records": RecordKind.auto} | keys))
    log = (lambda line: None) if logged is None else logged.append
    return prepare(data, tokenizer, sequence_length=length, log=log)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    dice = random.Random(1)
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", [chat(dice) for _ in range(200)])


def answers(stream, tokenizer):
    """The decoded targets of each document."""
    found = []
    for index in range(stream.tokens // stream.packed_length):
        sample = pack(stream, index, stream.packed_length, 0)
        for document in range(sample.document_ids_L[sample.length - 1] + 1):
            labels = sample.labels_L[sample.document_ids_L == document]
            ids = [int(label) for label in labels if label != NO_TARGET]
            assert ids[-1] == tokenizer.eos_id
            found.append(tokenizer.decode([token for token in ids if token != tokenizer.eos_id]))
    return found


def test_targets_are_the_assistants_turns_and_their_ends(chats, tmp_path):
    logged = []
    corpus = make(chats, tmp_path, 256, logged)
    assert not any("longer than" in line for line in logged)
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    said = [[turn["content"] for turn in row if turn["role"] == "assistant"] for row in rows]
    found = answers(corpus.train[0], corpus.tokenizer) + answers(corpus.held_out[0], corpus.tokenizer)
    ids = corpus.tokenizer.encode_many([text for row in said for text in row])
    texts = iter([corpus.tokenizer.decode(one) for one in ids])
    assert sorted(found) == sorted(" ".join(next(texts) for _ in row) for row in said)
    assert corpus.train[0].targets == sum(
        int((pack(corpus.train[0], i, 256, 0).labels_L != NO_TARGET).sum())
        for i in range(corpus.train[0].tokens // 256)
    )


def test_a_prompts_own_answers_are_not_learnt(chats, tmp_path):
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    said = sorted(row[-1]["content"] for row in rows)
    for template in (TemplateName.mistral, TemplateName.plain):
        corpus = make(pairs, tmp_path, 256, template=template)
        found = sorted(
            text for stream in (*corpus.train, *corpus.held_out) for text in answers(stream, corpus.tokenizer)
        )
        assert found == said


def test_packing_changes_no_rows_loss(chats, tmp_path):
    """Against each row alone, in a sequence of its own length, through the real model."""
    corpus = make(chats, tmp_path, loss_on=LossOn.completion)
    config = load_config(
        [
            *("model.vocab_size=32000", "model.hidden_size=32", "model.intermediate_size=64", "tokenizer=mistral"),
            *("model.num_attention_heads=4", "model.num_key_value_heads=2", "model.num_hidden_layers=2", "data.path=x"),
        ]
    )
    model = build_model(config, torch.device("cpu")).double().eval()
    stream = corpus.train[0]
    checked = 0
    for index in range(6):
        sample = pack(stream, index, LENGTH, corpus.tokenizer.eos_id)
        packed = losses(model, sample.input_ids_L, sample.labels_L, sample.document_ids_L)
        for document in range(sample.document_ids_L[sample.length - 1] + 1):
            own = sample.document_ids_L == document
            alone = losses(model, sample.input_ids_L[own], sample.labels_L[own], None)
            assert np.abs(packed[own] - alone).max() <= 1e-6
            checked += int((sample.labels_L[own] != NO_TARGET).sum())
    assert checked > 50


@torch.no_grad()
def losses(model, ids, labels, documents):
    ids, labels = torch.from_numpy(ids)[None], torch.from_numpy(labels)
    documents = None if documents is None else torch.from_numpy(documents)[None]
    logits = model(ids, document_ids_BS=documents).logits_BSV[0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()


def test_rows_are_whole_and_sequences_are_full(chats, tmp_path):
    corpus = make(chats, tmp_path, 256)
    stream = corpus.train[0]
    assert stream.packed_length == 256
    assert stream.tokens % 256 == 0
    starts = set(range(0, stream.tokens, 256))
    documents = stream.document_ids(0, stream.tokens)
    firsts = {int(np.argmax(documents == number)) for number in range(stream.documents)}
    assert starts <= firsts
    filled = 1 - (stream.read(0, stream.tokens)[:-1] == corpus.tokenizer.eos_id).mean()
    assert filled > 0.85


def test_what_fills_a_sequence_is_known_and_a_document_of_its_own(chats, tmp_path):
    corpus = make(chats, tmp_path)
    stream, eos = corpus.train[0], corpus.tokenizer.eos_id
    samples = [pack(stream, index, LENGTH, eos) for index in range(stream.tokens // LENGTH)]
    filled = 0
    for sample in samples:
        if sample.length < LENGTH:  # else it may be a row that was cut
            assert sample.input_ids_L[sample.length - 1] == eos, "a row's own end is no padding"
        assert (sample.input_ids_L[sample.length :] == eos).all()
        assert (sample.labels_L[sample.length - 1 :] == NO_TARGET).all()
        documents = sample.document_ids_L
        assert set(documents[sample.length :]) <= {documents[sample.length - 1] + 1}
        filled += LENGTH - sample.length
    assert 0 < filled == (stream.mask(0, stream.tokens) == PADDING).sum()
    loader = Loader(corpus, sequence_length=LENGTH, micro_batch_size=4, global_batch_size=4, seed=0)
    batch = loader.next_step()[0]
    real_BS = torch.zeros(4, LENGTH, dtype=torch.bool)
    real_BS.view(-1)[batch.real_T] = True
    assert batch.tokens == int(real_BS.sum()) < 4 * LENGTH
    assert (batch.input_ids_BS[~real_BS] == eos).all()
    for row, real in zip(batch.input_ids_BS, real_BS, strict=True):
        assert any(np.array_equal(row, one.input_ids_L) and one.length == int(real.sum()) for one in samples)


@pytest.mark.parametrize("rule", LongRows)
def test_long_rows_are_cut_split_or_left_out_and_counted(tmp_path, rule):
    rows = [{"prompt": f"q{i}", "completion": "ka lo mi " * (40 if i % 4 == 0 else 1) + str(i)} for i in range(60)]
    logged = []
    corpus = make(write(tmp_path / "rows.jsonl", rows), tmp_path / "cache", 32, logged, long_rows=rule)
    assert any(
        line.startswith("source 'text': 15 of 60 rows are longer than train.sequence_length=32") for line in logged
    )
    whole = make(tmp_path / "rows.jsonl", tmp_path / "cache", 512)
    documents = corpus.train[0].documents + corpus.held_out[0].documents
    targets = corpus.train[0].targets + corpus.held_out[0].targets
    everything = whole.train[0].targets + whole.held_out[0].targets
    if rule is LongRows.truncate:
        assert documents == 60
        assert targets < everything
    elif rule is LongRows.split:
        assert documents > 60
        assert targets == everything  # no target is lost where a row is split
    else:
        assert documents == 45


def test_a_row_cut_before_its_answer_is_left_out_and_counted(tmp_path):
    rows = [{"prompt": "q " * (50 if i == 7 else 1), "completion": f"answer {i}"} for i in range(30)]
    logged = []
    corpus = make(write(tmp_path / "rows.jsonl", rows), tmp_path / "cache", 32, logged)
    assert corpus.train[0].documents + corpus.held_out[0].documents == 29
    assert any("1 of 30 rows left out: cut at" in line for line in logged)


def test_copies_of_a_row_are_on_one_side_whatever_their_columns(tmp_path):
    pairs = [(f"question {i}", f"answer {i}") for i in range(80)]
    rows = [{"prompt": q, "completion": a} for q, a in pairs * 3]
    random.Random(0).shuffle(rows)
    corpus = make(write(tmp_path / "rows.jsonl", rows), tmp_path / "cache", held_out=0.3)
    train = set(answers(corpus.train[0], corpus.tokenizer))
    held_out = set(answers(corpus.held_out[0], corpus.tokenizer))
    assert not train & held_out
    assert len(train | held_out) == 80
    turns = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]
    other = make(write(tmp_path / "other.jsonl", turns), tmp_path / "cache", held_out=0.3)
    assert set(answers(other.held_out[0], other.tokenizer)) == held_out


def test_the_mask_follows_loss_on(chats, tmp_path):
    counts = {rule: make(chats, tmp_path, 256, loss_on=rule).train[0].targets for rule in LossOn}
    assert counts[LossOn.last_turn] < counts[LossOn.completion] < counts[LossOn.everything]
    corpus = make(chats, tmp_path, 256, loss_on=LossOn.last_turn)
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    found = answers(corpus.train[0], corpus.tokenizer) + answers(corpus.held_out[0], corpus.tokenizer)
    last = corpus.tokenizer.encode_many([row[-1]["content"] for row in rows])
    assert sorted(found) == sorted(map(corpus.tokenizer.decode, last))


def test_what_changes_the_shards_changes_their_fingerprint(chats, tmp_path):
    variants = [
        {}, {"length": 128}, {"loss_on": LossOn.everything}, {"long_rows": LongRows.split},
        {"template": TemplateName.plain}, {"held_out": 0.2},
    ]  # fmt: skip
    assert len({make(chats, tmp_path, **keys).fingerprint for keys in variants}) == len(variants)
    assert make(chats, tmp_path, template=TemplateName.mistral).fingerprint == make(chats, tmp_path).fingerprint


def test_text_is_prepared_as_before_whatever_the_length(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"number {i}"} for i in range(50)])
    keys = {"records": RecordKind.documents}
    assert (
        make(path, tmp_path / "cache", 64, **keys).fingerprint == make(path, tmp_path / "cache", 8, **keys).fingerprint
    )


def test_loaders_of_any_number_of_ranks_see_every_sequence_once(chats, tmp_path):
    corpus = make(chats, tmp_path)
    count = corpus.train[0].tokens // LENGTH

    def labels(ranks):
        loaders = [
            Loader(corpus, sequence_length=LENGTH, micro_batch_size=1, global_batch_size=4, rank=rank, world_size=ranks,
                   seed=0)
            for rank in range(ranks)
        ]  # fmt: skip
        steps = [[batch for loader in loaders for batch in loader.next_step()] for _ in range(count // 4)]
        ordered = sorted((batch for step in steps for batch in step), key=lambda batch: int(batch.sample_ids_B[0]))
        return torch.cat([batch.labels_BS for batch in ordered])

    assert torch.equal(labels(1), labels(2))
    seen = {tuple(row.tolist()) for row in labels(1)}
    assert len(seen) == count // 4 * 4
    held_out = held_out_batches(corpus, sequence_length=LENGTH, micro_batch_size=3, max_sequences=1000)
    assert sum(int((batch.labels_BS != NO_TARGET).sum()) for batch in held_out) == corpus.held_out[0].targets


def test_a_damaged_mask_is_noticed_and_written_again(chats, tmp_path):
    corpus = make(chats, tmp_path)
    path = corpus.train[0].folder / "00000.mask"
    content = path.read_bytes()
    for damaged in (content[:-1], content.replace(b"\1", b"\3", 1), content.replace(b"\1", b"\0", 1)):
        path.write_bytes(damaged)
        logged = []
        make(chats, tmp_path, logged=logged)
        assert any("the cache is damaged" in line and "preparing again" in line for line in logged), logged
        assert path.read_bytes() == content


def test_rows_that_leave_a_split_empty_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q " * 90, "completion": f"{i}"} for i in range(5)])
    with pytest.raises(DataError, match=r"none of its 5 rows is left for the train split at train.sequence_length=64"):
        make(path, tmp_path / "cache")


def test_the_opening_is_the_first_held_out_prompt(chats, tmp_path):
    corpus = make(chats, tmp_path, 256)
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    opening = corpus.opening()
    assert opening.startswith("[INST]")
    assert opening.endswith("[/INST]")
    assert any(row[0]["content"].strip() in opening for row in rows)
    text = make(
        write(tmp_path / "text.jsonl", [{"text": f"number {i} of many"} for i in range(40)]), tmp_path / "cache"
    )
    assert text.opening().startswith("number ")


def test_the_template_is_saved_with_the_tokenizer(chats, tmp_path):
    corpus = make(chats, tmp_path)
    assert "[INST]" in corpus.tokenizer.chat_template
    assert (corpus.folder / "tokenizer" / "chat_template.jinja").read_text() == corpus.tokenizer.chat_template


def test_rows_train_a_tokenizer_and_mix_with_text(tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": f"how much is {i}", "completion": f"it is {i}"} for i in range(300)])
    (tmp_path / "text.txt").write_text("".join(f"a line of text, number {i}\n" for i in range(3000)))
    data = DataConfig(
        records=RecordKind.auto,
        cache_dir=str(tmp_path / "cache"),
        sources={
            "rows": {"path": str(tmp_path / "rows.jsonl")},
            "text": {"path": str(tmp_path / "text.txt"), "records": "documents"},
        },
    )
    tokenizer = TokenizerConfig(kind=TokenizerKind.sentencepiece, vocab_size=320)
    corpus = prepare(data, tokenizer, sequence_length=64, log=lambda line: None)
    assert [stream.packed_length for stream in corpus.train] == [64, None]
    loader = Loader(corpus, sequence_length=64, micro_batch_size=2, global_batch_size=8, seed=0)
    batches = [batch for _ in range(8) for batch in loader.next_step()]
    masked = [int((row == NO_TARGET).sum()) for batch in batches for row in batch.labels_BS[batch.source_ids_B == 0]]
    plain = [int((row == NO_TARGET).sum()) for batch in batches for row in batch.labels_BS[batch.source_ids_B == 1]]
    assert min(masked) > 20 > max(plain)
