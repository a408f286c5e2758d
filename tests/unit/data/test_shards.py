"""Token shards and packing, compared with plain Python lists."""

import hashlib
import os

import numpy as np
import pytest

from moe.data.packing import NO_TARGET, full_samples, pack
from moe.data.readers import DataError
from moe.data.shards import StreamWriter, TokenStream, token_dtype

DOCUMENTS = [[1, 10, 11, 2], [1, 2], [1, *range(20, 33), 2], [1, 40, 2]]
FLAT = [token for document in DOCUMENTS for token in document]
OWNER = [number for number, document in enumerate(DOCUMENTS) for _ in document]


def write(folder, shard_tokens=1 << 20, vocab_size=50):
    writer = StreamWriter(folder, token_dtype(vocab_size), shard_tokens)
    for document in DOCUMENTS:
        writer.start_document()
        writer.write(document[:1])
        writer.write(document[1:])
    writer.bytes = 7
    meta = writer.close()
    return TokenStream(folder, meta, token_dtype(vocab_size), vocab_size)


@pytest.mark.parametrize("shard_tokens", [1, 3, 5, len(FLAT), 100])
@pytest.mark.parametrize("vocab_size", [50, 70_000])
def test_any_range_of_tokens_at_any_shard_size(tmp_path, shard_tokens, vocab_size):
    stream = write(tmp_path, shard_tokens, vocab_size)
    assert (stream.tokens, stream.documents, stream.bytes) == (len(FLAT), len(DOCUMENTS), 7)
    assert len(list(tmp_path.glob("0*.bin"))) == -(-len(FLAT) // shard_tokens)
    for start in range(len(FLAT)):
        for stop in range(start + 1, len(FLAT) + 1):
            assert stream.read(start, stop).tolist() == FLAT[start:stop]
            assert stream.document_ids(start, stop).tolist() == [n - OWNER[start] for n in OWNER[start:stop]]


def test_the_beginning_of_a_document(tmp_path):
    stream = write(tmp_path, 5)
    for limit in (1, 3, 100):
        assert [stream.document(index, limit).tolist() for index in range(4)] == [one[:limit] for one in DOCUMENTS]


def test_bytes_on_disk_are_little_endian(tmp_path):
    write(tmp_path / "narrow")
    write(tmp_path / "wide", vocab_size=70_000)
    assert (tmp_path / "narrow" / "00000.bin").read_bytes()[:4] == b"\x01\x00\x0a\x00"
    assert (tmp_path / "wide" / "00000.bin").read_bytes()[:8] == b"\x01\x00\x00\x00\x0a\x00\x00\x00"
    assert token_dtype(65_536).itemsize == 2
    assert token_dtype(65_537).itemsize == 4


@pytest.mark.parametrize("shard_tokens", [7, 1 << 20])
def test_the_writer_knows_the_hash_of_every_file(tmp_path, shard_tokens):
    writer = StreamWriter(tmp_path, token_dtype(50), shard_tokens)
    writer.start_document()
    writer.write(FLAT)
    meta = writer.close()
    assert len(meta["sha256"]) == 1 + -(-len(FLAT) // shard_tokens)
    assert meta["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}


def test_documents_are_found_among_many_blocks_of_them(tmp_path):
    sizes = np.random.default_rng(0).integers(2, 9, 5000)
    writer = StreamWriter(tmp_path, token_dtype(50))
    for size in sizes:
        writer.start_document()
        writer.write([1] * int(size))
    stream = TokenStream(tmp_path, writer.close(), token_dtype(50), 50)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    for length in (1, 2, 70, 20_000):
        for start in [*range(0, stream.tokens - length, 997), stream.tokens - length]:
            expected = owners[start : start + length] - owners[start]
            assert np.array_equal(stream.document_ids(start, start + length), expected)


@pytest.mark.parametrize("name", ["00001.bin", "documents.bin"])
def test_a_file_that_is_cut_while_it_is_open_is_named(tmp_path, name):
    stream = write(tmp_path, 10)
    size = (tmp_path / name).stat().st_size
    os.truncate(tmp_path / name, size // 2)
    rule = f"{name}: was cut after it was opened: it has {size // 2} bytes, and [0-9]+ are needed"
    with pytest.raises(OSError, match=rule):
        stream.read(0, len(FLAT)), stream.document_ids(0, len(FLAT))


@pytest.mark.parametrize(("index", "value"), [(0, 1), (-1, len(FLAT) - 1), (-1, len(FLAT) + 1)])
def test_document_positions_that_do_not_span_the_stream_are_named(tmp_path, index, value):
    write(tmp_path)
    offsets = np.fromfile(tmp_path / "documents.bin", "<i8")
    offsets[index] = value
    offsets.tofile(tmp_path / "documents.bin")
    meta = {"documents": len(DOCUMENTS), "tokens": len(FLAT), "bytes": 7, "shard_tokens": 100}
    rule = f"documents.bin: goes from {offsets[0]} to {offsets[-1]} instead of 0 to {len(FLAT)}"
    with pytest.raises(DataError, match=rule):
        TokenStream(tmp_path, meta, token_dtype(50), 50)


@pytest.mark.parametrize("name", ["00001.bin", "documents.bin"])
def test_damaged_files_are_named(tmp_path, name):
    write(tmp_path, 10)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-1])
    meta = {"documents": len(DOCUMENTS), "tokens": len(FLAT), "bytes": 7, "shard_tokens": 10}
    with pytest.raises(DataError, match=f"{name}: has {len(data) - 1} bytes instead of {len(data)}"):
        TokenStream(tmp_path, meta, token_dtype(50), 50)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        TokenStream(tmp_path, meta, token_dtype(50), 50)


def test_an_id_that_the_tokenizer_lacks_is_named(tmp_path):
    stream = write(tmp_path, vocab_size=40)
    assert stream.read(0, 5).tolist() == FLAT[:5]
    with pytest.raises(DataError, match="token id 40 must be < the tokenizer's vocabulary, 40"):
        stream.read(0, len(FLAT))


@pytest.mark.parametrize("length", [1, 2, 4, 7, 23])
def test_packing_against_lists(tmp_path, length):
    stream = write(tmp_path, 5)
    for index in range(full_samples(stream, length, "x")):
        sample = pack(stream, index, length, pad_id=0)
        start = index * length
        assert sample.input_ids_L.tolist() == FLAT[start : start + length]
        assert sample.document_ids_L.tolist() == [n - OWNER[start] for n in OWNER[start : start + length]]
        expected = [FLAT[t + 1] if OWNER[t + 1] == OWNER[t] else NO_TARGET for t in range(start, start + length)]
        assert sample.labels_L.tolist() == expected
        assert 1 not in sample.labels_L  # BOS, the first token of a document, is never a target


def test_the_last_held_out_sequence_is_padded(tmp_path):
    stream = write(tmp_path)
    count = len(FLAT) - 1
    sample = pack(stream, 1, 20, pad_id=9)
    left = count - 20
    assert sample.length == left
    assert pack(stream, 0, 20, pad_id=9).length == 20
    assert sample.labels_L[:left].tolist() == [
        FLAT[t + 1] if OWNER[t + 1] == OWNER[t] else NO_TARGET for t in range(20, count)
    ]
    assert (sample.labels_L[left:] == NO_TARGET).all()
    assert (sample.input_ids_L[left:] == 9).all()
    assert [len(x) for x in (sample.input_ids_L, sample.labels_L, sample.document_ids_L)] == [20] * 3
    assert (np.diff(sample.document_ids_L) >= 0).all()
    assert sample.document_ids_L[left] > sample.document_ids_L[left - 1]


def test_sequence_longer_than_the_shards(tmp_path):
    stream = write(tmp_path)
    assert full_samples(stream, len(FLAT) - 1, "x") == 1
    rule = f"train.sequence_length={len(FLAT)} must be < {len(FLAT)}, the tokens that the shards of source 'x' hold"
    with pytest.raises(DataError, match=rule):
        full_samples(stream, len(FLAT), "x")
