"""The typed graph IR."""

from moec.ir.builder import Builder
from moec.ir.dims import Dim
from moec.ir.errors import ArgumentTypeError, ArgumentValueError, ArtifactError, CompileError, require
from moec.ir.graph import Graph, Node, Value
from moec.ir.interpreter import run
from moec.ir.location import Frame, Location
from moec.ir.opdef import Attr, OpDef, Operand, Operands, OptionalOperand, all_ops, lookup, op
from moec.ir.parser import parse
from moec.ir.plans import Mesh, Placement, Quantization
from moec.ir.types import DType, TensorType
from moec.ir.weight import CheckedSource, ComputedSource, SafetensorsSource, TensorSource, Weight

__all__ = [
    "ArgumentTypeError", "ArgumentValueError", "ArtifactError", "Attr", "Builder", "CheckedSource", "CompileError",
    "ComputedSource", "DType", "Dim", "Frame", "Graph", "Location", "Mesh", "Node", "OpDef", "Operand", "Operands",
    "OptionalOperand", "Placement", "Quantization", "SafetensorsSource", "TensorSource", "TensorType", "Value",
    "Weight", "all_ops", "lookup", "op", "parse", "require", "run",
]  # fmt: skip
