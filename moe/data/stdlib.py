"""Text that comes with every Python: three domains for a first run without a download (`data=stdlib`).

- `python`: source of a fixed list of standard modules, cut at top-level definitions;
- `prose`: the language reference's topics (`pydoc_data.topics`) and the docstrings of modules that aren't in `python`,
  so that no sentence is in two domains;
- `arithmetic`: generated problems with their solutions, the same on every machine.

The lists name modules of Python 3.11 to 3.14, so the text is nearly the same everywhere. A module that a distribution
leaves out is skipped; the printed fingerprint shows whether two machines have the same corpus.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

PYTHON_MODULES = """
_collections_abc _compat_pickle _markupbase _osx_support _py_abc _pyio _strptime _threading_local _weakrefset abc
argparse ast base64 bdb bz2 cProfile calendar cmd code codecs codeop colorsys compileall configparser contextlib copy
copyreg csv dataclasses difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools genericpath
getopt getpass gettext glob graphlib gzip hashlib heapq hmac imaplib inspect io ipaddress linecache locale lzma mailbox
mimetypes modulefinder netrc ntpath numbers opcode operator optparse os pdb pickle pkgutil platform plistlib poplib
posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched
selectors shelve shlex shutil site smtplib socket socketserver ssl stat statistics stringprep subprocess symtable
tabnanny tarfile tempfile textwrap threading timeit tokenize trace traceback tracemalloc types typing uuid warnings
wave weakref webbrowser zipapp zipimport
""".split()  # noqa: SIM905
PROSE_PACKAGES = """
asyncio collections concurrent ctypes email html http importlib json logging multiprocessing sqlite3 tomllib unittest
urllib wsgiref xml xmlrpc zoneinfo
""".split()  # noqa: SIM905
DOMAINS = ("python", "prose", "arithmetic")

DOCUMENT_BYTES = 4096  # a module is cut at the first top-level definition after this many bytes
DOCSTRING_CHARACTERS = 80  # shorter docstrings ("Return x.") are left out: they repeat each other
ARITHMETIC_DOCUMENTS = 1600
ARITHMETIC_SEED = 20240108


def files(domain: str) -> list[Path]:
    """The files that a domain reads; [] for `arithmetic`, which reads none."""
    library = Path(sysconfig.get_path("stdlib"))
    if domain == "python":
        return [path for name in PYTHON_MODULES if (path := library / f"{name}.py").is_file()]
    if domain == "prose":
        modules = (path for name in PROSE_PACKAGES for path in sorted((library / name).rglob("*.py")))
        topics = library / "pydoc_data" / "topics.py"
        return [topics] * topics.is_file() + [path for path in modules if "test" not in path.relative_to(library).parts]
    return []


def documents(domain: str) -> Iterator[str]:
    """A domain's documents, always in the same order."""
    paths = files(domain)
    if domain == "python":
        for path in paths:
            yield from _split_module(path.read_text(encoding="utf-8"))
    elif domain == "prose":
        for path in paths:
            if path.name == "topics.py":
                yield from _topics(path)
            elif text := _docstrings(path.read_text(encoding="utf-8")):
                yield text
    else:
        yield from arithmetic()


def _split_module(source: str) -> Iterator[str]:
    """Cuts before top-level definitions, their decorators and comments included; the parts joined are the source."""
    part: list[str] = []
    size = 0
    for line in source.splitlines(keepends=True):
        opens = line.startswith(("def ", "class ", "async def ", "@"))
        if opens and size >= DOCUMENT_BYTES and not (part and part[-1].startswith(("@", "#"))):
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield "".join(part)


def _topics(path: Path) -> Iterator[str]:
    """The language reference's topics, read as a literal: no code of the file is run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def _docstrings(source: str) -> str:
    """A module's longer docstrings in order of appearance, a blank line between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and len(text) >= DOCSTRING_CHARACTERS:
            found.append((getattr(node, "lineno", 0), inspect.cleandoc(text)))
    return "\n\n".join(text for _, text in sorted(found)) + "\n" * bool(found)


def arithmetic() -> Iterator[str]:
    """Generated problems: each document is a title line and 6 to 12 problems of one kind.

    Only `Random.random` is used: it is the one method whose sequence Python guarantees across versions.
    """
    generator = random.Random(ARITHMETIC_SEED)

    def below(limit: int) -> int:
        return int(generator.random() * limit)

    for _ in range(ARITHMETIC_DOCUMENTS):
        title, problem = KINDS[below(len(KINDS))]
        digits = 1 + below(3)
        lines = [problem(below, 10**digits) for _ in range(6 + below(7))]
        yield f"{title}\n" + "".join(f"{line}\n" for line in lines)


Below = Callable[[int], int]


def _add(below: Below, limit: int) -> str:
    a, b = below(limit), below(limit)
    return f"{a} + {b} = {a + b}"


def _subtract(below: Below, limit: int) -> str:
    a, b = below(limit), below(limit)
    return f"{a} - {b} = {a - b}"


def _multiply(below: Below, limit: int) -> str:
    a, b = below(limit), below(13)
    return f"{a} * {b} = {a * b}"


def _divide(below: Below, limit: int) -> str:
    a, b = below(limit), 1 + below(12)
    return f"{a} divided by {b} is {a // b} with remainder {a % b}"


def _compare(below: Below, limit: int) -> str:
    a, b = below(limit), below(limit)
    relation = "greater than" if a > b else "less than" if a < b else "equal to"
    return f"{a} is {relation} {b}"


def _chain(below: Below, limit: int) -> str:
    a, b, c = below(limit), below(limit), below(10)
    return f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}"


def _sequence(below: Below, limit: int) -> str:
    start, step = below(limit), 1 + below(9)
    terms = [start + step * i for i in range(6)]
    return f"{', '.join(map(str, terms[:5]))}: the next is {terms[5]}"


def _story(below: Below, limit: int) -> str:
    name = ("Ana", "Ben", "Chen", "Dina", "Emil", "Fatima")[below(6)]
    thing = ("apples", "books", "coins", "stamps", "marbles", "pencils")[below(6)]
    have, more = 2 + below(limit), 2 + below(limit)
    if below(2):
        return f"{name} has {have} {thing} and buys {more} more. How many {thing} are there now? {have + more}"
    have += more
    return f"{name} has {have} {thing} and gives {more} away. How many {thing} are left? {have - more}"


KINDS: tuple[tuple[str, Callable[[Below, int], str]], ...] = (
    ("Add.", _add),
    ("Subtract.", _subtract),
    ("Multiply.", _multiply),
    ("Divide.", _divide),
    ("Compare.", _compare),
    ("Work it out step by step.", _chain),
    ("Continue the sequence.", _sequence),
    ("Answer the question.", _story),
)
