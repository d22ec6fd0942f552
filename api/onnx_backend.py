"""moec as an ONNX backend (`onnx.backend.base`): a model is imported and runs in the reference or on ONNX Runtime.

from moec.onnx_backend import OnnxRuntimeBackend
outputs = OnnxRuntimeBackend.prepare(model).run(inputs)     # NumPy arrays in, NumPy arrays out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep

from moec.compiler import compile
from moec.frontend.onnx import Imported, import_onnx
from moec.ir import ArgumentTypeError
from moec.ir.arrays import from_numpy, to_numpy
from moec.passes.pipeline import Pipeline


class PreparedModel(BackendRep):
    """A compiled model. `extern`: operators that came in as themselves, with the reason; none where the whole graph is
    in terms of our op families."""

    def __init__(self, imported: Imported, backend: str, passes: Pipeline | None, threads: int | None):
        self.imported = imported
        self.compiled = compile(imported.graph, backend=backend, passes=passes, threads=threads)

    @property
    def extern(self) -> dict[str, str]:
        return self.imported.extern

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs as NumPy arrays. inputs: arrays or TensorProtos in the order of the model's inputs, or by name.

        Raises ArgumentTypeError/ArgumentValueError for inputs that do not fit.
        """
        names = [str(v.name) for v in self.imported.graph.inputs]
        if isinstance(inputs, dict):
            given = [inputs[n] for n in names if n in inputs]
        else:
            given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if len(given) != len(names):
            raise ArgumentTypeError(
                f"expected {len(names)} inputs ({', '.join(names)}), got {len(given)}", code="arguments"
            )
        return tuple(to_numpy(t) for t in self.compiled(*(from_numpy(as_array(x)) for x in given)))


def as_array(x: Any) -> np.ndarray:
    """An input as an array."""
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


class MoecBackend(Backend):
    """What the two backends share. `passes`: None for the default pipeline."""

    backend: ClassVar[str]
    passes: ClassVar[Pipeline | None] = None

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.split(":")[0] == "CPU"

    @classmethod
    def prepare(
        cls, model: onnx.ModelProto, device: str = "CPU", *, threads: int | None = None, **kwargs: Any
    ) -> PreparedModel:
        """Import and compile a model. Raises CompileError naming what is not supported."""
        if not cls.supports_device(device):
            raise ArgumentTypeError(f"device {device!r}: CPU only", code="arguments")
        return PreparedModel(import_onnx(model), cls.backend, cls.passes, threads)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: Any, inputs: Any, device: str = "CPU", outputs_info: Sequence[Any] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Run one operator, of the latest opset unless `opset_version` says otherwise."""
        arrays = [as_array(x) for x in inputs]
        names = [n for n in node.input if n]
        helper = onnx.helper
        ins = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, arrays, strict=True)
        ]
        outs = [helper.make_value_info(o, onnx.TypeProto()) for o in node.output if o]
        opset = kwargs.pop("opset_version", onnx.defs.onnx_opset_version())
        graph = helper.make_graph([node], "node", ins, outs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, opset)])
        return cls.run_model(model, arrays, device, **kwargs)


class ReferenceBackend(MoecBackend):
    """Import, then the reference interpreter, without passes."""

    backend = "reference"
    passes = Pipeline(())


class OnnxRuntimeBackend(MoecBackend):
    """Import, the default passes, then ONNX Runtime."""

    backend = "onnxruntime"
