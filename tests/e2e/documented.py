"""The commands that the documents show: README.md, docs/, data/README.md, `moe --help`, the comments of launch/, and
what launch/quickstart.sh starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data/README.md"]
LAUNCH = sorted(path for path in (ROOT / "launch").iterdir() if path.is_file())
PROGRAMS = "moe|torchrun|python|bash|sbatch|sky|kubectl|pip"
BEFORE = r"(?:(?:[A-Z_]+=\S*|sudo|taskset -c \S+) )*"  # what may stand before the program
COMMAND = re.compile(rf"(?:\$ )?({BEFORE}(?:{PROGRAMS})(?: .*)?)$")
GPUS = 8  # of a machine, where a command doesn't say


@dataclass(frozen=True, slots=True)
class Command:
    """`arguments` are those of `moe`, None where the command isn't one; `ranks` None: as many as the reader has. A
    `sketch` leaves something out (`…`)."""

    where: str
    text: str
    arguments: tuple[str, ...] | None
    ranks: int | None
    sketch: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def commands() -> list[Command]:
    """Every documented command once, in the documents' order."""
    found: dict[tuple[object, ...], Command] = {}
    for where, text in (*_in_documents(), *_in_help(), *_in_launch()):
        if command := _parsed(where, text):
            key = (command.arguments, command.ranks) if command.arguments else (command.text,)
            found.setdefault(key, command)
    return list(found.values())


def _in_documents() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        name, fenced = str(path.relative_to(ROOT)), False
        for number, line in _joined(path.read_text(encoding="utf-8")):
            if line.startswith("```"):
                fenced = not fenced
                continue
            for text in [line] if fenced else re.findall(r"`([^`]+)`", line):
                yield f"{name}:{number}", text


def _in_help() -> Iterator[tuple[str, str]]:
    for _, line in _joined(cli.__doc__ or ""):
        yield "moe --help", _without_explanation(line)


def _in_launch() -> Iterator[tuple[str, str]]:
    for path in LAUNCH:
        name = str(path.relative_to(ROOT))
        for number, line in _joined(path.read_text(encoding="utf-8")):
            if line.startswith("#") and not line.startswith("#!"):
                comment = line.removeprefix("#")
                for text in (comment, comment.partition(": ")[2], *re.findall(r"`([^`]+)`", comment)):
                    yield f"{name}:{number}", _without_explanation(text)
            elif path.name == "quickstart.sh":
                yield (
                    f"{name}:{number}",
                    line.replace('"$run"', "runs/quickstart").replace('"$precision"', "bfloat16").removesuffix(' "$@"'),
                )


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """(number of the first, logical line): lines that end with a backslash go on in the next."""
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first if begun else number
        begun += line.lstrip("# ") if begun else line
        if begun.endswith("\\"):
            begun = begun.removesuffix("\\")
            continue
        yield first, begun
        begun = ""


def _without_explanation(line: str) -> str:
    return re.split(r" {2,}|\t", line.strip(), maxsplit=1)[0]


def _parsed(where: str, text: str) -> Command | None:
    """None where `text` is no command, or only the form of one (`moe VERB key=value …`)."""
    matched = COMMAND.match(text.strip())
    if matched is None:
        return None
    text = matched[1].strip()
    shown = re.sub(r"(?<!\S)\[[^\]]*\]?", "", text)  # [GROUP=NAME …]: what may follow
    try:
        words = shlex.split(shown, comments=True)
    except ValueError:  # an apostrophe: prose
        return None
    sketch = re.search(r"(?<!\S)…(?!\S)", shown) is not None
    words = [word for word in words if word != "…"]
    environment: dict[str, str] = {}
    while words and (words[0] in ("sudo", "taskset") or re.match(r"[A-Z_]+=", words[0])):
        word = words.pop(0)
        if word == "taskset":
            del words[:2]
        elif "=" in word:
            key, _, value = word.partition("=")
            environment[key] = value
    arguments, ranks = _arguments(words, environment)
    if arguments is not None and (not arguments or arguments[0] == "VERB"):
        return None
    if arguments is None and len(words) < 2:
        return None
    return Command(where, text, None if arguments is None else tuple(arguments), ranks, sketch)


def _arguments(words: list[str], environment: dict[str, str]) -> tuple[list[str] | None, int | None]:
    """What follows `moe` (None: it isn't started) and the number of ranks."""
    program, *rest = words
    if program == "moe":
        return rest, 1
    if program in ("torchrun", "python") and " -m moe " in f" {' '.join(rest)} ":
        ranks: int | None = 1
        if program == "torchrun":
            number = rest[rest.index("--nproc-per-node") + 1] if "--nproc-per-node" in rest else ""
            ranks = int(number) if number.isdecimal() else None
        return rest[rest.index("moe") + 1 :], ranks
    if program == "torchrun":
        return [], None
    if rest[:1] == ["launch/torchrun.sh"]:
        return rest[1:], int(environment.get("NPROC", GPUS)) * int(environment.get("NNODES", 1))
    if rest[:1] == ["launch/two_namespaces.sh"]:
        return rest[1:], 2 * int(environment.get("NPROC", 1))
    if program == "sbatch" and "launch/sweep_slurm.sbatch" in rest:
        return ["sweep", *rest[rest.index("launch/sweep_slurm.sbatch") + 1 :]], None
    if program == "sbatch":
        nodes = next((int(word.partition("=")[2]) for word in rest if word.startswith("--nodes=")), 2)
        return rest[rest.index("launch/slurm.sbatch") + 1 :], nodes * GPUS
    if program == "sky" and (given := [word for word in rest if word.startswith("ARGUMENTS=")]):
        nodes = int(rest[rest.index("--num-nodes") + 1])
        return [word for word in given[0].partition("=")[2].split() if word != "…"], nodes * GPUS
    return None, None
