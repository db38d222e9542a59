"""Weights in 8 or 4 bits: a whole number times a scale.

    packed = quantize(matrix, "int8"); restored = packed.dequantize()    # (m, n) float32

Only matrices are quantised, and only for decoding: reading them is what a token costs. int8 has
one scale for each output channel (row); int4 one for every 32 weights of a row, rounded to float16,
as GGUF's Q4_0. This room is plain NumPy; the kernels read the layout described at `pack`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from glassgpt.config import WeightPrecision
from glassgpt.errors import UserError

GROUP = 32  # weights that share a scale in int4; columns are padded to a multiple of it
SPAN = 256  # columns whose products are summed as integers: 256 * 127 * 32767 < 2^31
_STRETCH = 1024  # rows, a multiple of ROWS
PANEL = 16  # rows that are stored side by side, one in each lane of a vector
ROWS = 2 * PANEL  # the kernels take two panels at a time: rows are padded to a multiple of it


class Quantized(NamedTuple):
    """A matrix (m, n) as numbers (m, n) int8 and scales (m, 1) for int8, (m, n / GROUP) for int4.

    n is padded with zeros to a multiple of GROUP.
    """

    numbers: np.ndarray
    scales: np.ndarray

    def dequantize(self) -> np.ndarray:
        """(m, n) float32, padding included."""
        m, n = self.numbers.shape
        grouped = self.numbers.reshape(m, self.scales.shape[1], -1) * self.scales[:, :, None]
        return grouped.reshape(m, n).astype(np.float32, copy=False)


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def quantize(matrix: np.ndarray, precision: WeightPrecision) -> Quantized:
    """Round (m, n) float32 to the nearest of 255 or 16 levels.

    int8: scale = largest / 127. int4: levels -8..7, the scale chosen so that the number that is
    largest in magnitude becomes -8 exactly (as Q4_0 of llama.cpp), so no level is lost.
    """
    m, n = matrix.shape
    matrix = np.pad(matrix, ((0, 0), (0, padded(n, GROUP) - n)))
    groups = matrix.reshape(m, -1, matrix.shape[1] if precision == "int8" else GROUP)
    if precision == "int8":
        scales = np.abs(groups).max(axis=2) / 127
    else:
        largest = np.abs(groups).argmax(axis=2)[:, :, None]
        scales = np.take_along_axis(groups, largest, axis=2)[:, :, 0] / -8
        with np.errstate(over="ignore"):
            scales = scales.astype(np.float16).astype(np.float32)
    if not np.isfinite(scales).all():
        raise UserError("the model's weights are not all numbers: they can't be quantised")
    steps = groups / np.where(scales == 0, 1, scales)[:, :, None]
    low, high = (-127, 127) if precision == "int8" else (-8, 7)
    numbers = np.clip(np.rint(steps), low, high).astype(np.int8)
    return Quantized(numbers.reshape(matrix.shape), scales)


def pack(quantized: Quantized, precision: WeightPrecision) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels read: panels of 16 rows, so that one load serves 16 outputs.

    Rows are padded to a multiple of ROWS. Numbers come in panels (m/16), each a sequence of column
    pairs: int8 [n/2][16 rows][2 columns]. int4 puts four pairs into one sequence of int16
    [n/8][16 rows][2]: bits 4j to 4j+3 of word h of a row are column 8k + 2j + h. Scales: int8
    (m), int4 [m/16][n/GROUP][16 rows].
    """
    numbers, scales = quantized
    n = numbers.shape[1]
    rows = padded(len(numbers), ROWS) - len(numbers)
    numbers = np.pad(numbers, ((0, rows), (0, 0)))
    scales = np.pad(scales, ((0, rows), (0, 0)))
    if precision == "int8":
        panels = numbers.reshape(-1, PANEL, n // 2, 2).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(panels).reshape(-1), scales.reshape(-1)
    parts = numbers.reshape(-1, PANEL, n // 8, 4, 2).astype(np.uint16) & 15
    words = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    words |= parts[:, :, :, 2] << 8 | parts[:, :, :, 3] << 12
    panels = words.view(np.int16).transpose(0, 2, 1, 3)
    scales = scales.reshape(-1, PANEL, n // GROUP).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).reshape(-1), np.ascontiguousarray(scales).reshape(-1)


def packed_sizes(rows: int, n: int, precision: WeightPrecision) -> tuple[int, int]:
    """How many numbers and scales `pack` makes of (rows, n); rows a multiple of ROWS."""
    size = rows * padded(n, GROUP)
    return (size, rows) if precision == "int8" else (size // 4, size // GROUP)


def quantize_into(
    numbers: np.ndarray, scales: np.ndarray, matrix: np.ndarray, precision: WeightPrecision
) -> None:
    """`quantize` and `pack` a matrix into these, a stretch of rows at a time to save memory."""
    number, scale = 0, 0
    for row in range(0, len(matrix), _STRETCH):
        packed = pack(quantize(matrix[row : row + _STRETCH], precision), precision)
        numbers[number : number + packed[0].size] = packed[0]
        halves = scales.dtype == np.uint16  # the bits of float16, which Numba does not know
        found = packed[1].astype(np.float16).view(np.uint16) if halves else packed[1]
        scales[scale : scale + found.size] = found
        number, scale = number + packed[0].size, scale + packed[1].size
