"""A matrix of layers × experts as a picture inside a small HTML page: a PNG of one pixel a value, enlarged."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark to light
MISSING = (160, 160, 160)


def matrix_page(name: str, rows: list[list[float | None]], layers: Sequence[int]) -> str:
    """The page. Rows are layers, by the model's numbers `layers`, columns experts, rows may differ in length; None is
    grey. At least one is a number."""
    width = max(len(row) for row in rows)
    values_LE = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows):
        values_LE[place, : len(row)] = [np.nan if value is None else value for value in row]
    least, most = float(np.nanmin(values_LE)), float(np.nanmax(values_LE))
    data = base64.b64encode(_png(_colours(values_LE, least, most))).decode()
    return (
        f'<!doctype html><meta charset="utf-8"><p style="font:14px sans-serif">{escape(name)}: rows are layers '
        f"{', '.join(map(str, layers))}; columns are experts; {least:.4g} (dark) to {most:.4g} (light)</p>"
        f'<img alt="{escape(name)}" style="width:100%;image-rendering:pixelated" src="data:image/png;base64,{data}">'
    )


def _colours(values_LE: np.ndarray, least: float, most: float) -> np.ndarray:
    """[L, E, 3] uint8."""
    places = (values_LE - least) / ((most - least) or 1.0)
    missing = np.isnan(places)
    at, anchors = np.linspace(0, 1, len(ANCHORS)), np.array(ANCHORS, dtype=float)
    filled = np.where(missing, 0.0, places)
    channels = [np.interp(filled, at, anchors[:, channel]) for channel in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    picture[missing] = MISSING
    return picture


def _png(pixels: np.ndarray) -> bytes:
    """A PNG (RFC 2083) of [height, width, 3] uint8."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # 0: the line is not filtered
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
