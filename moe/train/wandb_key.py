"""Whether W&B would find an API key on this machine, without asking a server or importing wandb."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit

KEY, NETRC, BASE_URL = "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"
DEFAULT_URL = "https://api.wandb.ai"


def find_key() -> tuple[bool, dict[str, str]]:
    """(whether there is a key, {variable: what is wrong with it}).

    With a netrc that can't be read, or a server address that isn't one, W&B itself would fail: no key is found there.
    """
    wrong: dict[str, str] = {}
    url = os.environ.get(BASE_URL, DEFAULT_URL)
    host = ""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        pass
    if not host:
        wrong[BASE_URL] = f"{BASE_URL}={url} must be an address as in {DEFAULT_URL}"
    path = os.environ.get(NETRC) or os.path.expanduser("~/.netrc")
    known = None
    try:
        known = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        pass
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        wrong[NETRC] = f"{path} can't be read ({' '.join(str(error).split())})"
    return bool(host) and bool(os.environ.get(KEY) or known), wrong
