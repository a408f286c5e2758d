"""A Hugging Face model folder: config.json, safetensors files and their index. Somebody else may have written it.

The Hub's own cache holds links to files beside the folder, so links are followed; what they lead to must be a regular
file. Names in the index must be those of files in the folder itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.layout import CHECKPOINTS, MODEL
from moe.config import Mlp, ModelConfig, RouterConfig
from moe.errors import UserError
from moe.interop.families import family_of
from moe.interop.families.base import DiskTensor, Family
from moe.interop.hub_config import HubConfig
from moe.interop.tensor_files import StoredTensor, TensorInfo, read_header
from moe.interop.tensor_source import expected_shapes
from moe.untrusted import Values, read_object, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 64 << 20  # bytes; 100,000 tensors take 10 MB
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
UNUSED = (".rotary_emb.inv_freq",)  # ends of names: buffers that earlier versions of transformers wrote
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR', torch_dtype='auto')"
    ".save_pretrained('NEW_DIR')\""
)


def is_hub_folder(path: Path) -> bool:
    """Whether this looks like a Hugging Face model folder rather than a checkpoint of ours."""
    return (path / "config.json").is_file()


class HubFolder:
    """`model` and `router` are what config.json describes; the tensors are a `TensorSource` under our names."""

    def __init__(self, path: Path, ignore_keys: Iterable[str] = ()) -> None:
        """Checks everything but the tensors' values. Raises UserError, OSError."""
        self.path = path
        if not path.is_dir():
            raise UserError(f"checkpoint={path}: no such folder; it must hold config.json and safetensors files")
        if not is_hub_folder(path) and (path / MODEL).is_dir() | (path / CHECKPOINTS).is_dir():
            raise UserError(f"checkpoint={path}: is a checkpoint already, which generate, analyze and init_from read")
        config = HubConfig.read(path)
        self.family: Family = family_of(config)
        model, router = self.family.read(self.family, config)
        config.finish(ignore_keys)
        self.model: ModelConfig = model
        self.router: RouterConfig = router
        stored = _stored_tensors(path)
        # Building a model of 10**9 layers to see that its tensors are missing would take for ever.
        layers = sum(name.endswith(".input_layernorm.weight") for name in stored)
        if model.num_hidden_layers != layers:
            raise UserError(
                f"{config.path}: num_hidden_layers={model.num_hidden_layers}, but the files hold {layers} layers: "
                "copy the folder again"
            )
        stacks = [one.shape[0] for one in stored.values() if len(one.shape) == 3 and one.nbytes]
        if model.mlp is Mlp.sparse and router.num_experts > max([len(stored), *stacks]):
            raise UserError(f"{config.path}: {router.num_experts} experts, but the files hold {len(stored)} tensors")
        self._parts = self._located(stored)

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(parts[0][1].dtype, self._shapes[name]) for name, parts in self._parts.items()}

    def read(self, name: str, expert: int | None = None) -> Tensor:
        parts, shape = self._parts[name], self._shapes[name]
        first, stored = parts[0]
        if first.expert is None:
            return stored.read() if expert is None else stored.read(expert, 1)[0]
        out = torch.empty(shape if expert is None else shape[1:], dtype=stored.dtype)
        rows, at = out.flatten(0, -2), 0
        for part, stored in parts:
            if expert in (None, part.expert):
                stored.read_into(rows[at : at + stored.shape[0]])
                at += stored.shape[0]
        return out

    def _located(self, stored: dict[str, StoredTensor]) -> dict[str, list[tuple[DiskTensor, StoredTensor]]]:
        """Where each of our tensors' parts are. Raises UserError for missing, unknown and misshapen tensors."""
        try:
            self._shapes = expected_shapes(self.model, self.router)
        except RuntimeError as error:  # torch's, of a number of elements over 2^63
            raise UserError(f"{self.path / 'config.json'}: its sizes make a tensor larger than any can be") from error
        found: dict[str, list[tuple[DiskTensor, StoredTensor]]] = {}
        left = dict(stored)
        for name, shape in self._shapes.items():
            parts = list(self.family.on_disk(name, shape))
            if parts[0].name not in stored and name in stored:
                parts = self.family.stacked(name, shape)
            located = []
            for part in parts:
                one = left.pop(part.name, None)
                if one is None:
                    raise UserError(f"{self.path}: {part.name} is missing: no file of the folder holds it")
                _check_fits(part, one)
                located.append((part, one))
            dtypes = {one.dtype for _, one in located}
            if len(dtypes) > 1:
                raise UserError(f"{self.path}: the experts of {name} have several dtypes: {sorted(map(str, dtypes))}")
            found[name] = located
        self._check_rest(left, stored)
        return found

    def _check_rest(self, left: dict[str, StoredTensor], stored: dict[str, StoredTensor]) -> None:
        head, embedding = left.pop("lm_head.weight", None), stored.get("model.embed_tokens.weight")
        if head is not None and embedding is not None and not _equal(head, embedding):
            raise UserError(
                f"{head.path}: lm_head.weight differs from model.embed_tokens.weight, and config.json says "
                "tie_word_embeddings=true: set it to false, or remove the tensor"
            )
        unknown = sorted(name for name in left if not name.endswith(UNUSED))
        if unknown:
            raise UserError(
                f"{left[unknown[0]].path}: {shown(unknown[0])} and {len(unknown) - 1} more are no tensors of a "
                f"{self.family.architecture} with this config.json: they would be lost"
                if len(unknown) > 1
                else f"{left[unknown[0]].path}: {shown(unknown[0])} is no tensor of a {self.family.architecture} with "
                "this config.json: it would be lost"
            )


def _check_fits(part: DiskTensor, stored: StoredTensor) -> None:
    if stored.shape != part.shape:
        raise UserError(
            f"{stored.path}: {part.name} is {list(stored.shape)}, and config.json's is {list(part.shape)}: they are of "
            "different models"
        )
    if stored.dtype not in WEIGHTS:
        raise UserError(
            f"{stored.path}: {part.name} is {str(stored.dtype).removeprefix('torch.')}: weights must be float32, "
            "bfloat16 or float16 (quantised ones can't be trained: take the original)"
        )


def _equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for first in range(0, one.shape[0], rows):
        count = min(rows, one.shape[0] - first)
        if not torch.equal(one.read(first, count), other.read(first, count)):
            return False
    return True


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its name there. Raises UserError."""
    if (path / INDEX).exists():
        return _indexed(path)
    if (path / SINGLE).exists():
        return _opened(path / SINGLE)
    pickles = sorted(one.name for pattern in PICKLES for one in path.glob(pattern))
    if pickles:
        raise UserError(
            f"{path}: has {pickles[0]}, a pickle, and no {SINGLE}: reading one can run code, so it is not opened; "
            f"convert it where you trust it, and import NEW_DIR: {CONVERT}"
        )
    raise UserError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _opened(path: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(path)[0]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: copy it again") from error


def _indexed(path: Path) -> dict[str, StoredTensor]:
    index = read_object(path / INDEX, "copy it again", LARGEST_INDEX)
    weight_map: Values = index.object("weight_map")
    files: dict[str, dict[str, StoredTensor]] = {}
    found = {}
    for name in weight_map.values:
        file = weight_map.text(name)
        if file not in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{path / INDEX}: {shown(name)} is said to be in {shown(file)}: it must be a .safetensors file of "
                    "this folder"
                )
            if not (path / file).exists():
                raise UserError(f"{path / INDEX}: names {file}, which is missing: copy it too")
            files[file] = _opened(path / file)
        if name not in files[file]:
            raise UserError(f"{path / file}: {shown(name)} is not in it, though {INDEX} says so: copy both again")
        found[name] = files[file][name]
    unlisted = [(file, name) for file, tensors in files.items() for name in tensors if name not in found]
    if unlisted:
        file, name = unlisted[0]
        raise UserError(f"{path / file}: {shown(name)} is in it, but not in {INDEX}: copy both again")
    return found
