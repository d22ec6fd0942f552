"""The backend: which kernel takes which op, what torch moves around, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moec.backends.base import Backend, F, ships
from moec.backends.triton.codegen import Custom, custom_expression, expression
from moec.backends.triton.runner import launch, mode, run
from moec.ir import DType, Graph, Node, all_ops, lookup
from moec.ir.arrays import OPAQUE
from moec.ir.ops.extern_aten import FORMS, NAMES, op_of

if TYPE_CHECKING:
    from moec.backends.triton.executable import TritonExecutable

WIDE_UNSIGNED = {DType.U64, DType.U32, DType.U16}  # torch computes with none of them
DTYPES = frozenset(DType) - {DType.C64, DType.F8E5M2} - WIDE_UNSIGNED - (OPAQUE - {DType.I4})

_KERNEL_FLOATS = (DType.F32, DType.BF16, DType.F16)
_MAX_WIDTH, _MAX_EXPERTS, _MAX_HEAD = 65536, 4096, 1024
_MAX_GROUP = 128
_SCORINGS = ("softmax", "sigmoid", "topk_softmax")
_FP8_UNIT = 2.0**-16  # measured on an H100: ‖error‖ = 1.1e-5 · √terms, and the same from cuBLAS
_GPU_GROUP = 32

_MOVES = "moves or repeats elements, computes nothing: views and copies of torch"
_MAKES = "makes a constant"
_REDUCES = "reduction or scan without a kernel of its own"
_SORTS = "sorting"
_PRODUCT = "product of two activations: torch's batched matmul"

_STEPS = "one small product after the other"
TORCH_OPS: dict[str, str] = {
    "tensor.constant": _MAKES, "tensor.full": _MAKES, "tensor.arange": _MAKES, "tensor.dim": _MAKES,
    "tensor.reshape": _MOVES, "tensor.transpose": _MOVES, "tensor.expand": _MOVES, "tensor.slice": _MOVES,
    "tensor.concat": _MOVES, "tensor.split": _MOVES, "tensor.pad": _MOVES, "tensor.gather": _MOVES,
    "tensor.gather_elements": _MOVES, "tensor.index_put": _MOVES, "tensor.scatter_elements": _MOVES,
    "tensor.one_hot": _MOVES, "tensor.nonzero": "counting with atomics or sorting",
    "tensor.histc": "counting with atomics or sorting",
    "math.sum": _REDUCES, "math.prod": _REDUCES, "math.mean": _REDUCES, "math.amax": _REDUCES, "math.amin": _REDUCES,
    "math.any": _REDUCES, "math.all": _REDUCES, "math.argmax": _REDUCES, "math.cumsum": _REDUCES,
    "math.softmax": _REDUCES, "math.log_softmax": _REDUCES, "math.sort": _SORTS, "math.topk": _SORTS,
    "linear.matmul": _PRODUCT, "linear.grouped_matmul": "grouped product outside moe.experts",
    "linear.conv": "convolution: torch's own",
    "recurrent.lstm": _STEPS, "recurrent.gru": _STEPS, "recurrent.rnn": _STEPS,
    "quant.dequantize": "a weight that no kernel takes as codes (integers, odd blocks), expanded in every run",
}  # fmt: skip
"""Ops that run through their own reference in torch, on the device of their operands, and why."""


def torch_reason(node: Node, by: TritonBackend | None = None) -> str | None:
    """Why torch runs this node, or None where kernels do; in `by`, a copy of the backend with other lowerings."""
    if (by or backend).is_replaced(node.op):
        return None
    if node.op == "quant.quantize" and (_wrong_float(node) or not _per_token(node.attrs["block"])):
        return "blocks of several rows, or of a width that no kernel takes: weights, which are quantised once"
    return TORCH_OPS.get(node.op)


@dataclass(eq=False)
class TritonBackend(Backend):
    """Triton kernels on CUDA, or in Triton's interpreter on the CPU where there is no GPU (slow: for checking).

    A lowering gets the op with its fields set. The fields of an elementwise op are names of blocks, and the lowering
    returns an expression over them, which becomes part of a generated kernel (`codegen.function_names` may be called
    in it; bf16 and f16 are float32 there):

        backend.lowers("my.soft_cap")(lambda op: f"tanh({op.x} / {op.cap}) * {op.cap}")

    The fields of any other op are tensors and numbers; the lowering launches kernels and returns a tensor for each
    result:

        @backend.lowers("my.row_scale")
        def row_scale(op):
            y = torch.empty_like(op.x)
            backend.launch(row_scale_kernel, (op.x.shape[0],), op.x, op.scale, y, op.x.shape[1], BLOCK=1024)
            return y
    """

    keeps_weights: set[str] = field(default_factory=set)  # ops whose lowering takes weights as `Resident`

    def launch(
        self,
        kernel: Any,
        grid: int | Sequence[int] | Callable[[dict[str, Any]], Sequence[int]],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 2,
        **constants: Any,
    ) -> None:
        """Run a @triton.jit kernel over `grid` (a number or up to three; a function gets `constants`).

        args: tensors, of any strides, numbers and None, in the kernel's order; constants: its `tl.constexpr`
        parameters. CUDA tensors: on that GPU. CPU tensors: in Triton's interpreter, where no process with
        TRITON_INTERPRET=1 runs this in a worker process, to which the kernel goes as source text together with the
        functions, modules and numbers that it names; it may stand in any file or notebook cell.

        Raises CompileError for what is no kernel or names what cannot be sent, ValueError for a bad grid, TypeError
        for arguments that are not the kernel's, KernelError where the kernel fails in the worker.
        """
        launch(kernel, grid, args, num_warps=num_warps, num_stages=num_stages, constants=constants)

    def is_replaced(self, op: str) -> bool:
        """Whether an op that torch or a shipped kernel runs has got a lowering from outside."""
        return op in self.lowerings and not ships(self.lowerings[op])

    @property
    def custom(self) -> Custom:
        """The lowerings of elementwise ops that are not `codegen.expression`."""
        return {op: fn for op, fn in self.lowerings.items() if fn is not expression and lookup(op).elementwise}

    def check(self, node: Node) -> str | None:
        i4 = any(v is not None and v.dtype is DType.I4 for v in (*node.operands, *node.results))
        return "triton takes i4 in quant.dequantize only" if i4 and node.op != "quant.dequantize" else None

    def coarse_sums(self, node: Node) -> tuple[float, int] | None:
        """Hopper's tensor cores keep about 14 bits of a sum of FP8 products (DeepSeek-V3 report, §3.3.2; `make
        check-gpu` measures it); the kernels go on in f32 after every scale group."""
        if (
            node.op not in ("quant.scaled_linear", "quant.scaled_experts")
            or node.attrs["group"] is None
            or not _on_gpu()
        ):
            return None
        return _FP8_UNIT, (1 if node.op == "quant.scaled_linear" else 2) * node.attrs["group"]

    def _register(self, name: str, fn: Callable[..., Any]) -> None:
        super()._register(name, fn)
        self.keeps_weights.discard(name)

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> TritonExecutable:
        """`threads` and `options` have no meaning here."""
        from moec.backends.triton.executable import TritonExecutable  # it imports this module

        custom = self.custom
        for g in (graph, *graph.functions.values()):
            for node in g.nodes:
                if node.op in custom:
                    names = [f"x{i}" for i, v in enumerate(node.operands) if v is not None]
                    custom_expression(node, names, custom[node.op])
        return TritonExecutable(graph, self)


def _fits(node: Node) -> str | None:
    """What a shipped kernel cannot take; the reason, or None."""
    return None if torch_reason(node) else _wrong_float(node) or limits(node, _on_gpu())


def _wrong_float(node: Node) -> str | None:
    for v in node.operands:
        if v is not None and v.dtype.is_float and v.dtype not in (*_KERNEL_FLOATS, DType.F8E4M3):
            return f"the {node.op} kernel takes {', '.join(_KERNEL_FLOATS)}, got {v.dtype}"
    return None


def limits(node: Node, gpu: bool) -> str | None:
    """What the kernel of a node cannot take, on a GPU or in the interpreter; the reason, or None."""
    shape = next(v for v in node.operands if v is not None).shape
    match node.op:
        case "norm.rms" | "norm.add_rms":
            return None if _at_most(shape[-1], _MAX_WIDTH) else f"rows of {shape[-1]}, at most {_MAX_WIDTH}"
        case "moe.route":
            if node.attrs["scoring"] not in _SCORINGS:
                return f"scoring {node.attrs['scoring']}, the kernel has {', '.join(_SCORINGS)}"
            if node.attrs["normalize_min"]:
                return "a least sum of the weights"
            return None if _at_most(shape[1], _MAX_EXPERTS) else f"{shape[1]} experts, at most {_MAX_EXPERTS}"
        case "attention.sdpa":
            sizes = shape[3], node.operand("v").shape[3]
            if not sizes[0] or not all(_at_most(s, _MAX_HEAD) for s in sizes):
                return f"head sizes {sizes[0]} and {sizes[1]}, must be known and in 1 … {_MAX_HEAD}"
        case "attention.linear_attention":
            return None if _at_most(shape[3], _MAX_HEAD) else f"keys of {shape[3]}, at most {_MAX_HEAD}"
        case "quant.scaled_linear" | "quant.scaled_experts":
            group, width = node.attrs["group"], node.attrs["block"][1]
            codes = node.operand("weight" if node.op == "quant.scaled_linear" else "gate_up").dtype
            if codes is not DType.F8E4M3:
                return f"weights in {codes}, the kernel takes f8e4m3fn"
            if group not in (None, width):
                return f"activation groups of {group} against weight blocks {width} wide"
            if node.op == "quant.scaled_linear" and node.attrs["dtype"] not in _KERNEL_FLOATS:
                return f"results in {node.attrs['dtype']}"
            return _bad_width(width, _GPU_GROUP if gpu else 1)
    return None


def _on_gpu() -> bool:
    return torch.cuda.is_available() and mode("cuda") == "gpu"


def _per_token(block: tuple[int, int]) -> bool:
    return block[0] == 1 and _bad_width(block[1], 1) is None


def _at_most(size: Any, limit: int) -> bool:
    return isinstance(size, int) and size <= limit


def _bad_width(width: int, least: int) -> str | None:
    if width & (width - 1) or not least <= width <= _MAX_GROUP:
        return f"scale groups of {width}, must be a power of two in {least} … {_MAX_GROUP}"
    return None


backend = TritonBackend("triton", dtypes=DTYPES)

for _name in (n for n in NAMES if n not in FORMS):
    backend.refuses(op_of(_name), "it is torch's own op, for which there is no Triton kernel")


def _kernel(*ops: str) -> Callable[[F], F]:
    """As `backend.lowers`, for kernels that are run by name and take weights as `Resident`."""

    def register(fn: F) -> F:
        backend.lowers(*ops, check=_fits)(fn)
        backend.keeps_weights.update(ops)
        return fn

    return register


@_kernel("norm.rms")
def _rms(op: Any) -> Any:
    return run("rms_norm", op.x, op.weight, eps=op.eps)


@_kernel("norm.add_rms")
def _add_rms(op: Any) -> Any:
    return run("rms_norm", op.x, op.weight, eps=op.eps, residual=op.residual)


@_kernel("linear.linear")
def _linear(op: Any) -> Any:
    return run("linear", op.x, op.weight, op.bias)


@_kernel("quant.quantize")
def _quantize(op: Any) -> Any:
    return run("quantize", op.x, op.block[1])


@_kernel("quant.scaled_linear")
def _scaled_linear(op: Any) -> Any:
    return run(
        "fp8_linear", op.x, op.x_scale, op.weight, op.weight_scale, op.bias, block=op.block, out_dtype=op.dtype.torch
    )


@_kernel("moe.route")
def _route(op: Any) -> Any:
    return run(
        "route", op.logits, op.bias, k=op.k, scoring=op.scoring, normalize=op.normalize, scale=op.scale,
        normalize_eps=op.normalize_eps, n_group=op.n_group, topk_group=op.topk_group, group_score=op.group_score,
        masked_score=op.masked_score,
    )  # fmt: skip


@_kernel("moe.experts")
def _experts(op: Any) -> Any:
    return run(
        "experts", op.x, op.weights, op.experts, op.gate_up, op.down, op.gate_up_bias, op.down_bias,
        activation=op.activation, interleaved=op.interleaved, limit=op.limit, alpha=op.alpha,
        up_offset=op.up_offset,
    )  # fmt: skip


@_kernel("quant.scaled_experts")
def _scaled_experts(op: Any) -> Any:
    return run(
        "fp8_experts", op.x, op.weights, op.experts, op.gate_up, op.gate_up_scale, op.down, op.down_scale,
        op.gate_up_bias, op.down_bias, block=op.block, group=op.group, activation=op.activation, limit=op.limit,
        alpha=op.alpha, up_offset=op.up_offset,
    )  # fmt: skip


@_kernel("attention.sdpa")
def _attention(op: Any) -> Any:
    return run("attention", op.q, op.k, op.v, op.mask, op.sinks, scale=op.scale, causal=op.causal, softcap=op.softcap)


@_kernel("attention.linear_attention")
def _linear_attention(op: Any) -> Any:
    return run("linear_attention", op.q, op.k, op.v, op.decay, op.beta, op.state, scale=op.scale)


@backend.lowers(*TORCH_OPS)
def by_reference(op: Any) -> Any:
    """Run an op as its definition says."""
    return op.reference()


@backend.lowers("call.graph")
def _call(op: Any) -> Any:
    # the executable gives executables for the called graphs
    return op.functions[op.callee].run(op.args)


backend.lowers(*(o.name for o in all_ops() if o.elementwise))(expression)
backend.refuses("extern.*", "no kernels for ONNX operators outside of our op families")
