"""Writes a whole model without optimizer state as a checkpoint, which `load_model`, `moe generate` and
`init_from` read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from moe.checkpoint.files import SavedTokenizer, small_files, write_small_files
from moe.checkpoint.layout import MODEL, UNTRAINED
from moe.checkpoint.manifest import entry
from moe.checkpoint.ownership import file_numbers
from moe.checkpoint.state import TrainState
from moe.config import Config
from moe.config.compose import to_yaml
from moe.durable import fsync, new_folder
from moe.errors import UserError


def write_model(
    folder: Path, model: nn.Module, tokenizer: SavedTokenizer, config: Config, state: TrainState | None = None
) -> None:
    """`model`, whole and in one process, into the new folder `folder`: parameters and buffers in the model's dtypes.

    `config` describes it: its `model`, `router` and `experts` build it again. `state` tells where the weights come from
    (step, tokens, data); its `tokenizer` is taken from `tokenizer`. Raises UserError when `folder` exists, OSError.
    """
    from moe.checkpoint.tensor_files import write_tensors

    if folder.exists():
        raise UserError(f"{folder} exists: a model is written into a new folder")
    state = replace(state or TrainState(), tokenizer=tokenizer.fingerprint)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    persistent = model.state_dict().keys()
    tensors |= {name: buffer.cpu().contiguous() for name, buffer in model.named_buffers() if name in persistent}
    numbers = file_numbers({(UNTRAINED, name): tensor.nbytes for name, tensor in tensors.items()})
    with new_folder(folder, "folder") as partial:
        write_tensors(partial / MODEL, tensors, numbers, written := [])
        manifest = {}
        for path in written:
            fsync(path)
            manifest[str(path.relative_to(partial))] = entry(path)
        write_small_files(partial, small_files(state, to_yaml(config), tokenizer), manifest)
