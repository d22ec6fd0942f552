"""Reading weights into ONNX tensors, once each, when the model is written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.types import FLOAT8, ONNX
from moec.ir import DType, Weight
from moec.ir.arrays import BYTES, NUMPY, to_numpy
from moec.ir.weight import loading_once


class WeightReader:
    """Keeps the last two weights read, because their experts are asked for one after another, codes and scales in turn;
    where a source has experts one by one, it reads just these."""

    def __init__(self) -> None:
        self._last: deque[tuple[Weight, torch.Tensor]] = deque(maxlen=2)
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
        data = transform(self.data(weight, index))
        return onnx.Tensor(as_numpy(data, dtype), dtype=ONNX[dtype], name=name)

    def data(self, weight: Weight, index: int | None = None) -> torch.Tensor:
        """A weight, or its matrix `index`."""
        with self._lock, loading_once():  # the session holds it from now on
            if index is not None and hasattr(weight.source, "part"):
                return weight.part(index).detach().cpu()
            found = next((t for w, t in self._last if w is weight), None)
            if found is None:
                found = weight.load().detach().cpu()
                self._last.append((weight, found))
            return found if index is None else found[index]

    def forget(self) -> None:
        self._last.clear()


def as_numpy(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """A contiguous array of `dtype`; shares memory where it can."""
    if dtype in FLOAT8:
        return tensor.contiguous().view(torch.uint8).numpy().view(NUMPY[dtype])
    if dtype in BYTES:
        return to_numpy(tensor)
    if DType.of(tensor.dtype) in BYTES:
        return tensor.contiguous().view(dtype.torch).numpy()
    return to_numpy(tensor.to(dtype.torch).contiguous())
