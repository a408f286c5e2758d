"""The order of samples, and the loader: the same batches at any number of ranks, resumable from one integer."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from moe.config import DataConfig, TokenizerConfig, TokenizerKind
from moe.data import order
from moe.data.loader import Loader, held_out_batches, token_counts
from moe.data.order import Mixture, quotas, shuffled
from moe.data.prepare import prepare
from moe.data.readers import DataError

LENGTH = 32
FIELDS = ("input_ids_BS", "labels_BS", "document_ids_BS", "sample_ids_B", "source_ids_B")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("a", 400), ("b", 150), ("c", 60)):
        (folder / f"{name}.jsonl").write_text(
            "".join(f'{{"text": "{name} has {i} and {i * i % 97} of {i % 7}\\n"}}\n' for i in range(count))
        )
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    sources = {name: {"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()}
    data = DataConfig(sources=sources, cache_dir=str(folder / "cache"), held_out=0.2)
    return prepare(data, TokenizerConfig(kind=TokenizerKind.mistral), log=lambda line: None)


def loader(corpus, *, micro=2, batch=8, rank=0, world=1, seed=0, length=LENGTH):
    return Loader(
        corpus,
        sequence_length=length,
        micro_batch_size=micro,
        global_batch_size=batch,
        rank=rank,
        world_size=world,
        seed=seed,
    )


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 255, 257, 1024, 4097])
def test_shuffled_is_a_bijection(count):
    for key in ((0, 0, 0), (1, 2, 3)):
        assert sorted(shuffled(i, count, key) for i in range(count)) == list(range(count))


def test_shuffled_of_a_billion_is_in_range_and_does_not_repeat():
    count = 10**9 + 7
    seen = {shuffled(i, count, (5,)) for i in range(20_000)}
    assert len(seen) == 20_000
    assert min(seen) >= 0
    assert max(seen) < count
    assert np.histogram(list(seen), bins=10, range=(0, count))[0].min() > 1700  # 2,000 expected


def test_shuffled_looks_random():
    """Positions, neighbours and keys are uncorrelated, within the noise of random permutations of this size."""
    count = 2000
    first, second = (np.array([shuffled(i, count, (key,)) for i in range(count)]) for key in (1, 2))
    bound = 5 / math.sqrt(count)
    assert abs(np.corrcoef(first, np.arange(count))[0, 1]) < bound
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < bound
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert (first == second).mean() < 0.01


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.35, 0.15], [3, 1], [0.98, 0.02], [1 / 3] * 3])
def test_mixture_gives_every_source_its_share_and_every_number_once(weights):
    mixture = Mixture(weights, seed=3)
    located = [mixture.locate(i) for i in range(3 * mixture.block)]
    for source, weight in enumerate(weights):
        numbers = [n for s, n in located if s == source]
        assert sorted(numbers) == list(range(3 * mixture.quotas[source]))
        share = weight / sum(weights)
        assert abs(len(numbers) / len(located) - share) <= 0.01 * share
    if len(weights) > 1:
        first_block, second_block = ([s for s, _ in located[i * mixture.block :][: mixture.block]] for i in (0, 1))
        assert first_block != second_block
    first = Counter(source for source, _ in located[:256])
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(first[source] / 256 - share) < 5 * math.sqrt(share * (1 - share) / 256) + 1e-9


def test_a_very_rare_source_still_gives_samples():
    mixture = Mixture([1.0, 1e-9], seed=0)
    assert mixture.block == order.MAX_BLOCK
    assert mixture.quotas == [order.MAX_BLOCK - 1, 1]


def test_quotas_are_largest_remainders():
    assert quotas([0.5, 0.35, 0.15], 10) == [5, 4, 1]
    assert quotas([0.9, 0.05, 0.05], 3) == [1, 1, 1]
    assert quotas([0.999, 0.001], 100) == [99, 1]
    assert sum(quotas([0.3, 0.3, 0.4], 1000)) == 1000
    with pytest.raises(ValueError, match="2 samples can't hold 3 sources"):
        quotas([0.4, 0.3, 0.3], 2)


def test_samples_are_consecutive_tokens_of_the_shards(corpus):
    batch = loader(corpus).next_step()[0]
    for row in range(2):
        stream = corpus.train[batch.source_ids_B[row]]
        ids = stream.read(0, stream.tokens).tolist()
        text = batch.input_ids_BS[row].tolist()
        starts = [i for i in range(0, len(ids) - LENGTH, LENGTH) if ids[i : i + LENGTH] == text]
        assert len(starts) == 1
        targets = ids[starts[0] + 1 : starts[0] + LENGTH + 1]
        for label, target in zip(batch.labels_BS[row].tolist(), targets, strict=True):
            assert label == (-100 if target == corpus.tokenizer.bos_id else target)
    assert [getattr(batch, name).dtype for name in FIELDS] == [
        torch.int64,
        torch.int64,
        torch.int32,
        torch.int64,
        torch.int64,
    ]


def test_the_host_knows_the_documents_lengths(corpus):
    held_out = held_out_batches(corpus, sequence_length=LENGTH, micro_batch_size=4, max_sequences=7)
    batches = [*loader(corpus).next_step(), *held_out]
    assert held_out[-1].sample_ids_B[-1] == -1, "the last sequence only fills up the batch"
    for batch in batches:
        counted = [
            int(count) for row in batch.document_ids_BS for count in row.unique_consecutive(return_counts=True)[1]
        ]
        assert batch.document_lengths == counted == batch.layout["document_lengths"]
    assert any(len(batch.document_lengths) > len(batch.document_ids_BS) for batch in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_micro_batches(corpus, world):
    alone = loader(corpus)
    ranks = [loader(corpus, rank=rank, world=world) for rank in range(world)]
    for step in range(5):
        expected = alone.next_step()
        parts = [rank.next_step() for rank in ranks]
        assert [len(part) for part in parts] == [4 // world] * world
        together = [parts[j % world][j // world] for j in range(4)]
        assert all(same(a, b) for a, b in zip(expected, together, strict=True))
        assert torch.cat([batch.sample_ids_B for batch in expected]).tolist() == list(range(8 * step, 8 * step + 8))


def test_micro_batch_size_does_not_change_the_samples_of_a_step(corpus):
    small, large = loader(corpus, micro=1).next_step(), loader(corpus, micro=4).next_step()
    for name in FIELDS:
        cut = [torch.cat([getattr(batch, name) for batch in batches]) for batches in (small, large)]
        assert torch.equal(*cut)


@pytest.mark.parametrize("world", [1, 2])
def test_resume_equals_never_having_stopped(corpus, world):
    whole = loader(corpus)
    steps = [whole.next_step() for _ in range(60)]  # several epochs of every source
    assert whole.consumed == 480
    ranks = [loader(corpus, rank=rank, world=world) for rank in range(world)]
    for rank in ranks:
        rank.consumed = 37 * 8
    for expected in steps[37:]:
        parts = [rank.next_step() for rank in ranks]
        assert all(same(expected[j], parts[j % world][j // world]) for j in range(4))


def test_every_epoch_of_a_source_is_complete_and_in_another_order(corpus):
    run = loader(corpus, micro=8)
    count = (corpus.train[2].tokens - 1) // LENGTH
    quota = Mixture(corpus.weights, 0).quotas[2]
    seen = {}
    while len(seen) < quota:  # a whole block holds its first `quota` samples of the source
        (batch,) = run.next_step()
        for row in (batch.source_ids_B == 2).nonzero().flatten().tolist():
            source, nth = Mixture(corpus.weights, 0).locate(int(batch.sample_ids_B[row]))
            assert source == 2
            seen[nth] = tuple(batch.input_ids_BS[row].tolist())
    epochs = [[seen[e * count + i] for i in range(count)] for e in range(quota // count)]
    assert len(epochs) > 1
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_seed_changes_the_order(corpus):
    first, again, other = (loader(corpus, seed=seed).next_step()[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first.input_ids_BS, other.input_ids_BS)


def test_held_out_is_the_same_set_at_any_number_of_ranks(corpus):
    def sequences(world, micro):
        parts = [
            held_out_batches(
                corpus, sequence_length=LENGTH, micro_batch_size=micro, max_sequences=30, rank=rank, world_size=world
            )
            for rank in range(world)
        ]
        assert len({len(part) for part in parts}) == 1
        rows = {}
        for batch in (batch for part in parts for batch in part):
            assert batch.input_ids_BS.shape == (micro, LENGTH)
            for row, sample in enumerate(batch.sample_ids_B.tolist()):
                if sample < 0:
                    assert (batch.labels_BS[row] == -100).all()
                else:
                    assert sample not in rows
                    rows[sample] = [getattr(batch, name)[row].tolist() for name in FIELDS]
        return rows

    alone = sequences(1, 4)
    assert len(alone) <= 30
    assert {row[4] for row in alone.values()} == {0, 1, 2}
    assert sequences(2, 4) == alone
    assert sequences(4, 3) == alone


def test_held_out_scores_every_target_once_when_asked_for_all(corpus):
    batches = held_out_batches(corpus, sequence_length=LENGTH, micro_batch_size=4, max_sequences=10_000)
    targets = sum(int((batch.labels_BS != -100).sum()) for batch in batches)
    assert targets == sum(stream.tokens - stream.documents for stream in corpus.held_out)
    counts = token_counts(batches, corpus.tokenizer.vocab_size)
    assert int(counts.sum()) == targets
    assert int(counts[corpus.tokenizer.eos_id]) == sum(stream.documents for stream in corpus.held_out)
    assert int(counts[corpus.tokenizer.bos_id]) == 0
    sizes = torch.from_numpy(corpus.tokenizer.token_bytes())
    text = sum(stream.bytes + stream.documents for stream in corpus.held_out)  # this tokenizer adds a space to each
    assert int((counts * sizes).sum()) == text


def test_held_out_and_training_text_are_disjoint(corpus):
    def documents(stream):
        ids, owners = stream.read(0, stream.tokens), stream.document_ids(0, stream.tokens)
        return {tuple(ids[owners == number]) for number in range(stream.documents)}

    for train, held_out in zip(corpus.train, corpus.held_out, strict=True):
        assert not documents(train) & documents(held_out)


def test_impossible_batches_and_lengths_are_named(corpus):
    with pytest.raises(DataError, match=r"train\.global_batch_size=8 must be divisible by .*=3 × 1 ranks"):
        loader(corpus, micro=3)
    tokens = corpus.train[2].tokens
    with pytest.raises(DataError, match=r"train\.sequence_length=100000 must be < \d+, .* of source 'a' hold"):
        loader(corpus, length=100_000)
    with pytest.raises(DataError, match=rf"train\.sequence_length={tokens} must be < {tokens}, .* of source 'c' hold"):
        loader(corpus, length=tokens)
    with pytest.raises(DataError, match=r"train\.eval_sequences=2 must be ≥ 3"):
        held_out_batches(corpus, sequence_length=8, micro_batch_size=1, max_sequences=2)


def test_with_whole_epochs_every_source_comes_in_its_own_order():
    for weights in ([1.0], [0.7, 0.2, 0.1]):
        mixed, ordered = (Mixture(weights, seed=3, whole_epochs=whole) for whole in (False, True))
        places = [ordered.locate(sample) for sample in range(3000)]
        assert [source for source, _ in places] == [mixed.locate(sample)[0] for sample in range(3000)]
        for source in range(len(weights)):
            own = [nth for found, nth in places if found == source]
            assert own == list(range(len(own)))
