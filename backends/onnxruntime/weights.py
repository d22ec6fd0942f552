"""Reading weights into ONNX tensors, once each, when the model is written."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.types import FLOAT8, ONNX
from moec.ir import DType, Weight
from moec.ir.arrays import BYTES, NUMPY, to_numpy
from moec.ir.weight import loading_once


class WeightReader:
    """Keeps the last weight read, because its experts are asked for one after another; where a source has experts one
    by one, it reads just these."""

    def __init__(self) -> None:
        self._last: tuple[Weight, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def read(
        self,
        weight: Weight,
        dtype: DType,
        transform: Callable[[torch.Tensor], torch.Tensor],
        name: str,
        index: int | None = None,
    ) -> onnx.Tensor:
        """`transform` of a weight, or of matrix `index` along its first axis, as an ONNX tensor of `dtype`."""
        with self._lock, loading_once():  # the session holds it from now on
            if index is not None and hasattr(weight.source, "part"):
                data = weight.part(index).detach().cpu()
            else:
                if self._last is None or self._last[0] is not weight:
                    self._last = (weight, weight.load().detach().cpu())
                data = self._last[1] if index is None else self._last[1][index]
        return onnx.Tensor(as_numpy(transform(data), dtype), dtype=ONNX[dtype], name=name)

    def forget(self) -> None:
        self._last = None


def as_numpy(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """A contiguous array of `dtype`; shares memory where it can."""
    if dtype in FLOAT8:
        return tensor.contiguous().view(torch.uint8).numpy().view(NUMPY[dtype])
    if dtype in BYTES:
        return to_numpy(tensor)
    if DType.of(tensor.dtype) in BYTES:
        return tensor.contiguous().view(dtype.torch).numpy()
    return to_numpy(tensor.to(dtype.torch).contiguous())
