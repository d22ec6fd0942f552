"""Messages between a process and its interpreter worker: a JSON header followed by raw tensor bytes.

    8 bytes, little endian: length of the header
    header: {"message": tree, "tensors": [[dtype, shape], ...]}
    the bytes of each tensor, in order

A tree is JSON in which tuples, dtypes, tensors and references to tensors that the worker keeps are tagged lists. No
pickle: a message can only ever hold data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32, torch.float64,
    )
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Reference:
    """Stands in a message for a tensor that the worker already holds."""

    id: int


def _pack(value: Any, tensors: list[torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if isinstance(value, Reference):
        return ["reference", value.id]
    if isinstance(value, torch.dtype):
        return ["dtype", NAMES[value]]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", [_pack(item, tensors) for item in value]]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _pack(item, tensors) for key, item in value.items()}
    raise TypeError(f"cannot send a {type(value).__name__} to the interpreter worker")


def _unpack(value: Any, tensors: list[torch.Tensor], resolve: Callable[[int], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _unpack(item, tensors, resolve) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    kind, body = value
    if kind == "tensor":
        return tensors[body]
    if kind == "reference":
        return resolve(body)
    if kind == "dtype":
        return DTYPES[body]
    items = [_unpack(item, tensors, resolve) for item in body]
    return tuple(items) if kind == "tuple" else items


def _bytes(tensor: torch.Tensor) -> memoryview:
    # a row of one element is contiguous whatever its stride, and cannot be viewed as bytes then
    rows = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return rows.view(torch.uint8).numpy().data


def _read_exactly(stream: BinaryIO, buffer: memoryview) -> None:
    while len(buffer):
        count = stream.readinto(buffer)  # type: ignore[attr-defined]  # typeshed lacks readinto on BinaryIO
        if not count:
            raise EOFError("the other side closed the connection")
        buffer = buffer[count:]


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message. Raises TypeError for a value that has no encoding, OSError when the other side is gone."""
    tensors: list[torch.Tensor] = []
    tree = _pack(message, tensors)
    for tensor in tensors:
        if tensor.dtype not in NAMES:
            raise TypeError(f"cannot send a tensor of dtype {tensor.dtype} to the interpreter worker")
    meta = [[NAMES[tensor.dtype], list(tensor.shape)] for tensor in tensors]
    header = json.dumps({"message": tree, "tensors": meta}).encode()
    stream.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors:
        if tensor.numel():
            stream.write(_bytes(tensor))
    stream.flush()


def receive(stream: BinaryIO, resolve: Callable[[int], Any] = Reference) -> Any:
    """Read one message; `resolve` turns a reference into its tensor. Raises EOFError when the other side closed."""
    size = bytearray(8)
    _read_exactly(stream, memoryview(size))
    header = bytearray(int.from_bytes(size, "little"))
    _read_exactly(stream, memoryview(header))
    body = json.loads(header)
    tensors = []
    for name, shape in body["tensors"]:
        raw = torch.empty(math.prod(shape) * DTYPES[name].itemsize, dtype=torch.uint8)
        if raw.numel():
            _read_exactly(stream, raw.numpy().data)
        tensors.append(raw.view(DTYPES[name]).reshape(shape))
    return _unpack(body["message"], tensors, resolve)
