"""Where presets, the files GROUP/NAME.yaml, come from.

Four places, each replacing presets of the same name from those before it: the shipped ones, `./configs`, the folders of
`--config-dir` (laid out as configs/ is), and a file named as the value of a group (`model=mine.yaml`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.config.rules import require
from moe.errors import UserError

_added_dirs: list[Path] = []


def config_dir() -> Path:
    """The shipped YAML: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def add_config_dir(folder: Path) -> None:
    """Adds a folder in which presets are looked up. Raises UserError unless it has a folder named after a group."""
    folder = folder.resolve()
    require(folder.is_dir(), f"--config-dir {folder}: no such folder")
    require(
        any((folder / group).is_dir() for group in groups()),
        f"--config-dir {folder}: has no folder named after a group ({', '.join(groups())}); "
        "a preset lies in GROUP/NAME.yaml, as configs/model/small.yaml does",
    )
    if folder not in _added_dirs:
        _added_dirs.append(folder)


def added_dirs() -> list[Path]:
    return list(_added_dirs)


def groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def presets(group: str) -> dict[str, Path]:
    """{name that `group=NAME` accepts: its file}, sorted by name."""
    found = {path.stem: path for root in _roots() for path in (root / group).glob("*.yaml")}
    return dict(sorted(found.items()))


def choices(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return list(presets(group))


def _roots() -> list[Path]:
    here = Path("configs").resolve()
    local = [here] if here != config_dir() and any((here / group).is_dir() for group in groups()) else []
    return [config_dir(), *local, *_added_dirs]


@contextmanager
def composed_folder(overrides: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yields one folder with every preset, for Hydra, and `overrides` with preset files replaced by preset names.

    Raises UserError.
    """
    files: dict[str, Path] = {}
    named = [_named(override, files) for override in overrides]
    if len(_roots()) == 1 and not files:
        yield config_dir(), named
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="moe-configs-") as name:
        folder = Path(name)
        for path in config_dir().glob("*.yaml"):
            (folder / path.name).symlink_to(path)
        for group in groups():
            (folder / group).mkdir()
            own = {Path(key).name: path for key, path in files.items() if key.startswith(f"{group}/")}
            found = presets(group) | own
            for preset, path in found.items():
                (folder / group / f"{preset}.yaml").symlink_to(path)
            for override in named:
                key, _, preset = override.lstrip("+").partition("=")
                if key == group and preset in found:
                    _check_mapping(found[preset])
        yield folder, named


def _check_mapping(path: Path) -> None:
    """Raises UserError if a preset isn't a mapping of keys, YAMLError if it isn't YAML."""
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            loaded = yaml.safe_load(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} isn't UTF-8; save the file as UTF-8") from error
    require(loaded is None or isinstance(loaded, dict), f"{path}: must be a mapping of keys, as in hidden_size: 256")


def _named(override: str, files: dict[str, Path]) -> str:
    """Turns `model=mine.yaml` into `model=mine` and adds the file to `files` under the key model/mine."""
    match = re.fullmatch(rf"\+?(?P<group>{'|'.join(groups())})=(?P<path>.+\.ya?ml)", override)
    if match is None:
        return override
    path = Path(match["path"].strip("'\""))
    require(path.is_file(), f"{override}: no such file; `moe ls {match['group']}` lists presets")
    require(
        re.fullmatch(r"[\w.+-]+", path.stem) is not None,
        f"{override}: the file's name must be made of letters, digits and . _ + -, since it becomes the preset's name",
    )
    files[f"{match['group']}/{path.stem}"] = path.resolve()
    return f"{match['group']}={path.stem}"
