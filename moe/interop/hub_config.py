"""A Hugging Face config.json, read key by key: what a key asks for is either taken or refused, never overlooked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe.errors import UserError
from moe.untrusted import is_count, is_real, read_json, shown

FILE = "config.json"
# Keys that say nothing about what the model computes: provenance, generation's defaults, how outputs are returned.
DESCRIPTIVE = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "pad_token_id",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache", "use_return_dict", "_attn_implementation_autoset",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "max_length", "min_length", "temperature",
    "top_k", "top_p", "typical_p", "do_sample", "num_beams", "num_beam_groups", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty", "num_return_sequences",
    "early_stopping", "output_scores", "return_dict_in_generate", "finetuning_task", "task_specific_params", "prefix",
    "tokenizer_class", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "tf_legacy_loss", "use_bfloat16", "torchscript", "pretraining_tp",
})  # fmt: skip
EMPTY: tuple[Any, ...] = (None, False, "", [], {})


class HubConfig:
    """The values of one config.json. Raises UserError that names file, key, value and rule."""

    def __init__(self, folder: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = folder / FILE
        self.values, self.prefix = values, prefix
        self._taken: set[str] = set()

    @classmethod
    def read(cls, folder: Path) -> HubConfig:
        """Raises UserError, also where there is none."""
        path = folder / FILE
        try:
            values = read_json(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: a Hugging Face model folder has one") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: must be a JSON object, not {shown(values)}")
        return cls(folder, values)

    def take(self, key: str, default: Any, holds: Callable[[Any], bool], rule: str) -> Any:
        self._taken.add(key)
        value = self.values.get(key, default)
        if not holds(value):
            raise UserError(f"{self.path}: {self.prefix}{key}={shown(value)} must be {rule}")
        return value

    def count(self, key: str, default: int | None, at_least: int = 1) -> int:
        def holds(value: Any) -> bool:
            return is_count(value, 10**9) and value >= at_least

        return self.take(key, default, holds, f"a whole number from {at_least} to {10**9}")

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        return self.take(key, default, lambda v: v is None or (is_count(v, 10**9) and v > 0), "a number ≥ 1, or null")

    def real(self, key: str, default: float) -> float:
        return float(self.take(key, default, lambda v: is_real(v) and v >= 0, "a number ≥ 0"))

    def flag(self, key: str, default: bool) -> bool:
        return self.take(key, default, lambda value: isinstance(value, bool), "true or false")

    def only(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """The key is left out or has one of these values."""
        allowed = list(allowed)
        self._taken.add(key)
        if key in self.values and self.values[key] not in allowed:
            names = " or ".join(shown(value) for value in allowed)
            raise UserError(f"{self._stated(key)} is not supported ({why}): it must be {names}")

    def finish(self, ignored: Iterable[str]) -> None:
        """Raises UserError for a key that nobody took and whose value isn't empty."""
        for key, value in self.values.items():
            known = key in self._taken or key in DESCRIPTIVE or self.prefix + key in ignored
            if not known and value not in EMPTY:
                raise UserError(
                    f"{self._stated(key)} is not supported: it may change what the model computes; "
                    f"ignore_keys=[{self.prefix}{key}] imports without it"
                )

    def _stated(self, key: str) -> str:
        return f"{self.path}: {self.prefix}{key}={shown(self.values[key])}"
