"""`torchrun … -m moe prepare`: rank 0 hands out parts of the text and writes; the other ranks encode them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from moe.config import PrepareConfig
from moe.config.rules import require

Prepare = Callable[[PrepareConfig, Sequence[tuple[Connection, str]]], None]


def run_ranks(config: PrepareConfig, prepare: Prepare) -> None:
    """`prepare(config, the other ranks)` on rank 0, work for it on the others. A collective. Raises UserError."""
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
                prepare(config, ranks)
            else:
                serve(ranks[0][0])
        finally:
            for connection, _ in ranks:
                connection.close()
    finally:
        rendezvous.stop()
