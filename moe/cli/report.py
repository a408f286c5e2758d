"""`moe report RUN_DIR`; for a sweep also a table in a Markdown page."""

from __future__ import annotations

from pathlib import Path

from moe.errors import ConfigError
from moe.report.page import write_report
from moe.report.sweep_markdown import Size, write_sweep_markdown
from moe.report.sweep_page import is_sweep, write_sweep_report
from moe.report.sweep_reader import TrialRow

KEYS = ("markdown", "reference")


def run_report(overrides: list[str]) -> None:
    """Raises UserError."""
    folders = [one for one in overrides if "=" not in one]
    given = dict(one.split("=", 1) for one in overrides if "=" in one)
    unknown = [key for key in given if key not in KEYS]
    if len(folders) != 1 or unknown:
        told = unknown[0] if folders and unknown else " ".join(overrides) or "(nothing)"
        raise ConfigError(
            f"report {told}: give one run directory, as in `moe report runs/tiny-stdlib`; of a sweep also "
            "markdown=PAGE.md reference=POINT"
        )
    folder = Path(folders[0])
    if not is_sweep(folder):
        if given:
            raise ConfigError(f"{next(iter(given))}=: {folder} isn't a sweep's folder: only a sweep has points")
        print(write_report(folder))
        return
    if bool(given.get("markdown")) != bool(given.get("reference")):
        raise ConfigError("markdown=PAGE.md and reference=POINT belong together: differences are to that point")
    print(write_sweep_report(folder))
    if given:
        page = Path(given["markdown"])
        write_sweep_markdown(folder, page, given["reference"], _size)
        print(page)


def _size(row: TrialRow) -> Size:
    from moe.cli.verbs import load
    from moe.plan import count_parameters  # which imports torch

    config = load(row.command)
    train = config.train
    total, active = count_parameters(config)
    return Size(total, active, train.steps * train.global_batch_size * train.sequence_length)
