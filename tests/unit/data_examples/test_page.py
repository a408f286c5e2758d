from __future__ import annotations

import os
from pathlib import Path

from data.examples.page import Bar, Page, Sample, Table, commands, elapsed, percent

SCRIPT = """#!/usr/bin/env bash
# What it does.
set -euo pipefail
source launch/environment.sh
install_project ""

moe train run_dir=runs/x
"""


def test_page_has_figures_samples_commands_and_place(tmp_path: Path) -> None:
    script = tmp_path / "sums.sh"
    script.write_text(SCRIPT)
    page = Page(
        title="Sums",
        shows="Adds.",
        script=script,
        bars=[Bar("exact", "≥ 99 %", percent(9, 10), False)],
        tables=[Table("By seed", ("seed", "exact"), [(0, "90 %")], note="One seed.")],
        samples=[Sample("1+1=", "2", "2"), Sample("a|b<c", "x", "y"), Sample("q", "1", "1.0", right=True)],
        seconds=90,
    )
    page.write(tmp_path / "docs" / "sums.md")
    text = (tmp_path / "docs" / "sums.md").read_text()
    assert "| exact | ≥ 99 % | 90.00 % (9 of 10) | **no** |" in text
    assert "| 0 | 90 % |" in text
    assert "```bash\nmoe train run_dir=runs/x\n```" in text
    right, wrong = text.index("## Right"), text.index("## Wrong")
    assert right < text.index("<code>1.0</code>") < wrong < text.index("<code>a&#124;b&lt;c</code>")
    assert "| time | 1.5 minutes" in text
    assert "| torch | " in text


def test_commands_of_a_script_without_the_usual_head(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text("#!/bin/sh\necho 1\n")
    assert commands(tmp_path / "x.sh") == "echo 1"


def test_time_is_from_began_to_ended(tmp_path: Path) -> None:
    assert elapsed(tmp_path) is None
    for name, when in (("began", 100), ("ended", 160)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    assert elapsed(tmp_path) == 60
