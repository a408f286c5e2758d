"""What all pages share: the document around their content, and the way they are written to a folder."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from moe.report import palette


def document(
    *,
    kind: str,
    name: str,
    brief: Sequence[str],
    content: str,
    footer: str,
    scripts: Sequence[str],
    styles: Sequence[str] = (),
    tiles: str = "",
    bar: str = "",
    before_scripts: str = "",
    images: str = "data:",
) -> str:
    """A whole page, which loads nothing: the policy in its head allows these `scripts` and no others.

    `kind`, `name`, `brief` and `footer` are text; `content`, `tiles`, `bar` and `before_scripts` are HTML; `images` are
    the sources of images that the policy allows.
    """
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; img-src {images}"
    style = "\n".join((asset("moe.report", "page.css"), palette.css(), *styles))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} · {escape(kind.lower())}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<div class="top"><p class="kicker">{escape(kind)}</p>
<button type="button" id="theme" class="js-only" aria-label="Switch between light and dark">◐</button></div>
<h1>{escape(name)}</h1>
<ul class="brief">{"".join(f"<li>{escape(phrase)}</li>" for phrase in brief)}</ul>
{tiles}
</header>
{bar}
<main id="main">
{content}
</main>
<footer><p>{escape(footer)}</p></footer>
{before_scripts}
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def put(page: str, folder: Path) -> Path:
    """Writes FOLDER/report.html in one move, so that a browser that reloads never sees half a page."""
    target = folder / "report.html"
    beside = folder / f".report.{os.getpid()}.html"
    beside.unlink(missing_ok=True)  # what lies there may be a link to another file
    with beside.open("xb") as file:  # `replace`: JSON may hold half a surrogate pair, which no encoding can write
        file.write(page.encode("utf-8", errors="replace"))
    os.replace(beside, target)
    return target


def asset(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
