"""Preparing a corpus: the split, the fingerprint, the cache, several processes, and damaged or full disks."""

import json
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from moe.config import DataConfig, SourceFormat, TokenizerConfig, TokenizerKind
from moe.data.corpus import check_tokenizer, check_vocab
from moe.data.prepare import prepare
from moe.data.readers import DataError


def pieces(count):
    return TokenizerConfig(kind=TokenizerKind.sentencepiece, vocab_size=count)


TOKENIZER = pieces(320)
MISTRAL = TokenizerConfig(kind=TokenizerKind.mistral)
DATA = Path(__file__).parents[3] / "data"
SHARED = Path(__file__).parents[4] / "shared" / "data"


def lines(count, salt=""):
    def word(i):
        return "".join(("ka", "lo", "mi", "ren", "su", "tor", "vex", "zu")[i * p % 8] for p in (1, 3, 5)[: 1 + i % 3])

    return [f"{salt}number {i}: {word(i)} {word(i // 3)} {word(i // 7)}, {i * i}\n" for i in range(count)]


def write_rows(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    os.utime(path, (1e9, 1e9))  # an old modification time, so that a note is written
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", lines(400))


def make(path, cache, tokenizer=TOKENIZER, logged=None, **keys):
    log = (lambda line: None) if logged is None else logged.append
    return prepare(DataConfig(path=str(path), cache_dir=str(cache), **keys), tokenizer, log=log)


def documents(corpus, stream):
    """The text of every stored document; asserts its BOS and EOS."""
    ids, owners = stream.read(0, stream.tokens), stream.document_ids(0, stream.tokens)
    found = []
    for number in range(stream.documents):
        document = ids[owners == number].tolist()
        assert document[0] == corpus.tokenizer.bos_id
        assert document[-1] == corpus.tokenizer.eos_id
        found.append(corpus.tokenizer.decode(document[1:-1]))
    return found


def test_every_document_is_stored_once_and_exactly(rows, tmp_path):
    corpus = make(rows, tmp_path / "cache")
    train, held_out = documents(corpus, corpus.train[0]), documents(corpus, corpus.held_out[0])
    assert sorted(train + held_out) == sorted(lines(400))
    assert 5 <= len(held_out) <= 40
    assert [text for text in lines(400) if text in set(train)] == train
    assert corpus.train[0].bytes == sum(len(text.encode()) for text in train)
    assert corpus.held_out[0].bytes == sum(len(text.encode()) for text in held_out)


def test_the_split_depends_on_the_text_alone(rows, tmp_path):
    first = make(rows, tmp_path / "cache")
    shuffled = write_rows(tmp_path / "other.jsonl", reversed(lines(500)))
    second = make(shuffled, tmp_path / "cache")
    kept = {text for text in documents(second, second.held_out[0]) if text in lines(400)}
    assert kept == set(documents(first, first.held_out[0]))


def test_tokenizer_never_sees_held_out_text(tmp_path):
    rows = [f"{chr(0x4E00 + i)} {'abc ' * 5}\n" for i in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    corpus = make(path, tmp_path / "cache", pieces(500), held_out=0.3)
    known = {corpus.tokenizer.piece(i) for i in range(corpus.tokenizer.vocab_size)}
    assert {text[0] for text in documents(corpus, corpus.train[0])} <= known
    assert not {text[0] for text in documents(corpus, corpus.held_out[0])} & known


@pytest.mark.parametrize("held_out", [0.0001, 0.9999])
def test_neither_split_is_ever_empty(tmp_path, held_out):
    path = write_rows(tmp_path / "rows.jsonl", lines(3))
    corpus = make(path, tmp_path / "cache", MISTRAL, held_out=held_out)
    assert corpus.train[0].documents >= 1
    assert corpus.held_out[0].documents >= 1
    assert corpus.train[0].documents + corpus.held_out[0].documents == 3


def test_one_text_file_is_split_and_its_neighbouring_chunks_stay_one_document(tmp_path):
    text = "".join(lines(3000))
    (tmp_path / "book.txt").write_text(text)
    corpus = make(tmp_path / "book.txt", tmp_path / "cache")
    train, held_out = documents(corpus, corpus.train[0]), documents(corpus, corpus.held_out[0])
    assert len("".join(train)) + len("".join(held_out)) == len(text)
    assert 0 < len("".join(held_out)) < 0.2 * len(text)
    assert len(train) <= len(held_out) + 1  # a training document ends only where text was held out
    rest = text
    for part in sorted(train + held_out, key=text.index):
        assert rest.startswith(part)
        rest = rest[len(part) :]
    assert not rest


def test_fingerprint_follows_content_tokenizer_and_split_only(rows, tmp_path):
    cache = tmp_path / "cache"
    first = make(rows, cache)
    copy = write_rows(tmp_path / "copy.jsonl", lines(400))
    assert make(copy, cache).fingerprint == first.fingerprint
    assert make(copy, tmp_path / "cache2").fingerprint == first.fingerprint
    renamed = write_rows(tmp_path / "renamed.jsonl", lines(400), field="body")
    assert make(renamed, cache, text_field="body").fingerprint == first.fingerprint
    others = [
        make(rows, cache, held_out=0.1),
        make(rows, cache, pieces(321)),
        make(rows, cache, MISTRAL),
        make(write_rows(tmp_path / "copy.jsonl", lines(401)), cache),
        make(write_rows(tmp_path / "copy.jsonl", [*lines(399), "nummer"]), cache),
        make(rows, cache, format=SourceFormat.text),
    ]
    assert len({corpus.fingerprint for corpus in [first, *others]}) == 7


def test_second_call_opens_without_reading_the_text(rows, tmp_path):
    logged = []
    first = make(rows, tmp_path / "cache", logged=logged)
    assert len(logged) == 1
    assert logged[0].startswith("prepared ")
    stat = rows.stat()
    rows.write_bytes(b"\xff" * stat.st_size)  # not UTF-8, but with the size and time that are in the note
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = make(rows, tmp_path / "cache", logged=logged)
    assert (second.fingerprint, second.folder, len(logged)) == (first.fingerprint, first.folder, 1)
    assert documents(second, second.train[0]) == documents(first, first.train[0])


def test_a_file_changed_just_now_is_read_again(rows, tmp_path):
    write_rows(rows, lines(400))
    os.utime(rows)
    first = make(rows, tmp_path / "cache")
    stat = rows.stat()
    changed = lines(400)
    changed[7] = changed[7].replace("number", "nummer")
    write_rows(rows, changed)
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows.stat().st_size == stat.st_size
    assert make(rows, tmp_path / "cache").fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["text/train/00000.bin", "text/held_out/documents.bin", "meta.json", "tokenizer"])
def test_a_damaged_cache_is_named_and_prepared_again(rows, tmp_path, name):
    first = make(rows, tmp_path / "cache")
    before = documents(first, first.train[0])
    path = first.folder / name
    if path.is_dir():
        path.rename(first.folder / "lost")
    else:
        os.truncate(path, path.stat().st_size - 1)
    logged = []
    second = make(rows, tmp_path / "cache", logged=logged)
    assert "preparing again" in logged[0]
    assert name in logged[0]
    assert documents(second, second.train[0]) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("name", ["text/train/00000.bin", "text/held_out/00000.bin", "text/train/documents.bin"])
def test_changed_bytes_are_named_once_and_prepared_again(rows, tmp_path, name, noted):
    first = make(rows, tmp_path / "cache")
    before = {path: path.read_bytes() for path in first.folder.rglob("*.bin")}
    flip(first.folder / name)
    if not noted:  # the text was touched, so the corpus is found by its content
        os.utime(rows, (2e9, 2e9))
    logged, warned = [], []
    log = logged.append
    prepare(DataConfig(path=str(rows), cache_dir=str(tmp_path / "cache")), TOKENIZER, log=log, warn=warned.append)
    assert len(warned) == 1
    assert warned[0].startswith(f"{first.folder / name}: ")
    assert warned[0].endswith(": the cache is damaged; preparing again")
    assert [line.split()[0] for line in logged] == ["prepared"]
    assert {path: path.read_bytes() for path in first.folder.rglob("*.bin")} == before


def test_a_damaged_corpus_that_cannot_be_prepared_again_is_an_error(rows, tmp_path):
    first = make(rows, tmp_path / "cache")
    flip(first.folder / "text/train/00000.bin")
    rows.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file or folder"):
        make(rows, tmp_path / "cache")


def test_verify_reads_what_was_checked_before(rows, tmp_path):
    logged = []
    first = make(rows, tmp_path / "cache", logged=logged)
    config = DataConfig(path=str(rows), cache_dir=str(tmp_path / "cache"))
    prepare(config, TOKENIZER, log=logged.append)
    assert len(logged) == 1
    prepare(config, TOKENIZER, log=logged.append, verify=True)
    assert logged[1].startswith("verified 4 files, ")
    assert str(first.folder) in logged[1]
    assert len(logged) == 2


def test_a_corpus_of_an_earlier_version_is_checked_and_gets_hashes(rows, tmp_path):
    first = make(rows, tmp_path / "cache")
    path = first.folder / "meta.json"
    now = path.read_text()
    meta = json.loads(now)
    for split in ("train", "held_out"):
        del meta["sources"]["text"][split]["sha256"]
    path.write_text(json.dumps(meta, indent=1))
    os.utime(first.folder / "text/train/00000.bin")  # not yet checked with these times
    logged = []
    second = make(rows, tmp_path / "cache", logged=logged)
    assert logged == [f"{path}: written by an earlier version; added the SHA-256 of 4 files"]
    assert second.fingerprint == first.fingerprint
    assert path.read_text() == now
    flip(first.folder / "text/train/00000.bin")
    make(rows, tmp_path / "cache", logged=logged)
    assert "preparing again" in logged[1]


def test_the_partial_folder_of_a_killed_process_is_replaced(rows, tmp_path):
    first = make(rows, tmp_path / "cache")
    folder = first.folder.rename(first.folder.with_suffix(".tmp"))
    (folder / "meta.json").unlink()
    assert make(rows, tmp_path / "cache").fingerprint == first.fingerprint
    assert not folder.exists()


def _prepare_in_process(path, cache, queue):
    logged = []
    corpus = make(path, cache, logged=logged)
    queue.put((corpus.fingerprint, corpus.train[0].tokens, sum(line.startswith("prepared ") for line in logged)))


@pytest.mark.timeout(120)
def test_many_processes_at_once_build_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", lines(20_000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_in_process, args=(path, tmp_path / "c", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(timeout=10)
        assert process.exitcode == 0
    assert len({result[:2] for result in results}) == 1
    assert sum(result[2] for result in results) == 1


def test_a_full_disk_is_one_line_and_leaves_no_folder_behind(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", lines(5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError) as caught:
            make(path, tmp_path / "cache", MISTRAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"data.cache_dir={tmp_path / 'cache'}: can't write ")
    assert "\n" not in str(caught.value)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert make(path, tmp_path / "cache", MISTRAL).train[0].documents > 4000


def test_cache_folder_that_cannot_be_made(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*/file/cache: can't write .*: Not a directory"):
        make(rows, tmp_path / "file" / "cache")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"source 'text' \(jsonl:.*\) is empty: it holds no text"):
        make(path, tmp_path / "cache")


def test_one_document_cannot_be_split(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["the same"] * 5)
    with pytest.raises(DataError, match="holds one distinct document of 40 bytes: training and held-out text need"):
        make(path, tmp_path / "cache")


def test_bad_input_is_found_before_anything_is_written(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", lines(50))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:51: broken JSON"):
        make(path, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_missing_tokenizer_file(rows, tmp_path):
    config = TokenizerConfig(kind=TokenizerKind.model_file, path=str(tmp_path / "none.model"))
    with pytest.raises(DataError, match=r"tokenizer\.path=.*none\.model: no such file"):
        make(rows, tmp_path / "cache", config)


def test_vocabulary_and_tokenizer_checks(rows, tmp_path):
    trained, mistral = make(rows, tmp_path / "cache"), make(rows, tmp_path / "cache", MISTRAL)
    check_vocab(trained, 320)
    with pytest.raises(DataError, match=r"model\.vocab_size=319 must be ≥ 320"):
        check_vocab(trained, 319)
    check_tokenizer(trained, trained.tokenizer, "runs/a")
    with pytest.raises(DataError, match=r"runs/a: tokenizer .* doesn't match the shards'"):
        check_tokenizer(trained, mistral.tokenizer, "runs/a")


def test_shards_of_another_tokenizer_are_refused(rows, tmp_path):
    trained, mistral = make(rows, tmp_path / "cache"), make(rows, tmp_path / "cache", MISTRAL)
    (trained.folder / "tokenizer").rename(tmp_path / "aside")
    (mistral.folder / "tokenizer").rename(trained.folder / "tokenizer")
    logged = []
    make(rows, tmp_path / "cache", logged=logged)
    assert "doesn't match the shards'" in logged[0]


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("To be, or not to be, that is the question: {}", "To be, or not to be, that is the"),
        ("天地玄黄宇宙洪荒日月盈昃" * 9 + "{}", "天地玄黄宇宙洪荒日月盈昃" * 3 + "天地玄黄"),
        ("\nShort. {}\n", "Short."),
    ],
)
def test_the_opening_is_that_of_a_held_out_document(text, opening, tmp_path):
    rows = [" \n" * count for count in range(1, 7)] + [text.format(count) for count in range(6)]  # blank ones first
    corpus = make(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "cache", MISTRAL, held_out=0.5)
    (held_out,) = corpus.held_out
    assert corpus.opening().startswith(opening)
    assert len(corpus.opening()) <= 40
    assert corpus.opening() in "".join(documents(corpus, held_out))


def test_weights_follow_tokens_or_the_configuration(tmp_path):
    for name, count in (("a", 300), ("b", 100)):
        write_rows(tmp_path / f"{name}.jsonl", lines(count, name))
    paths = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"}
    free = prepare(DataConfig(sources=paths, cache_dir=str(tmp_path / "c")), MISTRAL, log=lambda line: None)
    tokens = [stream.tokens for stream in free.train]
    assert free.weights == pytest.approx([count / sum(tokens) for count in tokens])
    stated = {name: source | {"weight": weight} for (name, source), weight in zip(paths.items(), [1, 3], strict=True)}
    fixed = prepare(DataConfig(sources=stated, cache_dir=str(tmp_path / "c")), MISTRAL, log=lambda line: None)
    assert fixed.weights == [0.25, 0.75]
    assert fixed.fingerprint == free.fingerprint  # the same shards
    assert fixed.source_names == ["a", "b"]
    text = fixed.describe()
    assert fixed.fingerprint[:16] in text
    assert f"{fixed.train[0].tokens:,}" in text
    assert "75.0%" in text


@pytest.mark.parametrize("name", ["sample.txt", "sample.jsonl"])
def test_shipped_samples(tmp_path, name):
    corpus = make(DATA / name, tmp_path / "cache", pieces(512))
    assert corpus.tokenizer.vocab_size == 512
    assert corpus.train[0].tokens > 5000
    assert corpus.held_out[0].tokens > 200


def test_builtin_corpus_is_quick_and_opens_at_once(tmp_path):
    sources = {name: {"path": name, "format": "stdlib"} for name in ("python", "prose", "arithmetic")}
    data = DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"))
    start = time.monotonic()
    first = prepare(data, pieces(2048), log=lambda line: None)
    built = time.monotonic()
    second = prepare(data, pieces(2048), log=lambda line: None)
    opened = time.monotonic()
    assert second.fingerprint == first.fingerprint
    assert built - start < 30  # 3 s on an idle machine
    assert opened - built < 1
    assert min(stream.tokens for stream in first.held_out) > 5000
    bytes_per_token = sum(s.bytes for s in first.train) / sum(s.tokens for s in first.train)
    assert bytes_per_token > 2.2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared example data")
def test_real_files(tmp_path):
    play = make(SHARED / "shakespeare_train.txt", tmp_path / "cache", MISTRAL)
    size = (SHARED / "shakespeare_train.txt").stat().st_size
    assert play.train[0].bytes + play.held_out[0].bytes == size
    assert 0.01 < play.held_out[0].bytes / size < 0.15
    questions = make(SHARED / "wikisql_train.jsonl", tmp_path / "cache", text_field="prompt")
    assert questions.train[0].documents + questions.held_out[0].documents == 15_927
    with pytest.raises(DataError, match=r"gsm8k_train\.jsonl:1: no field 'text'; it has messages"):
        make(SHARED / "gsm8k_train.jsonl", tmp_path / "cache")
