"""Best-fit packing of documents: what must not change, whatever the documents and the way they come."""

import json
import random

import numpy as np
import pytest
import torch

from moe.config import DataConfig, Packing, TokenizerConfig, TokenizerKind
from moe.data import file_parts, parts
from moe.data.bins import MOST_OPEN, WINDOW
from moe.data.document_packing import DocumentPacker
from moe.data.loader import Loader, held_out_batches
from moe.data.packing import NO_TARGET, pack
from moe.data.prepare import prepare
from moe.data.readers import DataError
from moe.data.shards import OFFSET, PADDING, StreamWriter, TokenStream

LENGTH = 32
EOS = 1
DTYPE = np.dtype("<u2")
MISTRAL = TokenizerConfig(kind=TokenizerKind.mistral)


def documents_of(seed, count=600, length=LENGTH):
    """Documents of distinct tokens, as far as 16 bits reach; some have as many as a sequence, or one more or less."""
    dice, number, made = random.Random(seed), 2, []
    for _ in range(count):
        size = dice.choice([2, 3, length - 1, length, length + 1, 2 * length - 1, 2 * length, dice.randrange(2, 200)])
        made.append(np.arange(number, number + size) % 65_000 + 2)
        number += size
    return made


def packed(folder, documents, length=LENGTH, part=10**9):
    """The packed stream of these documents, whose ids come in calls of `part`."""
    packer = DocumentPacker(StreamWriter(folder, DTYPE, packed_length=length), length, EOS)
    ids, starts = np.concatenate(documents).astype(DTYPE), np.cumsum([0, *map(len, documents)])[:-1]
    for first in range(0, len(ids), part):
        here = ids[first : first + part]
        packer.write_documents(here.tobytes(), starts[(starts >= first) & (starts < first + len(here))] - first)
    entry = packer.close()
    return TokenStream(folder, entry, DTYPE, 1 << 16), packer


def pieces_of(stream):
    """The ids of each piece, in the order in which they are stored, without padding."""
    found = []
    for index in range(stream.tokens // stream.packed_length):
        sample = pack(stream, index, stream.packed_length, EOS)
        assert (sample.input_ids_L[sample.length :] == EOS).all()
        assert (sample.labels_L[sample.length :] == NO_TARGET).all()
        for number in range(sample.document_ids_L[: sample.length].max() + 1):
            own = (sample.document_ids_L == number) & (np.arange(stream.packed_length) < sample.length)
            ids, labels = sample.input_ids_L[own], sample.labels_L[own]
            assert labels[:-1].tolist() == ids[1:].tolist()
            assert labels[-1] == NO_TARGET, "the next token is another document's"
            found.append(ids.tolist())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_only_longer_documents_are_cut_and_every_target_comes_once(tmp_path, seed):
    documents = documents_of(seed)
    stream, packer = packed(tmp_path, documents)
    found = pieces_of(stream)
    expected = []
    for document in map(np.ndarray.tolist, documents):
        if len(document) <= LENGTH:
            expected.append(document)
            continue
        cut = [document[start : start + LENGTH] for start in range(0, len(document) - 1, LENGTH - 1)]
        assert [token for piece in cut for token in piece[1:]] == document[1:]
        expected += cut
    assert sorted(found) == sorted(expected)
    assert stream.targets == sum(len(document) - 1 for document in documents)
    assert packer.documents == len(documents)
    assert packer.cut == sum(len(document) > LENGTH for document in documents)
    padding = int((stream.mask(0, stream.tokens) == PADDING).sum())
    assert padding == stream.tokens - sum(map(len, expected))
    assert padding < 0.05 * stream.tokens
    assert f"{padding / stream.tokens:.2%} of the sequences is padding" in packer.describe()


@pytest.mark.parametrize("part", [1, 7, 1000])
def test_the_calls_that_ids_come_in_change_no_byte(tmp_path, part):
    documents = documents_of(5, 150)
    whole, parts = (packed(tmp_path / name, documents, part=size)[0] for name, size in (("a", 10**9), ("b", part)))
    assert [path.read_bytes() for path in whole.files] == [path.read_bytes() for path in parts.files]


def test_only_so_many_pieces_are_held(tmp_path):
    """Also of a document that never ends: all but its last piece are written as they come."""
    writer = StreamWriter(tmp_path, DTYPE, packed_length=LENGTH)
    packer, most = DocumentPacker(writer, LENGTH, EOS), (WINDOW + MOST_OPEN) * LENGTH
    for number in range(4000):
        packer.write_documents(np.full(20, 5, DTYPE).tobytes(), np.zeros(1, OFFSET))
        assert 20 * (number + 1) - writer.tokens <= most
    held = 20 * 4000 - writer.tokens
    for number in range(100):
        packer.write(np.full(1000, 6, DTYPE))
        assert 20 * 4000 + 1000 * (number + 1) - writer.tokens <= held + LENGTH
    packer.abandon()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = (" ".join(dice.choices(["ka", "lo", "mi", "vex", "tor"], k=dice.randrange(1, 60))) for _ in range(500))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(path, cache, packing=Packing.best_fit, length=LENGTH, **keys):
    data = DataConfig(path=str(path), cache_dir=str(cache), held_out=0.2, packing=packing, **keys)
    return prepare(data, MISTRAL, sequence_length=length, log=lambda line: None)


@pytest.fixture(scope="module")
def corpus(rows, tmp_path_factory):
    return make(rows, tmp_path_factory.mktemp("cache"))


def loaders(corpus, ranks, consumed=0):
    made = [
        Loader(
            corpus, sequence_length=LENGTH, micro_batch_size=2, global_batch_size=8, rank=rank, world_size=ranks, seed=3
        )
        for rank in range(ranks)
    ]
    for loader in made:
        loader.consumed = consumed
    return made


def micro_batches(loaders):
    """The next step's, in their order."""
    parts = [loader.next_step() for loader in loaders]
    return [part[index] for index in range(len(parts[0])) for part in parts]


def equal(one, other):
    names = ("input_ids_BS", "labels_BS", "document_ids_BS", "sample_ids_B", "real_T")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def test_ranks_share_the_same_batches_and_a_resume_at_any_step_goes_on_with_them(corpus):
    (alone,) = loaders(corpus, 1)
    steps = alone.epoch_samples // 8 + 3  # into the second epoch
    whole = [micro_batches([alone]) for _ in range(steps)]
    assert any(batch.real_T is not None for step in whole for batch in step)
    for ranks in (2, 4):
        running = loaders(corpus, ranks)
        for expected in whole:
            assert all(map(equal, expected, micro_batches(running)))
    for step in range(steps):
        assert all(map(equal, whole[step], micro_batches(loaders(corpus, 2, consumed=8 * step))))


def test_an_epoch_has_every_sequence_once(corpus):
    (loader,) = loaders(corpus, 1)
    count = loader.epoch_samples
    assert count == corpus.train[0].tokens // LENGTH
    rows = [
        tuple(ids.tolist()) + tuple(labels.tolist())
        for _ in range(-(-2 * count // 8))
        for batch in loader.next_step()
        for ids, labels in zip(batch.input_ids_BS, batch.labels_BS, strict=True)
    ]
    stream = corpus.train[0]
    samples = (pack(stream, index, LENGTH, corpus.tokenizer.eos_id) for index in range(count))
    stored = sorted(tuple(one.input_ids_L.tolist()) + tuple(one.labels_L.tolist()) for one in samples)
    first, second = rows[:count], rows[count : 2 * count]
    assert sorted(first) == sorted(second) == stored
    assert first != second, "in another order"


def test_held_out_text_and_the_training_tokens_are_those_of_concat(rows, corpus, tmp_path):
    concat = make(rows, tmp_path, Packing.concat)
    assert concat.fingerprint != corpus.fingerprint
    batches = [
        held_out_batches(one, sequence_length=LENGTH, micro_batch_size=4, max_sequences=10_000)
        for one in (concat, corpus)
    ]
    assert all(map(equal, *batches))
    assert [path.read_bytes() for path in concat.held_out[0].files] == [
        path.read_bytes() for path in corpus.held_out[0].files
    ]
    assert corpus.train[0].packed_length == LENGTH
    assert concat.train[0].packed_length is None
    assert corpus.train[0].targets == concat.train[0].tokens - concat.train[0].documents
    assert corpus.train[0].bytes == concat.train[0].bytes


@pytest.mark.timeout(100)
@pytest.mark.parametrize("processes", [1, 2])
def test_shards_are_the_same_for_any_number_of_processes_and_parts(rows, corpus, tmp_path, monkeypatch, processes):
    for name, size in (("whole", parts.PART_BYTES), ("cut", 3000)):
        monkeypatch.setattr(parts, "PART_BYTES", size)
        monkeypatch.setattr(file_parts, "PART_BYTES", size)
        other = make(rows, tmp_path / name, processes=processes)
        assert other.fingerprint == corpus.fingerprint
        assert [path.read_bytes() for path in other.train[0].files] == [
            path.read_bytes() for path in corpus.train[0].files
        ]


def test_shards_depend_on_the_packing_and_then_on_the_length(rows, corpus, tmp_path):
    longer = make(rows, tmp_path, length=2 * LENGTH)
    assert longer.fingerprint != corpus.fingerprint
    assert longer.train[0].packed_length == 2 * LENGTH
    fingerprints = {make(rows, tmp_path, Packing.concat, length).fingerprint for length in (LENGTH, 2 * LENGTH)}
    assert len(fingerprints) == 1
    with pytest.raises(DataError, match=r"train.sequence_length=1 must be ≥ 2 with data.packing=best_fit"):
        make(rows, tmp_path, length=1)
