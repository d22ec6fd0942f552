"""The backend: which kernel takes which op, what torch moves around, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moec.backends.base import Backend
from moec.backends.triton.codegen import expression
from moec.backends.triton.runner import mode, run
from moec.ir import DType, Graph, Node, all_ops

if TYPE_CHECKING:
    from moec.backends.triton.executable import TritonExecutable

DTYPES = frozenset(DType) - {DType.C64, DType.I4, DType.U4, DType.F8E5M2}

_KERNEL_FLOATS = (DType.F32, DType.BF16, DType.F16)
_MAX_WIDTH, _MAX_EXPERTS, _MAX_HEAD = 65536, 4096, 1024
_MAX_GROUP = 128
_GPU_GROUP = 32

_MOVES = "moves or repeats elements, computes nothing: views and copies of torch"
_MAKES = "makes a constant"
_REDUCES = "reduction or scan without a kernel of its own"
_SORTS = "sorting"
_PRODUCT = "product of two activations: torch's batched matmul"

TORCH_OPS: dict[str, str] = {
    "tensor.constant": _MAKES, "tensor.full": _MAKES, "tensor.arange": _MAKES, "tensor.dim": _MAKES,
    "tensor.reshape": _MOVES, "tensor.transpose": _MOVES, "tensor.expand": _MOVES, "tensor.slice": _MOVES,
    "tensor.concat": _MOVES, "tensor.split": _MOVES, "tensor.pad": _MOVES, "tensor.gather": _MOVES,
    "tensor.gather_elements": _MOVES, "tensor.index_put": _MOVES, "tensor.scatter_elements": _MOVES,
    "tensor.one_hot": _MOVES, "tensor.histc": "counting with atomics or sorting",
    "math.sum": _REDUCES, "math.mean": _REDUCES, "math.amax": _REDUCES, "math.amin": _REDUCES, "math.any": _REDUCES,
    "math.all": _REDUCES, "math.argmax": _REDUCES, "math.cumsum": _REDUCES, "math.softmax": _REDUCES,
    "math.log_softmax": _REDUCES, "math.sort": _SORTS, "math.topk": _SORTS,
    "linear.matmul": _PRODUCT, "linear.grouped_matmul": "grouped product outside moe.experts",
    "quant.dequantize": "a weight that no FP8 kernel takes, expanded",
}  # fmt: skip
"""Ops that run through their own reference in torch, on the device of their operands, and why."""


def torch_reason(node: Node) -> str | None:
    """Why torch runs this node, or None where kernels do."""
    if node.op == "quant.quantize" and (_wrong_float(node) or not _per_token(node.attrs["block"])):
        return "blocks of several rows, or of a width that no kernel takes: weights, which are quantised once"
    return TORCH_OPS.get(node.op)


class TritonBackend(Backend):
    """Triton kernels on CUDA, or in Triton's interpreter on the CPU where there is no GPU (slow: for checking)."""

    def check(self, node: Node) -> str | None:
        if node.opdef.elementwise or torch_reason(node) or node.op == "call.graph":
            return None
        return _wrong_float(node) or _limits(node)

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> TritonExecutable:
        """`threads` and `options` have no meaning here."""
        from moec.backends.triton.executable import TritonExecutable  # it imports this module

        return TritonExecutable(graph)


def _wrong_float(node: Node) -> str | None:
    for v in node.operands:
        if v is not None and v.dtype.is_float and v.dtype not in (*_KERNEL_FLOATS, DType.F8E4M3):
            return f"the {node.op} kernel takes {', '.join(_KERNEL_FLOATS)}, got {v.dtype}"
    return None


def _limits(node: Node) -> str | None:
    """What the kernel of a node cannot take; the reason, or None."""
    shape = next(v for v in node.operands if v is not None).shape
    match node.op:
        case "norm.rms" | "norm.add_rms":
            return None if _at_most(shape[-1], _MAX_WIDTH) else f"rows of {shape[-1]}, at most {_MAX_WIDTH}"
        case "moe.route":
            return None if _at_most(shape[1], _MAX_EXPERTS) else f"{shape[1]} experts, at most {_MAX_EXPERTS}"
        case "attention.sdpa":
            sizes = shape[3], node.operand("v").shape[3]
            if not sizes[0] or not all(_at_most(s, _MAX_HEAD) for s in sizes):
                return f"head sizes {sizes[0]} and {sizes[1]}, must be known and in 1 … {_MAX_HEAD}"
        case "quant.scaled_linear" | "quant.scaled_experts":
            group, width = node.attrs["group"], node.attrs["block"][1]
            if group not in (None, width):
                return f"activation groups of {group} against weight blocks {width} wide"
            if node.op == "quant.scaled_linear" and node.attrs["dtype"] not in _KERNEL_FLOATS:
                return f"results in {node.attrs['dtype']}"
            return _bad_width(width, _GPU_GROUP if torch.cuda.is_available() and mode("cuda") == "gpu" else 1)
    return None


def _per_token(block: tuple[int, int]) -> bool:
    return block[0] == 1 and _bad_width(block[1], 1) is None


def _at_most(size: Any, limit: int) -> bool:
    return isinstance(size, int) and size <= limit


def _bad_width(width: int, least: int) -> str | None:
    if width & (width - 1) or not least <= width <= _MAX_GROUP:
        return f"scale groups of {width}, must be a power of two in {least} … {_MAX_GROUP}"
    return None


backend = TritonBackend("triton", dtypes=DTYPES)

# Kernel lowerings get the op with its fields set: attributes, and tensors or `Resident` weights.


@backend.lowers("norm.rms")
def _rms(op: Any) -> Any:
    return run("rms_norm", op.x, op.weight, eps=op.eps)


@backend.lowers("norm.add_rms")
def _add_rms(op: Any) -> Any:
    return run("rms_norm", op.x, op.weight, eps=op.eps, residual=op.residual)


@backend.lowers("linear.linear")
def _linear(op: Any) -> Any:
    return run("linear", op.x, op.weight, op.bias)


@backend.lowers("quant.quantize")
def _quantize(op: Any) -> Any:
    return run("quantize", op.x, op.block[1])


@backend.lowers("quant.scaled_linear")
def _scaled_linear(op: Any) -> Any:
    return run(
        "fp8_linear", op.x, op.x_scale, op.weight, op.weight_scale, op.bias, block=op.block, out_dtype=op.dtype.torch
    )


@backend.lowers("moe.route")
def _route(op: Any) -> Any:
    return run(
        "route", op.logits, op.bias, k=op.k, scoring=op.scoring, normalize=op.normalize, scale=op.scale,
        normalize_eps=op.normalize_eps, n_group=op.n_group, topk_group=op.topk_group, group_score=op.group_score,
        masked_score=op.masked_score,
    )  # fmt: skip


@backend.lowers("moe.experts")
def _experts(op: Any) -> Any:
    return run(
        "experts", op.x, op.weights, op.experts, op.gate_up, op.down, op.gate_up_bias, op.down_bias,
        activation=op.activation, interleaved=op.interleaved, limit=op.limit, alpha=op.alpha,
    )  # fmt: skip


@backend.lowers("quant.scaled_experts")
def _scaled_experts(op: Any) -> Any:
    return run(
        "fp8_experts", op.x, op.weights, op.experts, op.gate_up, op.gate_up_scale, op.down, op.down_scale,
        block=op.block, group=op.group, activation=op.activation,
    )  # fmt: skip


@backend.lowers("attention.sdpa")
def _attention(op: Any) -> Any:
    return run("attention", op.q, op.k, op.v, op.mask, scale=op.scale, causal=op.causal)


@backend.lowers(*TORCH_OPS)
def by_reference(op: Any) -> Any:
    """Run an op as its definition says."""
    return op.reference()


@backend.lowers("call.graph")
def _call(op: Any) -> Any:
    # the executable gives executables for the called graphs
    return op.functions[op.callee].run(op.args)


backend.lowers(*(o.name for o in all_ops() if o.elementwise))(expression)
