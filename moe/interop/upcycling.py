"""`moe upcycle`: a dense model becomes a sparse one whose experts begin as copies of its layers.

    moe upcycle checkpoint=runs/dense run_dir=runs/sparse
    moe upcycle checkpoint=HF_DIR run_dir=runs/sparse num_experts=16 top_k=4 granularity=2 reinit_ratio=0.5

Legend: E experts, F feed-forward of the dense layer, G granularity, f = F / G, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.layout import CONFIG
from moe.checkpoint.reader import resolve, tokenizer_folder
from moe.config import AdapterConfig, Config, Mlp, ModelConfig, TopKRouterConfig, UpcycleConfig
from moe.config.compose import read_config
from moe.data.tokenizer import load_saved
from moe.data.tokenizer_base import Tokenizer
from moe.errors import UserError
from moe.interop.hub_folder import is_hub_folder
from moe.interop.importing import model_config, open_hub_folder
from moe.interop.model_folder import write_model_folder
from moe.interop.tensor_files import TensorInfo
from moe.interop.tensor_source import TensorSource, expected_shapes, header_flaw, open_checkpoint
from moe.model.initialize import seed_of
from moe.plan.counts import count_parameters


def run_upcycle(config: UpcycleConfig, warn: Callable[[str], None]) -> str:
    """Upcycles, and says what was made. `warn` gets a line for each damaged checkpoint that is passed over. Raises
    UserError, OSError."""
    destination = Path(config.run_dir).expanduser()
    source, dense, tokenizer = _dense(config, destination, warn)
    if dense.model.mlp is not Mlp.dense:
        raise UserError(f"checkpoint={config.checkpoint}: it has experts already: only a dense model is upcycled")
    sparse = upcycled_config(dense, config, destination)
    write_model_folder(destination, UpcycledTensors(source, sparse, config), tokenizer, sparse)
    total, active = count_parameters(sparse)
    before, _ = count_parameters(dense)
    return (
        f"{destination}: {total:,} parameters, {active:,} active, of {before:,} dense ones; "
        f"`moe train init_from={destination} …` trains it"
    )


def _dense(
    config: UpcycleConfig, destination: Path, warn: Callable[[str], None]
) -> tuple[TensorSource, Config, Tokenizer]:
    path = Path(config.checkpoint).expanduser()
    if is_hub_folder(path):
        hub, tokenizer = open_hub_folder(path, tokenizer=config.tokenizer, ignore_keys=config.ignore_keys)
        return hub, model_config(hub.model, hub.router, destination), tokenizer
    folder = resolve(path, warn, header_flaw)
    saved: Config = read_config(folder / CONFIG)
    return open_checkpoint(folder, saved), saved, load_saved(tokenizer_folder(folder))


def upcycled_config(dense: Config, config: UpcycleConfig, destination: Path) -> Config:
    """The sparse model's configuration. Raises UserError."""
    width, parts = dense.model.intermediate_size, config.granularity
    if width % parts:
        raise UserError(f"granularity={parts} must divide the dense model's intermediate_size={width}")
    changed: ModelConfig = replace(
        dense.model,
        mlp=Mlp.sparse,
        sparse_layers=config.sparse_layers,
        moe_intermediate_size=width // parts if parts > 1 else None,
        n_shared_experts=0,
    )
    router = TopKRouterConfig(num_experts=config.num_experts, top_k=config.top_k)
    whole = model_config(changed, router, destination)
    return replace(dense, run_dir=whole.run_dir, model=changed, router=router, tokenizer=whole.tokenizer,
                   adapter=AdapterConfig(), init_from=None)  # fmt: skip


class UpcycledTensors:
    """`config`'s tensors, made of a dense model's. Values are a function of (seed, layer, expert)."""

    def __init__(self, dense: TensorSource, config: Config, upcycle: UpcycleConfig) -> None:
        self._dense, self._options = dense, upcycle
        self._std = config.model.initializer_range
        there = dense.infos()
        dtype = there["model.embed_tokens.weight"].dtype
        shapes = expected_shapes(config.model, config.router)
        self._infos = {name: there.get(name) or TensorInfo(dtype, shape) for name, shape in shapes.items()}
        self._made = self._infos.keys() - there.keys()

    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, name: str, expert: int | None = None) -> Tensor:
        if name not in self._made:
            return self._dense.read(name, expert)
        if name.endswith(".mlp.gate.weight"):
            return self._router(name)
        layer, _, projection = name.rpartition(".experts.")
        if expert is None:
            experts = self._infos[name].shape[0]
            return torch.stack([self.read(name, one) for one in range(experts)])
        if projection == "down_proj":
            part_FH = self._part(layer, "down_proj", expert).mul_(self._options.granularity)
            return part_FH.T.contiguous().to(self._infos[name].dtype)
        both = [self._part(layer, one, expert) for one in ("gate_proj", "up_proj")]
        return torch.cat(both).to(self._infos[name].dtype)

    def _router(self, name: str) -> Tensor:
        """[E, H]: a row for each copy, the same for its parts."""
        experts, hidden = self._infos[name].shape
        copies = experts // self._options.granularity
        rows_EH = torch.empty(copies, hidden).normal_(0, self._std, generator=self._generator(name))
        return rows_EH.repeat_interleave(self._options.granularity, 0).to(self._infos[name].dtype)

    def _part(self, layer: str, projection: str, expert: int) -> Tensor:
        """Expert `expert`'s hidden dimensions of one dense matrix, float32 [f, H] (of down_proj transposed)."""
        dense = self._dense.read(f"{layer}.{projection}.weight").float()
        whole_FH = dense.T if projection == "down_proj" else dense
        options = self._options
        size = whole_FH.shape[0] // options.granularity
        part = expert % options.granularity
        part_FH = whole_FH[part * size : (part + 1) * size].clone()
        generator = self._generator(f"{layer}.{projection}/{expert}")
        if options.reinit_ratio:
            chosen = torch.randperm(size, generator=self._generator(f"{layer}/{expert}"))
            rows = chosen[: round(options.reinit_ratio * size)]
            mean, std = float(whole_FH.mean()), float(whole_FH.std())
            part_FH[rows] = torch.empty(len(rows), whole_FH.shape[1]).normal_(mean, std, generator=generator)
        if options.noise:
            std = options.noise * float(whole_FH.std())
            part_FH += torch.empty(part_FH.shape).normal_(0, std, generator=generator)
        return part_FH

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self._options.seed, f"upcycle/{name}"))
