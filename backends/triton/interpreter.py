"""Corrections to Triton's interpreter, which is silently wrong for the narrow float types.

Seen in triton 3.6 to 3.9: `tl.dot` on bfloat16 multiplies the raw 16-bit patterns, arithmetic on bfloat16 tensors does
too, float32 → bfloat16 truncates, and conversions to float8 neither round to nearest even, nor saturate, nor keep NaN.
On a GPU they do (`cvt.rn.satfinite`). Inside `exact_interpreter()` they do here as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as _interp

_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_MAX_FINITE = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_STORAGE = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16)}

_lock = threading.RLock()
_depth = 0
_saved: dict[str, Any] = {}


def _as_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(data, order="C"))
    return tensor.view(_NARROW[dtype]) if dtype in _NARROW else tensor


def _as_numpy(tensor: torch.Tensor, dtype: Any) -> np.ndarray:
    if dtype in _NARROW:
        tensor = tensor.view(_STORAGE[tensor.element_size()][1])
    return tensor.numpy()


def _torch_dtype(dtype: Any) -> torch.dtype:
    if dtype in _NARROW:
        return _NARROW[dtype]
    return torch.from_numpy(np.empty(0, _interp._get_np_dtype(dtype))).dtype


def convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Convert raw `data` of Triton type `source` to raw data of type `target`, as sm_90 does.

    Rounds to nearest even; float8 targets saturate (infinities too); NaN stays NaN.
    """
    tensor = _as_torch(data, source)
    if target in _MAX_FINITE:
        limit = _MAX_FINITE[target]
        tensor = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).clamp(-limit, limit)
    return _as_numpy(tensor.to(_torch_dtype(target)), target)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    toward_zero = rounding_mode is not None and rounding_mode != _interp._ir.ROUNDING_MODE.RTNE
    if toward_zero or (source not in _NARROW and target not in _NARROW):
        return _saved["_convert_float"](data, source, target, rounding_mode)
    result = convert(data, source, target)
    return result.view(getattr(np, f"uint{result.itemsize * 8}"))


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source in _NARROW or target in _NARROW:
        return _interp.TensorHandle(convert(src.data, source, target), target)
    return _saved["cast_impl"](self, src, dst_type)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if not a.dtype.scalar.is_floating() or a.dtype.primitive_bitwidth == 64:
        return _saved["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    lhs = convert(a.data, a.dtype.scalar, tl.float32)
    rhs = convert(b.data, b.dtype.scalar, tl.float32)
    return _interp.TensorHandle((np.matmul(lhs, rhs) + d.data).astype(d.data.dtype), d.dtype.scalar)


def _refuse_narrow(name: str) -> Callable[..., Any]:
    def method(self: Any, *handles_and_op: Any) -> Any:
        for handle in handles_and_op[:-1]:
            if handle.dtype.scalar in _NARROW:
                raise TypeError(
                    f"arithmetic on {handle.dtype.scalar} is wrong in the interpreter: convert to f32 first"
                )
        return _saved[name](self, *handles_and_op)

    return method


@contextmanager
def exact_interpreter() -> Iterator[None]:
    """Patch Triton's interpreter for the duration of the block (re-entrant); other users of it are left alone."""
    global _depth
    builder = _interp.InterpreterBuilder
    with _lock:  # the interpreter itself is not thread-safe: its grid position and its patches of tl are global
        if _depth == 0:
            _saved["_convert_float"] = _interp._convert_float
            for name in ("cast_impl", "create_dot", "binary_op", "unary_op"):
                _saved[name] = getattr(builder, name)
            _interp._convert_float = _convert_float
            builder.cast_impl, builder.create_dot = _cast_impl, _create_dot
            builder.binary_op, builder.unary_op = _refuse_narrow("binary_op"), _refuse_narrow("unary_op")
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            if _depth == 0:
                _interp._convert_float = _saved.pop("_convert_float")
                for name in list(_saved):
                    setattr(builder, name, _saved.pop(name))
