"""Steps of a random graph: one op each (and what brings its operands into shape), drawn from the ops' declarations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from moec.fuzzing.graphs import FLOATS, INTEGERS, NUMBERS, Grower
from moec.ir import CompileError, Dim, DType, Node, OpDef, TensorType, Value, all_ops
from moec.ir.arrays import BYTES, copied
from moec.ir.dims import product
from moec.ir.opdef import REQUIRED
from moec.ir.sampling import Sampler, cases

_NAMED = 11  # a size of the samples that stands for a symbol
_LEFT_OUT = ("call", "dist", "extern")  # made by `call`; run by several processes; not our own
_FLOAT8 = (DType.F8E4M3, DType.F8E5M2)
_ALL_DTYPES = (*FLOATS, *INTEGERS, DType.BOOL, *_FLOAT8)


@cache
def ops(elementwise: bool) -> tuple[OpDef, ...]:
    """What can be drawn: every shipped op that has samples."""
    return tuple(
        o
        for o in all_ops()
        if o.samples is not None
        and o.family not in _LEFT_OUT
        and o.elementwise == elementwise
        and o.cls.__module__.startswith("moec.")
    )


# -- elementwise ops ---------------------------------------------------------------------------------


@cache
def _patterns(opdef: OpDef) -> tuple[tuple[tuple[str, ...], tuple[tuple[str, Any], ...]], ...]:
    """The kinds of operands ("f", "i", "b"), and the attributes, that the op's samples show."""
    found: dict[Any, None] = {}
    for operands, attrs in cases(opdef, Sampler(2, 3, 5)):
        kinds = tuple("b" if t.dtype == torch.bool else "f" if t.is_floating_point() else "i" for t in operands)
        found[kinds, tuple(attrs.items())] = None
    return tuple(found)


def elementwise(g: Grower) -> Any:
    opdef = g.d.pick(ops(True))
    kinds, attrs = g.d.pick(_patterns(opdef))
    x = g.recent(lambda v: _kind(v.dtype) in kinds) or g.fit(TensorType(_dtype(g, kinds[0]), g.shape()))
    at = g.d.pick([i for i, k in enumerate(kinds) if k == _kind(x.dtype)] or [0])
    chosen = {k: x.dtype if k == _kind(x.dtype) else _dtype(g, k) for k in dict.fromkeys(kinds)}
    operands = [x if i == at else _partner(g, x, chosen[k]) for i, k in enumerate(kinds)]
    if opdef.name in ("math.floordiv", "math.mod") and operands[1].dtype.is_integer:
        operands[1] = g.b.max(operands[1], 1)
    if opdef.name == "math.cast":
        return g.cast(x, g.d.pick(_ALL_DTYPES))
    return g.b.op(opdef, operands, _changed(g, opdef, dict(attrs), x.dtype))


def _kind(dtype: DType) -> str:
    return "b" if dtype is DType.BOOL else "f" if dtype.is_float else "i"


def _dtype(g: Grower, kind: str) -> DType:
    return DType.BOOL if kind == "b" else g.d.pick(FLOATS) if kind == "f" else g.d.pick(INTEGERS)


def _partner(g: Grower, x: Value, dtype: DType) -> Value:
    """An operand beside x: x itself, a constant, another value, of a shape that broadcasts with x's."""
    match g.d.pick(("value", "value", "value", "constant", "constant", "same")):
        case "same" if x.dtype == dtype:
            return x
        case "constant":
            return g.number(dtype)
    shape = list(x.shape)
    match g.d.pick(("whole", "ones", "shorter", "more", "other")):
        case "ones":
            shape = [1 if g.d.chance(50) else s for s in shape]
        case "shorter":
            shape = shape[g.d.number(0, len(shape)) :]
        case "more":
            shape = [g.d.pick((2, 1, *g.symbols)), *shape]
        case "other":
            found = g.recent(lambda v: v.dtype == dtype)
            if found is not None:
                return found
    return g.fit(TensorType(dtype, tuple(shape)))


def _changed(g: Grower, opdef: OpDef, attrs: dict[str, Any], dtype: DType) -> dict[str, Any]:
    """The attributes with now and then a number or a flag changed."""
    for name, spec in opdef.attrs.items():
        value = attrs.get(name, spec.default)
        if value is REQUIRED or not g.d.chance(12):
            continue
        if isinstance(value, bool):
            attrs[name] = not value
        elif isinstance(value, float) or (opdef.name == "math.clamp" and dtype.is_float):
            attrs[name] = g.d.pick(NUMBERS[:12])
        elif isinstance(value, int) and spec.type is int:
            attrs[name] = g.d.pick((value, 1, 2, 0, -1, 3))
    return attrs


# -- any other op, as its samples have it ------------------------------------------------------------


def sampled(g: Grower) -> Any:
    opdef = g.d.pick(ops(False))
    symbolic = bool(g.symbols) and g.d.chance(50)
    n: Any = g.d.pick(g.symbols) if symbolic else g.d.pick((3, 4, 1, 2, 5, 0))
    found = list(cases(opdef, Sampler(_NAMED if symbolic else n, g.d.pick((2, 1, 3, 4)), g.d.pick((4, 5, 3, 8, 2, 1)))))
    if not found:
        return None
    tensors, attrs = g.d.pick(found)

    def named(x: Any) -> Any:
        if isinstance(x, TensorType):
            return x.with_shape(named(x.shape))
        return tuple(map(named, x)) if isinstance(x, tuple) else n if x == _NAMED and not isinstance(x, bool) else x

    types = [None if t is None else TensorType(DType.of(t.dtype), named(tuple(t.shape))) for t in tensors]
    wide = g.d.pick(FLOATS)
    if opdef.family != "quant":
        types = [t.with_dtype(wide) if t is not None and t.dtype is DType.F32 else t for t in types]
    attrs = {k: named(v) if symbolic and k != "value" else v for k, v in attrs.items()}
    known = {s for node in g.graph.nodes for r in node.results for s in r.type.symbols}
    for name in opdef.binds:  # sizes that a run brings in are each one's own
        attrs[name] = Dim(next(f"R{i}" for i in range(99) if f"R{i}" not in known))
    kinds = _operand_kinds(opdef, len(types))
    operands: list[Value | None] = []
    changed = _changed(g, opdef, dict(attrs), wide)
    for (name, kind), type, t in zip(kinds, types, tensors, strict=False):
        if type is None or (kind == "optional" and g.d.chance(15)):
            operands.append(None)
        elif type.dtype in BYTES:  # codes, which nothing else makes
            static = type.is_static and not symbolic
            operands.append(g.stored(copied(t), name) if static else g.fresh(type, name, weight=False))
        elif type.dtype.is_integer:
            operands.append(_index(g, name, type, t, may_store=not symbolic, fits=changed == attrs))
        else:
            operands.append(g.fit(type, name))
    return g.b.op(opdef, operands, changed)


def _operand_kinds(opdef: OpDef, count: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, kind in opdef.operands:
        found += [(name, kind)] * (count - len(opdef.operands) + 1 if kind == "variadic" else 1)
    return found


def _index(g: Grower, name: str, type: TensorType, sample: torch.Tensor, *, may_store: bool, fits: bool) -> Value:
    """Integers in the range of the sample's: a value brought into it, an input that the maker of inputs fills by its
    use, or the sample itself. Where the sample no longer `fits` (another axis is indexed), an input."""
    if not fits and g.inner:
        raise CompileError("what a caller passes has no role", code="size")
    if not fits and name != "count":
        return g.fresh(type, name, weight=None if may_store else False)
    if type.is_static and may_store and (name == "count" or g.d.chance(40)):
        return g.stored(copied(sample), name)
    if name == "count":
        raise CompileError("no sizes are known to count", code="size")
    if g.inner and (name == "offsets" or not may_store):
        raise CompileError("what a caller passes has no role", code="size")
    if name == "offsets" or not sample.numel() or not may_store or g.d.chance(40):
        return g.fresh(type, name, weight=may_store if g.inner or not may_store else None)
    bound = int(sample.max()) + 1
    low = min(0, int(sample.min()))
    found = g.recent(lambda v: v.dtype == type.dtype and v.shape == type.shape) or g.fit(type)
    found = g.b.mod(found, bound - low) if bound > low else found
    return g.b.add(found, low) if low else found


# -- shapes ------------------------------------------------------------------------------------------


def reshape(g: Grower) -> Any:
    x = g.recent()
    if x is None:
        return None
    shape = list(x.shape)
    match g.d.pick(("merge", "split", "insert", "flatten", "drop")):
        case "merge" if len(shape) > 1:
            i = g.d.number(0, len(shape) - 2)
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
        case "split":
            at = [(i, k) for i, s in enumerate(shape) if isinstance(s, int) for k in (2, 3, 4) if s and s % k == 0]
            if at:
                i, k = g.d.pick(at)
                shape[i : i + 1] = g.d.pick(((shape[i] // k, k), (k, shape[i] // k)))
        case "flatten":
            shape = [product(shape)]
        case "drop" if 1 in shape:
            shape.remove(1)
        case _:
            shape.insert(g.d.number(0, len(shape)), 1)
    return g.b.reshape(x, shape=tuple(shape))


def transpose(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 1)
    return None if x is None else g.b.transpose(x, perm=tuple(g.d.shuffled(range(x.type.rank))))


def expand(g: Grower) -> Any:
    x = g.recent()
    if x is None:
        return None
    shape = [g.size() if s == 1 and g.d.chance(60) else s for s in x.shape]
    return g.b.expand(x, shape=(*((g.size(),) if g.d.chance(40) else ()), *shape))


def cut(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 0)
    if x is None:
        return None
    axis = _axis(g, x)
    size = x.shape[axis]
    if isinstance(size, Dim):
        bounds = g.d.pick(((0, size), (1, size), (0, size - 1), (size - 1, size)))
    else:
        start = g.d.number(0, size)
        bounds = start, g.d.number(start, size)
    return g.b.slice(x, axis=axis, start=bounds[0], end=bounds[1], step=g.d.pick((1, 1, 2, 3)))


def join(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 0)
    if x is None:
        return None
    axis = _axis(g, x)
    parts = [x]
    for _ in range(g.d.pick((1, 0, 2))):
        shape = list(x.shape)
        if g.d.chance(50):
            shape[axis] = g.size()
        parts.append(x if g.d.chance(20) else g.fit(x.type.with_shape(shape)))
    return g.b.concat(*g.d.shuffled(parts), axis=axis)


def split(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 0)
    if x is None:
        return None
    axis = _axis(g, x)
    size = x.shape[axis]
    if isinstance(size, Dim):
        sizes: tuple[Any, ...] = g.d.pick(((size,), (1, size - 1), (size - 1, 1)))
    else:
        first = g.d.number(0, size)
        sizes = g.d.pick(((first, size - first), (size,), (size - first, 0, first)))
    return g.b.split(x, axis=axis, sizes=sizes)


def pad(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 0 and v.dtype is not DType.BOOL and v.dtype not in _FLOAT8)
    if x is None:
        return None
    before, after = (tuple(g.d.pick((0, 0, 1, 2)) for _ in x.shape) for _ in range(2))
    value = g.d.pick((0, 1, 2)) if x.dtype.is_integer else g.d.pick((0.0, *NUMBERS))
    return g.b.pad(x, before=before, after=after, value=value)


def reduce(g: Grower) -> Any:
    name = g.d.pick(("sum", "mean", "amax", "amin", "argmax", "cumsum", "softmax", "log_softmax", "any", "all", "sort"))
    x = g.recent(lambda v: v.type.rank > 0 and (v.dtype is DType.BOOL) == (name in ("any", "all")))
    if x is None:
        return None
    axis = _axis(g, x)
    match name:
        case "argmax":
            return g.b.argmax(x, axis=axis, keepdim=g.d.chance(50))
        case "sort":
            return g.b.sort(x, axis=axis, descending=g.d.chance(50))
        case "cumsum" | "softmax" | "log_softmax":
            return g.b.op(f"math.{name}", [x], {"axis": axis})
    axes = tuple(g.d.shuffled(range(x.type.rank))[: g.d.number(0, x.type.rank)]) if g.d.chance(30) else (axis,)
    return g.b.op(f"math.{name}", [x], {"axes": axes, "keepdim": g.d.chance(50)})


def made(g: Grower) -> Any:
    """A tensor of no operands."""
    dtype = g.d.pick((*FLOATS, *INTEGERS))
    match g.d.pick(("arange", "full", "dim", "constant")):
        case "arange":
            end = g.size()
            start = g.d.pick((0, 0, 1)) if isinstance(end, Dim) or end else 0
            return g.b.arange(end=end, start=start, step=g.d.pick((1, 1, 2)), dtype=dtype)
        case "full":
            value = g.d.pick((1, 0, 2)) if dtype.is_integer else g.d.pick(NUMBERS)
            return g.b.full(shape=g.shape(), value=value, dtype=dtype)
        case "dim":
            return g.b.dim(value=g.size())
    shape = tuple(g.d.pick((2, 1, 3)) for _ in range(g.d.pick((1, 0, 2))))
    count = math.prod(shape)
    values = tuple(g.d.pick((1, 0, 2, 3)) if dtype.is_integer else g.d.pick(NUMBERS[:12]) for _ in range(count))
    return g.b.const(values, dtype, shape)


def product_of(g: Grower) -> Any:
    x = g.recent(lambda v: v.type.rank > 1 and v.dtype in FLOATS)
    if x is None:
        return None
    inner, wide = x.shape[-1], g.d.pick((4, 3, 1, 8))
    if not isinstance(inner, int) or g.d.chance(50):
        lead = g.d.pick((x.shape[:-2], (), (1,) * (x.type.rank - 2)))
        return g.b.matmul(x, g.fit(TensorType(x.dtype, (*lead, inner, wide))))
    weight = g.fresh(TensorType(x.dtype, (wide, inner)), "weight", weight=not g.d.chance(10))
    bias = g.fresh(TensorType(x.dtype, (wide,)), "bias", weight=True) if g.d.chance(50) else None
    return g.b.linear(x, weight, bias)


def twin(g: Grower) -> Any:
    """A node once more: the same, with its two operands the other way round, or with another attribute."""

    def can(node: Node | None, swapped: bool) -> bool:
        return node is not None and node.opdef.family != "call" and not (swapped and len(node.operands) != 2)

    how = g.d.pick(("swapped", "same", "changed"))
    x = g.recent(lambda v: can(v.producer, how == "swapped"))
    if x is None or x.producer is None or x.producer.opdef.binds:
        return None
    node, attrs, operands = x.producer, dict(x.producer.attrs), list(x.producer.operands)
    if how == "swapped":
        operands.reverse()
        if node.op in ("math.floordiv", "math.mod") and x.dtype.is_integer:
            operands[1] = g.b.max(operands[1], 1)
    elif how == "changed":
        attrs = _changed(g, node.opdef, attrs, x.dtype)
    return g.b.op(node.opdef, operands, attrs)


def _axis(g: Grower, x: Value) -> int:
    axis = g.d.number(0, x.type.rank - 1)
    return axis - x.type.rank if g.d.chance(40) else axis


STEPS: list[Callable[[Grower], Any]] = [
    *[elementwise] * 7, *[sampled] * 5, reshape, transpose, expand, cut, join, split, pad, reduce, reduce,
    made, product_of, twin, twin,
]  # fmt: skip


# -- functions ---------------------------------------------------------------------------------------


def call(g: Grower) -> Any:
    """A call of a function: one that is there, or a new one of a few steps with symbols of its own."""
    if g.graph.functions and g.d.chance(60):
        name = g.d.pick(sorted(g.graph.functions))
    else:
        inner = Grower(g.d, [Dim("F")] if g.symbols and g.d.chance(60) else [], plain=g.plain, inner=True)
        size = (inner.symbols or (g.d.pick((2, 3, 4)),))[0]
        for _ in range(g.d.pick((1, 2))):
            inner.fresh(TensorType(g.d.pick(FLOATS), (size, g.d.pick((4, 2, 1)))), "a", weight=False)
        for _ in range(g.d.number(1, 5)):
            inner.step(g.d.pick(STEPS))
        if not len(inner.graph):
            raise CompileError("an empty function", code="size")
        from moec.ir.cases import with_data

        name = f"f{len(g.graph.functions)}"
        fn = with_data(inner.finish(), 1)
        if any(v.type.symbols - fn.symbols for v in fn.outputs):
            raise CompileError("sizes of a run do not leave a function", code="size")
        fn.name = name
        g.graph.functions[name] = fn
    fn = g.graph.functions[name]
    dims = {str(s): g.d.pick(g.symbols or (3,)) for s in sorted(fn.symbols)}
    operands = [
        g.fit(v.type.with_shape([s.substitute(dims) if isinstance(s, Dim) else s for s in v.shape])) for v in fn.inputs
    ]
    return g.b.op("call.graph", operands, {"callee": name, "dims": tuple(dims.items())})
