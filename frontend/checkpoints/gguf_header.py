"""The bounds of a GGUF header: every count and length in it fits in the file, before anything is allocated by them."""

from __future__ import annotations

import mmap
import os
import struct
from typing import IO

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type
_STRING, _ARRAY = 8, 9


def check_header(file: IO[bytes]) -> None:
    """Walk the header of a version 2 or 3 file. Raises ValueError where it leads past the end of the file."""
    if os.fstat(file.fileno()).st_size < 24:
        raise ValueError("it has less than 24 bytes")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.skip(4)
        version = self.number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, supported are 2 and 3 (little endian)")
        tensors, fields = self.number("<Q"), self.number("<Q")
        for _ in range(fields):
            self.string()
            self.value(self.number("<I"))
        for _ in range(tensors):
            self.string()
            dims = self.number("<I")
            if dims > 4:
                raise ValueError(f"a tensor has {dims} dimensions")
            self.skip(8 * dims + 12)

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY and depth < 2:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SIZES:
                self.skip(_SIZES[inner] * count)
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"a field has the unknown type {kind}")

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"byte {self.at} is followed by {count} more, which the file does not have")
        self.at += count
