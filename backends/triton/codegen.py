"""From elementwise IR nodes to Triton source text.

A group of nodes becomes a *body*: one assignment per node over the loaded inputs x0, x1, … . `render` puts loads,
stores and index arithmetic for a concrete memory layout around it. Narrow floats are computed in float32 and rounded
to the node's dtype after every node, as the reference does.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moec.backends.base import describe, lowering_failed, returned
from moec.ir import CompileError, DType, Node, Value
from moec.ir.types import broadcast

_TL = {
    DType.F64: "tl.float64", DType.F32: "tl.float32", DType.F16: "tl.float16", DType.BF16: "tl.bfloat16",
    DType.F8E4M3: "tl.float8e4nv", DType.I64: "tl.int64", DType.I32: "tl.int32", DType.I16: "tl.int16",
    DType.I8: "tl.int8", DType.U8: "tl.uint8", DType.BOOL: "tl.int1",
}  # fmt: skip
_NARROW = (DType.F16, DType.BF16, DType.F8E4M3)

Custom = Mapping[str, Callable[[Any], str]]
"""Expressions of elementwise ops that a backend does not take from here, by op."""

_UNARY = {
    "neg": "-{0}", "abs": "tl.abs({0})", "sign": "sign({0})", "exp": "tl.exp({0})", "log": "tl.log({0})",
    "log1p": "log1p({0})", "sqrt": "square_root({0})", "rsqrt": "reciprocal(square_root({0}))",
    "reciprocal": "reciprocal({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "tanh": "tanh({0})",
    "erf": "tl.erf({0})", "sigmoid": "sigmoid({0})", "silu": "silu({0})", "relu": "relu({0})",
    "softplus": "softplus({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})", "round": "round_even({0})",
    "isnan": "{0} != {0}", "not": "~{0}",
}  # fmt: skip
_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "divide({0}, {1})", "pow": "power({0}, {1})",
    "max": "larger({0}, {1})", "min": "smaller({0}, {1})", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
}  # fmt: skip


def register(dtype: DType) -> str:
    """The Triton type in which values of `dtype` are computed."""
    return "tl.float32" if dtype in _NARROW else _TL[dtype]


def literal(value: Any, dtype: DType) -> str:
    """A block filled with `value`, rounded to `dtype` first."""
    number = torch.tensor(value, dtype=dtype.torch).item()
    text = f'float("{number}")' if isinstance(number, float) and not -1e308 < number < 1e308 else repr(number)
    return f"tl.full((BLOCK,), {text}, {register(dtype)})"


def _cast(x: str, source: DType, target: DType) -> str:
    if target is DType.BOOL:
        return f"{x} != 0"
    return x if register(source) == register(target) else f"({x}).to({register(target)})"


def _clamp(x: str, dtype: DType, low: Any, high: Any) -> str:
    for bound, sign in ((low, "<"), (high, ">")):
        if bound is not None:
            x = f"tl.where({x} {sign} {literal(bound, dtype)}, {literal(bound, dtype)}, {x})"
    return x


def _rounded(x: str, dtype: DType) -> str:
    return f"({x}).to({_TL[dtype]}).to(tl.float32)" if dtype in _NARROW else x


def expression(node: Node, operands: Sequence[str], custom: Custom = MappingProxyType({})) -> str:
    """Triton expression of an elementwise node over named operands, rounded to the node's dtype.

    Raises CompileError on an op that has none.
    """
    if node.op in custom:
        return _rounded(custom_expression(node, operands, custom[node.op]), node.results[0].dtype)
    family, name = node.op.split(".")
    dtype = node.results[0].dtype
    source = next(v.dtype for v in node.operands if v is not None)
    integer = source.is_integer
    if family != "math" or dtype not in _TL:
        raise CompileError(f"no generated kernel for {node.op}", code="unsupported-op", location=node.location)
    match name:
        case "cast":
            text = _cast(operands[0], source, dtype)
        case "where":
            text = "tl.where({}, {}, {})".format(*operands)
        case "clamp":
            text = _clamp(operands[0], source, node.attrs["low"], node.attrs["high"])
        case "gelu":
            text = f"gelu{'_tanh' if node.attrs['approximate'] == 'tanh' else ''}({operands[0]})"
        case "swiglu":
            text = f"{_rounded(f'silu({operands[0]})', dtype)} * {operands[1]}"
        case "floordiv":
            text = f"floor_divide{'_int' if integer else ''}({operands[0]}, {operands[1]})"
        case "mod":
            text = f"modulo{'_int' if integer else ''}({operands[0]}, {operands[1]})"
        case _ if name in _UNARY:
            text = _UNARY[name].format(*operands)
        case _ if name in _BINARY:
            text = _BINARY[name].format(*operands)
        case _:
            raise CompileError(f"no generated kernel for {node.op}", code="unsupported-op", location=node.location)
    return _rounded(text, dtype)


def custom_expression(node: Node, operands: Sequence[str], fn: Callable[[Any], str]) -> str:
    """The expression that a lowering from outside of moec, `fn`, gives, not rounded.

    Raises CompileError naming the lowering's file:line where it is no expression over the operands, `tl` and the
    functions of `scalar_math`, or where the op is not elementwise.
    """
    types = [v.type for v in node.operands if v is not None]
    if len(node.results) != 1 or node.results[0].shape != broadcast(*(t.shape for t in types)):
        shown = ", ".join(str(r.type) for r in node.results)
        raise CompileError(
            f"{node.op} is declared elementwise, but makes ({shown}) of ({', '.join(map(str, types))})",
            code="lowering", location=node.location,
            hint="without elementwise=True its lowering launches a kernel of its own",
        )  # fmt: skip
    names = iter(operands)
    try:
        text = fn(node.opdef.instance([None if v is None else next(names) for v in node.operands], node.attrs))
    except Exception as error:  # whatever a lowering does wrong is said with its place
        failed = lowering_failed(fn, node, error)
        failed.hint = (
            "the lowering of an elementwise op gets the op with names of blocks as operands, and returns an expression "
            'as text: lambda op: f"tanh({op.x}) * {op.scale}"'
        )
        raise failed from error
    (text,) = returned(fn, node, text, str)
    _check_expression(fn, node, text, operands)
    return text


def _check_expression(fn: Callable[..., Any], node: Node, text: str, operands: Sequence[str]) -> None:
    try:
        named = {n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)}
    except SyntaxError as error:
        raise lowering_failed(fn, node, ValueError(f"{text!r} is no expression: {error.msg}")) from None
    known = function_names()
    for name in sorted(named - known - set(operands) - {"tl", "float", "int", "inf", "nan"}):
        near = difflib.get_close_matches(name, known, 1)
        raise CompileError(
            f"the lowering of {node.op} ({describe(fn)}) names {name!r} in {text!r}",
            code="lowering", location=node.location,
            hint=f"did you mean {near[0]!r}?" if near else f"besides tl there are {', '.join(sorted(known))}",
        )  # fmt: skip
    if not named & set(operands):
        raise lowering_failed(fn, node, ValueError(f"{text!r} uses no operand"))


@lru_cache(maxsize=1)
def function_names() -> frozenset[str]:
    """The functions that an expression may call, read without importing triton."""
    tree = ast.parse(Path(__file__).with_name("kernels").joinpath("scalar_math.py").read_text("utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


def _assertions(node: Node, name: str, custom: Custom) -> list[str]:
    """Statements that hold an expression from outside to its type: a store would convert anything."""
    if node.op not in custom:
        return []
    where, dtype = describe(custom[node.op]), node.results[0].dtype
    said = [f"{node.op} ({where}): the expression {what}" for what in (f"is not {dtype}", "is not one value each")]
    return [
        f"tl.static_assert({name}.shape == [BLOCK], {said[1]!r})",
        f"tl.static_assert({name}.dtype == {register(dtype)}, {said[0]!r})",
    ]


def expressible(node: Node) -> bool:
    """Whether `expression` knows the op."""
    try:
        expression(node, ["x"] * len(node.operands))
    except CompileError:
        return False
    return True


@dataclass(frozen=True)
class Program:
    """Body of a generated kernel over blocks x0, x1, …; `outputs`: (variable, dtype) pairs."""

    body: str
    outputs: tuple[tuple[str, torch.dtype], ...]


def program(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    literals: Mapping[Value, str],
    outputs: Sequence[Value],
    custom: Custom = MappingProxyType({}),
) -> Program:
    """The program that computes `outputs` from `inputs` through `nodes` (in SSA order)."""
    names = dict(literals) | {v: f"x{i}" for i, v in enumerate(inputs)}
    lines = []
    for i, node in enumerate(nodes):
        operands = [names[v] for v in node.operands if v is not None]
        # a name, so that a literal used twice is made once
        lines += [f"c{i}_{k} = {text}" for k, text in enumerate(operands) if text.startswith("tl.full")]
        operands = [f"c{i}_{k}" if text.startswith("tl.full") else text for k, text in enumerate(operands)]
        lines += [f"v{i} = {expression(node, operands, custom)}", *_assertions(node, f"v{i}", custom)]
        names[node.results[0]] = f"v{i}"
    return Program("\n".join(lines), tuple((names[v], v.dtype.torch) for v in outputs))


@dataclass(frozen=True)
class Layout:
    """How inputs lie in memory against a shape of `rank` axes.

    `inputs`: per input its dtype and the axes along which it moves, None where it is contiguous in the whole shape.
    `wide`: offsets need 64 bits.
    """

    rank: int
    inputs: tuple[tuple[torch.dtype, tuple[int, ...] | None], ...]
    wide: bool


def render(name: str, program: Program, layout: Layout) -> str:
    """Source text of the kernel `name`.

    Arguments: input pointers, output pointers, number of elements, sizes n1 … of all axes but the first, the strides
    of each input that is not contiguous, BLOCK. Booleans are bytes in memory.
    """
    strided = [(i, axes) for i, (_, axes) in enumerate(layout.inputs) if axes is not None]
    parameters = [f"x{i}_ptr" for i in range(len(layout.inputs))] + [f"y{i}_ptr" for i in range(len(program.outputs))]
    parameters += ["numel", *(f"n{d}" for d in range(1, layout.rank))]
    parameters += [f"x{i}_s{d}" for i, axes in strided for d in axes]
    block = "tl.program_id(0).to(tl.int64)" if layout.wide else "tl.program_id(0)"
    lines = [f"offset = {block} * BLOCK + tl.arange(0, BLOCK)", "inside = offset < numel"]
    if any(axes for _, axes in strided):
        lines.append("rest = offset")
        for d in range(layout.rank - 1, 0, -1):
            lines += [f"i{d} = rest % n{d}", f"rest = rest // n{d}"]
        lines.append("i0 = rest")
    for i, (dtype, axes) in enumerate(layout.inputs):
        where = "offset" if axes is None else " + ".join(f"i{d} * x{i}_s{d}" for d in axes) or "offset * 0"
        convert = " != 0" if dtype == torch.bool else f".to({register(DType.of(dtype))})"
        other = "0.0" if dtype.is_floating_point else "0"  # an integer cannot be cast to FP8
        lines.append(f"x{i} = tl.load(x{i}_ptr + {where}, mask=inside, other={other}){convert}")
    lines += program.body.split("\n")
    for i, (variable, dtype) in enumerate(program.outputs):
        stored = "tl.uint8" if dtype == torch.bool else f"y{i}_ptr.dtype.element_ty"
        lines.append(f"tl.store(y{i}_ptr + offset, {variable}.to({stored}), mask=inside)")
    head = f"def {name}({', '.join(parameters)}, BLOCK: tl.constexpr):\n"
    return head + "".join(f"    {line}\n" for line in lines)
