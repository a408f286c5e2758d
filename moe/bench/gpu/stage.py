"""Runs one stage in this process: `python -m moe.bench.gpu.stage MODULE RESULT.json DRY_RUN OUT FOLDER WORK`."""

from __future__ import annotations

import faulthandler
import importlib
import sys
from pathlib import Path

from moe.bench.gpu.record import Record
from moe.bench.gpu.settings import Settings


def main(arguments: list[str]) -> None:
    faulthandler.enable()  # prints the stacks when the runner ends a hanging stage with SIGABRT
    module, result, dry_run, out, folder, work = arguments
    record = Record(Path(result))
    importlib.import_module(module).run(Settings(dry_run == "true", Path(out), folder, work), record)


if __name__ == "__main__":
    main(sys.argv[1:])
