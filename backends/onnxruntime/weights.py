"""Reading weights into ONNX tensors, once each, when the model is written."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.types import FLOAT8, ONNX
from moec.ir import DType, Weight
from moec.ir.arrays import BYTES

_FLOAT8 = {DType.F8E4M3: ml_dtypes.float8_e4m3fn, DType.F8E5M2: ml_dtypes.float8_e5m2}


class WeightReader:
    """Keeps the last weight read, because its experts are asked for one after another."""

    def __init__(self) -> None:
        self._last: tuple[Weight, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def read(
        self, weight: Weight, dtype: DType, transform: Callable[[torch.Tensor], torch.Tensor], name: str
    ) -> onnx.Tensor:
        """`transform` of a weight as an ONNX tensor of `dtype`."""
        with self._lock:
            if self._last is None or self._last[0] is not weight:
                self._last = (weight, weight.load().detach().cpu())
            data = self._last[1]
        return onnx.Tensor(as_numpy(transform(data), dtype), dtype=ONNX[dtype], name=name)

    def forget(self) -> None:
        self._last = None


def as_numpy(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """A contiguous array of `dtype`; shares memory where it can."""
    if dtype in FLOAT8:
        return tensor.contiguous().view(torch.uint8).numpy().view(_FLOAT8[dtype])
    if DType.of(tensor.dtype) in BYTES:
        return tensor.contiguous().view(dtype.torch).numpy()
    return tensor.to(dtype.torch).contiguous().numpy()
