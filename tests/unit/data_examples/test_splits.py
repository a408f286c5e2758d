"""No leak between the sides, and a split that nothing but the content decides."""

from __future__ import annotations

import random
from pathlib import Path

from data.examples.splits import asked, leaks, place, read_rows, split, write_rows

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(40) for b in range(40)]


def test_no_leak_with_copies_in_other_spellings() -> None:
    copies = [{"prompt": f" {row['prompt']} ", "completion": "?"} for row in ROWS]
    train, held_out = split(ROWS + copies, 0.1)
    assert len(train) + len(held_out) == 2 * len(ROWS)
    assert not leaks(train, held_out)
    assert not leaks(train, held_out, lambda row: row["prompt"].strip())


def test_leaks_are_found() -> None:
    assert leaks(ROWS, ROWS[:3]) == {"0+0=", "0+1=", "0+2="}


def test_order_and_other_rows_move_nothing() -> None:
    before = split(ROWS, 0.1)
    mixed = random.Random(0).sample(ROWS, len(ROWS))
    after = split(mixed[:500], 0.1)
    assert {asked(row) for row in after[1]} <= {asked(row) for row in before[1]}
    assert {asked(row) for row in after[0]} <= {asked(row) for row in before[0]}


def test_share_is_kept_and_grows_monotonically() -> None:
    small, large = (split(ROWS, share)[1] for share in (0.1, 0.3))
    assert abs(len(small) / len(ROWS) - 0.1) < 0.03  # 1,600 draws of 0.1: standard deviation 0.0075
    assert {asked(row) for row in small} <= {asked(row) for row in large}


def test_key_decides() -> None:
    train, held_out = split(ROWS, 0.2, key=lambda row: row["completion"])
    assert held_out
    assert not {row["completion"] for row in train} & {row["completion"] for row in held_out}


def test_place_is_sha256() -> None:
    # python3 -c 'import hashlib; print(hashlib.sha256(b"abc").hexdigest())' begins with ba7816bf 8f01cfea
    assert place("abc") == 0xBA7816BF8F01CFEA / 2**64


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [{"prompt": "é\n", "completion": '"'}]
    write_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert read_rows(tmp_path / "new" / "rows.jsonl") == rows
