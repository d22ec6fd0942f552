"""Reading .onnx files: nothing outside of the model's folder is opened, nothing is allocated before its size is known
to be there."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError

from moec.ir import CompileError
from moec.ir.arrays import from_numpy
from moec.ir.files_below import open_below

LARGEST = 2**31 - 1  # of a protobuf message
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip


def read_model(path: str | Path) -> onnx.ModelProto:
    """A model file, without its external data. Raises CompileError for what is no readable model."""
    path = Path(path)
    try:
        # without blocking, and what is checked is what is read: it may be a FIFO, or become one
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise CompileError(f"{path} is no file", code="file")
            if info.st_size > LARGEST:
                raise CompileError(
                    f"{path} has {info.st_size} bytes, an ONNX file at most {LARGEST}",
                    code="file",
                    hint="save it with external data",
                )
            with os.fdopen(os.dup(fd), "rb") as file:
                data = file.read(info.st_size)
        finally:
            os.close(fd)
    except (OSError, ValueError) as e:
        raise CompileError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}", code="file") from None
    if not data:
        raise CompileError(f"{path} is empty", code="file")
    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError:
        raise CompileError(f"{path} is no ONNX model, or is truncated", code="file") from None


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initialisers and attributes, in bodies and functions too."""

    def of_node(node: Any) -> Iterator[onnx.TensorProto]:
        for a in node.attribute:
            if a.HasField("t"):
                yield a.t
            yield from a.tensors
            if a.HasField("sparse_tensor"):
                yield from (a.sparse_tensor.values, a.sparse_tensor.indices)
            for g in ([a.g] if a.HasField("g") else []) + list(a.graphs):
                yield from of_graph(g)

    def of_graph(graph: Any) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for n in graph.node:
            yield from of_node(n)

    yield from of_graph(model.graph)
    for f in model.functions:
        for n in f.node:
            yield from of_node(n)


def check_tensor(t: onnx.TensorProto, folder: Path | None) -> None:
    """Shape, element type and the presence of all bytes. Raises CompileError."""
    what = f"tensor {t.name!r}"
    if not t.data_type and not t.ByteSize() - len(t.name.encode()) - 2 * bool(t.name):
        return  # left empty: the default of an attribute that is not there
    if t.data_type not in _BITS:
        raise CompileError(f"{what} has the unknown element type {t.data_type}", code="tensor")
    if any(d < 0 for d in t.dims):
        raise CompileError(f"{what} has a negative size: {list(t.dims)}", code="tensor")
    count = math.prod(t.dims)
    nbytes = -(-count * _BITS[t.data_type] // 8)
    if nbytes >= 2**63:
        raise CompileError(f"{what} of shape {list(t.dims)} is larger than any memory", code="tensor")
    if t.data_location == onnx.TensorProto.EXTERNAL:
        where = external(t)
        if folder is None:
            raise CompileError(
                f"{what} lies in the file {where.location!r}, and a model in memory has no folder",
                code="external-data",
                hint="pass the path of the .onnx file",
            )
        if where.length not in (None, nbytes):
            raise CompileError(
                f"{what} of shape {list(t.dims)} has {nbytes} bytes, its external data {where.length}",
                code="external-data",
            )
        with opened(folder, where.location, what) as fd:
            size = os.fstat(fd).st_size
        if where.offset + nbytes > size:
            raise CompileError(
                f"{what} ends at byte {where.offset + nbytes} of {where.location!r}, which has {size}",
                code="external-data",
            )
        return
    if t.data_type == onnx.TensorProto.STRING:
        stored, expected = len(t.string_data), count
    elif t.HasField("raw_data"):
        stored, expected = len(t.raw_data), nbytes
    else:
        fields = (t.float_data, t.int32_data, t.int64_data, t.double_data, t.uint64_data)
        stored = sum(map(len, fields))
        expected = count
        if t.data_type in (14, 15):
            expected = 2 * count
        elif _BITS[t.data_type] < 8:
            expected = nbytes
    if stored != expected:
        raise CompileError(
            f"{what} of shape {list(t.dims)} should have {expected} stored elements or bytes, it has {stored}: "
            "truncated or malformed",
            code="tensor",
        )


@dataclass(frozen=True)
class External:
    location: str
    offset: int
    length: int | None


def external(t: onnx.TensorProto) -> External:
    """Where the data of a tensor lies. Raises CompileError for entries that are no place."""
    entries = {e.key: e.value for e in t.external_data}
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError:
        raise CompileError(f"tensor {t.name!r}: external data at {entries} is no place", code="external-data") from None
    if not entries.get("location") or offset < 0 or (length is not None and length < 0):
        raise CompileError(f"tensor {t.name!r}: external data at {entries} is no place", code="external-data")
    return External(entries["location"], offset, length)


@contextmanager
def opened(folder: Path, location: str, what: str) -> Iterator[int]:
    """A descriptor of a file of external data: a regular file below `folder`, reached through no link. Raises
    CompileError."""
    parts = PurePosixPath(location).parts
    if not parts or location.startswith(("/", "\\")) or ".." in parts or "\\" in location or ":" in parts[0]:
        raise CompileError(
            f"{what}: external data at {location!r} is not inside the model's folder", code="external-data"
        )
    if "\0" in location:
        raise CompileError(f"{what}: external data at {location!r} is no file name", code="external-data")
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = open_below(at, parts)
        finally:
            os.close(at)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise CompileError(
                f"{what}: external data at {location!r} is reached by a link", code="external-data"
            ) from None
        raise CompileError(f"{what}: cannot read {location!r}: {e.strerror}", code="external-data") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CompileError(f"{what}: external data at {location!r} is no regular file", code="external-data")
        if info.st_nlink > 1:
            raise CompileError(f"{what}: external data at {location!r} is a hard link", code="external-data")
        yield fd
    finally:
        os.close(fd)


@dataclass(frozen=True)
class ExternalSource:
    """A tensor in a file beside the model, read when it is needed and checked again then."""

    folder: Path
    location: str
    offset: int
    shape: tuple[int, ...]
    data_type: int
    name: str

    def load(self) -> torch.Tensor:
        what = f"tensor {self.name!r}"
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.data_type)
        count = math.prod(self.shape)
        with opened(self.folder, self.location, what) as fd, os.fdopen(os.dup(fd), "rb") as file:
            if self.offset + count * dtype.itemsize > os.fstat(fd).st_size:
                raise CompileError(f"{what}: {self.location!r} has become shorter", code="external-data")
            file.seek(self.offset)
            data = np.fromfile(file, dtype=np.uint8, count=count * dtype.itemsize)
        return from_numpy(data.view(dtype).reshape(self.shape))


@dataclass(frozen=True, eq=False)
class ProtoSource:
    """A tensor inside the model."""

    proto: onnx.TensorProto

    def load(self) -> torch.Tensor:
        return from_numpy(onnx.numpy_helper.to_array(self.proto))
