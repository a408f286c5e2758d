"""The quick part of the fuzzer: other cases than the long run's, a few of each area."""

import pytest

from tests.fuzz.__main__ import describe, fuzz
from tests.fuzz.areas import AREAS


@pytest.mark.timeout(900)
def test_no_case_is_a_traceback_a_crash_a_hang_or_nonsense() -> None:
    said: list[str] = []
    ended = fuzz(100, 1, None, said.append)
    assert {one.case.area for _, one in ended} == AREAS.keys()
    assert {one.code for _, one in ended} >= {0, 2}
    assert [describe(number, one) for number, one in ended if one.fault] == []
