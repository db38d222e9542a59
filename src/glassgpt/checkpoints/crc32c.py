"""CRC-32C (Castagnoli), the checksum that TensorFlow's files carry, at 1 to 4 GB/s in plain NumPy.

    hex(crc32c(b"123456789"))        # '0xe3069283'

A CRC is the remainder of the data, read as a polynomial over {0, 1}, divided by a fixed
polynomial P. The textbook loop goes byte by byte, in Python a few MB/s. But P also divides
x^5685 + x^1362 + x^426 + 1, and so a bit may be taken away if the bits 4323, 5259 and 5685 places
further on are flipped with it. Squaring a polynomial over {0, 1} doubles its exponents and does
nothing else, so the same holds for words of 2, 4, 8, ... bits: three XORs of long arrays take
4323 words away at once. This room knows no file.
"""

from __future__ import annotations

import numpy as np

_P = 0x82F63B78  # the polynomial without its leading term, lowest bit = highest power
_STEPS = (4323, 5259, 5685)  # where a word goes when it is folded into what follows
_CHUNK = 1 << 23  # bytes folded at a time: the copy that is written to stays small


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_P if byte & 1 else 0)
    return byte


_TABLE = [_remainder(byte) for byte in range(256)]


def crc32c(data: bytes | np.ndarray) -> int:
    """The checksum of bytes, or of an array's bytes as they lie in memory (C order)."""
    flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else _bytes_of(data)
    crc = 0xFFFFFFFF
    for start in range(0, len(flat), _CHUNK):
        crc = _update(crc, flat[start : start + _CHUNK])
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """As files store it, lest the checksum of data that hold checksums be degenerate."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _update(crc: int, data: np.ndarray) -> int:
    """Chunk (n,) uint8 after what gave `crc`."""
    if len(data) >= 4:
        data = data.copy()
        data[:4] ^= np.frombuffer(crc.to_bytes(4, "little"), np.uint8)  # the same as prepending it
        crc = 0
        for width in (64, 1):  # bytes to a word: long words first, the rest by single bytes
            data = _fold(data, width)
    for byte in data.tolist():
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc


def _fold(data: np.ndarray, width: int) -> np.ndarray:
    """The end of `data` (changed in place) that has the same remainder as all of it."""
    block, last = _STEPS[0] * width, _STEPS[-1] * width
    start = 0
    while len(data) - start >= block + last:
        words = data[start : start + block]
        for step in _STEPS:
            data[start + step * width : start + step * width + block] ^= words
        start += block
    return data[start:]
