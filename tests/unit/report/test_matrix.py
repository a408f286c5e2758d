"""A matrix as a picture: a PNG with a pixel for each value."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import numpy as np

from moe.report.matrix import ANCHORS, MISSING, matrix_page


def test_the_picture_has_a_pixel_for_each_value() -> None:
    page = matrix_page("a <b>", [[0.0, 1.0, 4.0], [None, 2.0]], [1, 3])
    assert "a &lt;b&gt;: rows are layers 1, 3; columns are experts; 0 (dark) to 4 (light)" in page
    (data,) = re.findall(r"base64,([^\"]+)", page)
    png = base64.b64decode(data)
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    at = png.index(b"IDAT")
    lines = zlib.decompress(png[at + 4 : at + 4 + struct.unpack(">I", png[at - 4 : at])[0]])
    pixels = np.frombuffer(lines, np.uint8).reshape(2, 10)[:, 1:].reshape(2, 3, 3)
    expected = [[ANCHORS[0], ANCHORS[1], ANCHORS[4]], [MISSING, ANCHORS[2], MISSING]]
    assert pixels.tolist() == np.array(expected).tolist()


def test_equal_values_are_a_picture_too() -> None:
    assert "0.5 (dark) to 0.5 (light)" in matrix_page("x", [[0.5, 0.5]], range(1))
