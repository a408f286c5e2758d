"""`moe analyze`: reads a checkpoint and a text, measures, and writes RUN/analysis/."""

from __future__ import annotations

import sys
from pathlib import Path

from moe.analysis.assignment import assignments
from moe.analysis.favourites import contexts, favourites
from moe.analysis.files import write_files
from moe.analysis.information import information
from moe.analysis.leave_out import affordable, leave_out
from moe.analysis.observe import observe, sparse_layers
from moe.analysis.repetition import repetitions
from moe.analysis.result import Analysis
from moe.analysis.similarity import similarities
from moe.analysis.text import choose_sequences
from moe.checkpoint.layout import CONFIG
from moe.checkpoint.reader import read_model, resolve, tokenizer_folder
from moe.checkpoint.state import read_state
from moe.config import AnalyzeConfig, Config, TokenizerConfig, TokenizerKind
from moe.config.compose import read_config
from moe.data.corpus import Corpus, check_vocab
from moe.data.prepare import prepare
from moe.errors import UserError
from moe.model.transformer import Transformer

FOLDER = "analysis"


def run_analysis(config: AnalyzeConfig) -> Path:
    """Writes the analysis and returns the page's path. Raises UserError, also for a dense model."""
    folder = resolve(Path(config.checkpoint), lambda line: _say(f"moe: {line}"))
    analysis = analyze(config, folder)
    return write_files(analysis, analysis.run / FOLDER)


def analyze(config: AnalyzeConfig, folder: Path) -> Analysis:
    """Measures one checkpoint that `resolve` has verified. Raises UserError.

    stderr gets a line when something that takes long begins.
    """
    model = read_model(folder, check_memory=config.check_memory)
    if not sparse_layers(model):
        raise UserError(f"checkpoint={config.checkpoint}: a dense model has no router to analyse; give a sparse one's")
    run: Config = read_config(folder / CONFIG)
    # The checkpoint's own tokenizer, whatever the text.
    tokenizer = TokenizerConfig(kind=TokenizerKind.huggingface, path=str(tokenizer_folder(folder)))
    corpus = prepare(config.text_of(run.data), tokenizer, sequence_length=run.train.sequence_length, log=_say)
    check_vocab(corpus, run.model.vocab_size)
    return measure(config, folder, read_state(folder).step, model, corpus, run.train.sequence_length)


def measure(
    config: AnalyzeConfig, checkpoint: Path, step: int, model: Transformer, corpus: Corpus, sequence_length: int
) -> Analysis:
    """Measures a sparse model, which must be in eval mode, on held-out sequences of a corpus. Raises UserError."""
    settings = config.analyze
    sequences = choose_sequences(corpus, settings, sequence_length)
    tokens = sum(len(sequence.input_ids_L) for sequence in sequences)
    _say(f"routing {len(sequences)} sequences, {tokens:,} tokens")
    observed = observe(model, sequences, corpus.source_names)
    num_experts = sum(layer.num_experts for layer in observed.layers)
    count = affordable(sequences, num_experts, settings.leave_out_tokens)
    left_out, why_not = None, ""
    if count < 2:
        why_not = (
            f"analyze.leave_out_tokens={settings.leave_out_tokens} is less than two sequences for each of "
            f"{num_experts} experts take, {2 * num_experts * sequence_length}"
        )
    else:
        _say(f"leaving out each of {num_experts} experts on {count} sequences")
        left_out = leave_out(model, sequences[:count], observed)
    return Analysis(
        checkpoint=checkpoint,
        step=step,
        corpus=corpus,
        settings=config,
        observed=observed,
        assignment=assignments(observed),
        repetition=repetitions(observed),
        information=information(observed, settings.permutations, settings.seed),
        favourites=favourites(observed, corpus.tokenizer.piece),
        contexts=contexts(observed, corpus.tokenizer.piece),
        similarity=similarities(model, sequences),
        leave_out=left_out,
        why_not_left_out=why_not,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
