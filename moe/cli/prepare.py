"""`moe prepare`: by this process and others that it starts; under torchrun rank 0 hands out parts of the text and
writes, and the other ranks encode them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection

from moe.config import PrepareConfig
from moe.config.rules import require
from moe.distributed.environment import world_from_environment


def run_prepare(config: PrepareConfig) -> None:
    """Prints what is there in the end. With several ranks a collective. Raises UserError."""
    _, world_size, _, _ = world_from_environment()
    if world_size == 1:
        _prepare(config)
        return
    require(
        config.data.processes is None,
        f"data.processes={config.data.processes}: under torchrun the ranks are the processes: leave it out, and set "
        "--nproc-per-node",
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a node has more ranks than GPUs, and text needs none
    from moe.config.flat import flatten
    from moe.data.worker import serve
    from moe.distributed import rendezvous
    from moe.distributed.sockets import connect_ranks

    mesh = rendezvous.start(1, flatten(config))
    try:
        ranks = connect_ranks(mesh)
        try:
            if mesh.is_main:
                _prepare(config, ranks)
            else:
                serve(ranks[0][0])
        finally:
            for connection, _ in ranks:
                connection.close()
    finally:
        rendezvous.stop()


def _prepare(config: PrepareConfig, ranks: Sequence[tuple[Connection, str]] = ()) -> None:
    from moe.data.corpus import check_vocab
    from moe.data.prepare import prepare

    length = config.train.sequence_length
    corpus = prepare(config.data, config.tokenizer, sequence_length=length, verify=config.verify, ranks=ranks)
    check_vocab(corpus, config.model.vocab_size)
    print(corpus.describe())
