"""`tensor`: constants, shapes, slicing, gathering."""

from __future__ import annotations

import math
from typing import Any

import torch

from moec.ir.dims import Dim, evaluate, product, size
from moec.ir.errors import require
from moec.ir.literals import check_literal, literal
from moec.ir.opdef import Attr, Operand, Operands, op
from moec.ir.ops.reduction import normal_axis
from moec.ir.types import DType, TensorType, broadcast

# larger constants are weights: they would make the text unreadable
INLINE_LIMIT = 64
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


def concrete(*sizes: int | Dim) -> tuple[int, ...]:
    """Sizes as `reference` is given them: the interpreter has evaluated them. Raises CompileError on a symbol."""
    return tuple(evaluate(s, {}) for s in sizes)


@op("tensor.constant")
class Constant:
    """A small literal: `value` holds the elements in row-major order."""

    value: Attr[tuple[bool | int | float, ...]]
    type: Attr[TensorType]

    def infer(self) -> TensorType:
        require(self.type.is_static, f"constant of symbolic type {self.type}")
        require(len(self.value) == self.type.numel, f"{len(self.value)} elements for {self.type}")
        require(len(self.value) <= INLINE_LIMIT, f"{len(self.value)} elements inline, at most {INLINE_LIMIT}")
        for value in self.value:
            check_literal(value, self.type.dtype, "element")
        return self.type

    def reference(self) -> torch.Tensor:
        static: Any = self.type.shape  # infer allows ints only
        return torch.tensor(self.value, dtype=self.type.dtype.torch).reshape(static)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [], {"value": (1.5,), "type": TensorType(DType.F32, ())}
        yield [], {"value": tuple(range(r.n)), "type": TensorType(DType.I64, (r.n,))}


@op("tensor.dim")
class DimValue:
    """A size as a scalar i64."""

    value: Attr[int | Dim]

    def infer(self) -> TensorType:
        return TensorType(DType.I64, ())

    def reference(self) -> torch.Tensor:
        return torch.tensor(self.value, dtype=torch.int64)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [], {"value": r.n}


@op("tensor.arange")
class Arange:
    """start, start + step, … below `end`; sizes may be symbolic, `step` is a positive int."""

    end: Attr[int | Dim]
    start: Attr[int | Dim] = 0
    step: Attr[int] = 1
    dtype: Attr[DType] = DType.I64

    def infer(self) -> TensorType:
        require(self.step > 0, f"step {self.step} is not positive")
        span = size(self.end) - size(self.start)
        count = -(-span // self.step) if isinstance(span, int) else (span + (self.step - 1)) // self.step
        require(not isinstance(count, int) or count >= 0, f"empty range {self.start} … {self.end}")
        return TensorType(self.dtype, (count,))

    def reference(self) -> torch.Tensor:
        start, end = concrete(self.start, self.end)
        return torch.arange(start, end, self.step, dtype=self.dtype.torch)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [], {"end": r.n}
        yield [], {"end": r.n + 3, "start": 1, "step": 2, "dtype": "f32"}


@op("tensor.full")
class Full:
    """A tensor of one value."""

    shape: Attr[tuple[int | Dim, ...]]
    value: Attr[bool | int | float]
    dtype: Attr[DType]

    def infer(self) -> TensorType:
        check_literal(self.value, self.dtype)
        return TensorType(self.dtype, self.shape)

    def reference(self) -> torch.Tensor:
        return torch.full(concrete(*self.shape), literal(self.value, self.dtype), dtype=self.dtype.torch)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [], {"shape": (r.n, r.m), "value": 2.5, "dtype": "f32"}
        yield [], {"shape": (), "value": True, "dtype": "bool"}


@op("tensor.reshape")
class Reshape:
    """The same elements in row-major order under another shape (no −1; sizes may be symbolic)."""

    x: Operand
    shape: Attr[tuple[int | Dim, ...]]

    def infer(self) -> TensorType:
        shape = ", ".join(map(str, self.shape))
        require(product(self.shape) == self.x.numel, f"{self.x.numel} elements do not fit shape [{shape}]")
        return self.x.with_shape(self.shape)

    def reference(self) -> torch.Tensor:
        return self.x.reshape(self.shape)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m, r.k)], {"shape": (r.n * r.m, r.k)}
        yield [r.floats(r.n, r.m)], {"shape": (r.m, 1, r.n)}


@op("tensor.transpose")
class Transpose:
    """Permute axes: result axis i is operand axis perm[i]."""

    x: Operand
    perm: Attr[tuple[int, ...]]

    def infer(self) -> TensorType:
        require(sorted(self.perm) == list(range(self.x.rank)), f"perm {self.perm} for rank {self.x.rank}")
        return self.x.with_shape([self.x.shape[p] for p in self.perm])

    def reference(self) -> torch.Tensor:
        return self.x.permute(self.perm)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m, r.k)], {"perm": (2, 0, 1)}


@op("tensor.expand")
class Expand:
    """Broadcast to `shape` (NumPy rules)."""

    x: Operand
    shape: Attr[tuple[int | Dim, ...]]

    def infer(self) -> TensorType:
        require(broadcast(self.x.shape, self.shape) == self.shape, f"{self.x} does not expand to {list(self.shape)}")
        return self.x.with_shape(self.shape)

    def reference(self) -> torch.Tensor:
        return self.x.expand(self.shape)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.m, 1)], {"shape": (r.n, r.m, r.k)}
        yield [r.floats(r.n)], {"shape": (r.n,)}


@op("tensor.slice")
class Slice:
    """x[start:end:step] along `axis`; 0 ≤ start ≤ end ≤ size, step ≥ 1; sizes may be symbolic."""

    x: Operand
    axis: Attr[int]
    start: Attr[int | Dim] = 0
    end: Attr[int | Dim] = 0
    step: Attr[int] = 1

    def infer(self) -> TensorType:
        axis = normal_axis(self.axis, self.x.rank)
        extent = self.x.shape[axis]
        require(self.step >= 1, f"step {self.step} is not positive")
        for name, v in (("start", self.start), ("end", self.end)):
            require(not isinstance(v, int) or v >= 0, f"{name} {v} is negative")
            both = isinstance(v, int) and isinstance(extent, int)
            require(not both or v <= extent, f"{name} {v} is beyond size {extent} of axis {axis}")
        span = self.end - self.start
        require(not isinstance(span, int) or span >= 0, f"start {self.start} is after end {self.end}")
        count = span if self.step == 1 else (span + (self.step - 1)) // self.step
        return self.x.with_shape([count if i == axis else s for i, s in enumerate(self.x.shape)])

    def reference(self) -> torch.Tensor:
        index = [slice(None)] * self.x.dim()
        index[self.axis] = slice(self.start, self.end, self.step)
        return self.x[tuple(index)]

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k)], {"axis": 1, "start": 0, "end": r.k - 1}
        yield [r.floats(r.n, r.k)], {"axis": -1, "start": 1, "end": r.k, "step": 2}
        yield [r.floats(r.n, r.k)], {"axis": 0, "start": r.n, "end": r.n}


@op("tensor.concat")
class Concat:
    """Join along `axis`."""

    xs: Operands
    axis: Attr[int]

    def infer(self) -> TensorType:
        require(self.xs, "needs at least one operand")
        first = self.xs[0]
        axis = normal_axis(self.axis, first.rank)
        total: Any = 0
        for x in self.xs:
            require(x.dtype == first.dtype and x.rank == first.rank, f"{x} and {first} do not join")
            others = [i for i in range(x.rank) if i != axis and x.shape[i] != first.shape[i]]
            require(not others, f"{x} and {first} differ on axes {others}")
            total = total + x.shape[axis]
        return first.with_shape([total if i == axis else s for i, s in enumerate(first.shape)])

    def reference(self) -> torch.Tensor:
        return torch.cat(self.xs, dim=self.axis)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m), r.floats(r.n, r.k), r.floats(r.n, 1)], {"axis": 1}
        yield [r.floats(r.n, r.m), r.floats(3, r.m)], {"axis": 0}
        yield [r.floats(r.n)], {"axis": 0}


@op("tensor.split", results=None)
class Split:
    """Cut along `axis` into pieces of `sizes` (which add up to the size)."""

    x: Operand
    axis: Attr[int]
    sizes: Attr[tuple[int | Dim, ...]]

    def infer(self) -> tuple[TensorType, ...]:
        axis = normal_axis(self.axis, self.x.rank)
        total: Any = 0
        for s in self.sizes:
            total = total + s
        require(total == self.x.shape[axis], f"sizes {list(self.sizes)} do not add up to {self.x.shape[axis]}")
        return tuple(self.x.with_shape([s if i == axis else d for i, d in enumerate(self.x.shape)]) for s in self.sizes)

    def reference(self) -> tuple[torch.Tensor, ...]:
        return torch.split(self.x, list(concrete(*self.sizes)), dim=self.axis)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k)], {"axis": -1, "sizes": (1, r.k - 1)}
        yield [r.floats(r.n, r.k)], {"axis": 0, "sizes": (r.n,)}


@op("tensor.gather")
class Gather:
    """Rows by index (ONNX Gather, torch index_select with any index shape): the index's shape takes the
    place of `axis`. Indices are i64 or i32 in [−size, size)."""

    x: Operand
    index: Operand
    axis: Attr[int] = 0

    def infer(self) -> TensorType:
        require(self.index.dtype in (DType.I64, DType.I32), f"index is {self.index.dtype}")
        axis = normal_axis(self.axis, self.x.rank)
        return self.x.with_shape([*self.x.shape[:axis], *self.index.shape, *self.x.shape[axis + 1 :]])

    def reference(self) -> torch.Tensor:
        axis = self.axis % self.x.dim()
        flat = self.index.reshape(-1).long()
        flat = torch.where(flat < 0, flat + self.x.shape[axis], flat)
        shape = (*self.x.shape[:axis], *self.index.shape, *self.x.shape[axis + 1 :])
        return self.x.index_select(axis, flat).reshape(shape)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.k, r.m), r.ints(0, r.k, r.n, 2)], {}
        yield [r.floats(r.m, r.k), r.ints(-r.k, r.k, r.n)], {"axis": -1}
        yield [r.floats(r.k, r.m), r.ints(0, r.k)], {}


@op("tensor.gather_elements")
class GatherElements:
    """out[i][j] = x[i][index[i][j]] for axis 1, and so on (torch.gather, ONNX GatherElements)."""

    x: Operand
    index: Operand
    axis: Attr[int]

    def infer(self) -> TensorType:
        require(self.index.dtype is DType.I64, f"index is {self.index.dtype}, not i64")
        require(self.index.rank == self.x.rank, f"ranks differ: {self.x} and {self.index}")
        axis = normal_axis(self.axis, self.x.rank)
        for i, (a, b) in enumerate(zip(self.x.shape, self.index.shape, strict=True)):
            both = isinstance(a, int) and isinstance(b, int)
            require(i == axis or not both or b <= a, f"index is longer than x on axis {i}: {b} > {a}")
        return self.x.with_shape(self.index.shape)

    def reference(self) -> torch.Tensor:
        x = self.x.view(torch.uint8) if self.x.dtype in _CODES else self.x  # torch has no kernel for them
        return torch.gather(x, self.axis, self.index).view(self.x.dtype)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.ints(0, r.k, r.n, r.m)], {"axis": 1}
        yield [r.floats(r.k, r.n), r.ints(0, r.k, r.m, r.n)], {"axis": 0}


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}  # torch's names


@op("tensor.scatter_elements")
class ScatterElements:
    """x with out[i][index[i][j]] = source[i][j] for axis 1, and so on; `reduce` is "none" (the last write
    wins on duplicate indices is not promised), or how x and all sources of a place combine: "add", "mul", "max" or
    "min" (where NaN wins)."""

    x: Operand
    index: Operand
    source: Operand
    axis: Attr[int]
    reduce: Attr[str] = "none"

    def infer(self) -> TensorType:
        require(self.index.dtype is DType.I64, f"index is {self.index.dtype}, not i64")
        require(self.source.dtype == self.x.dtype, f"dtypes differ: {self.x} and {self.source}")
        require(self.reduce in ("none", *_REDUCTIONS), f"reduce is {self.reduce!r}")
        number = self.x.dtype.is_wide_float or self.x.dtype.is_integer
        require(self.reduce == "none" or number, f"combines numbers, got {self.x.dtype}")
        require(self.index.shape == self.source.shape, f"index {self.index} and source {self.source} differ")
        require(self.index.rank == self.x.rank, f"ranks differ: {self.x} and {self.index}")
        axis = normal_axis(self.axis, self.x.rank)
        for i, (a, b) in enumerate(zip(self.x.shape, self.index.shape, strict=True)):
            both = isinstance(a, int) and isinstance(b, int)
            require(i == axis or not both or b <= a, f"index is longer than x on axis {i}: {b} > {a}")
        return self.x

    def reference(self) -> torch.Tensor:
        if self.reduce != "none":
            kind = _REDUCTIONS[self.reduce]
            return self.x.scatter_reduce(self.axis, self.index, self.source, kind, include_self=True)
        x, source = (t.view(torch.uint8) if t.dtype in _CODES else t for t in (self.x, self.source))
        return x.scatter(self.axis, self.index, source).view(self.x.dtype)

    def undefined(self) -> bool:
        """Two writes to one place."""
        if self.reduce != "none" or not self.index.numel():
            return False
        places = torch.zeros_like(self.x, dtype=torch.int64)
        return bool((places.scatter_add(self.axis, self.index, torch.ones_like(self.index)) > 1).any())

    @staticmethod
    def samples(r: Any) -> Any:
        perm = torch.stack([torch.randperm(r.k, generator=r.generator) for _ in range(r.n)] or [torch.empty(0, r.k)])
        yield [r.floats(r.n, r.k), perm.reshape(r.n, r.k).long(), r.floats(r.n, r.k)], {"axis": 1}
        for reduce in _REDUCTIONS:
            yield [r.floats(r.n, r.k), r.ints(0, r.k, r.n, 3), r.floats(r.n, 3)], {"axis": 1, "reduce": reduce}
        yield [r.ints(-9, 9, r.n, r.k), r.ints(0, r.k, r.n, 3), r.ints(-9, 9, r.n, 3)], {"axis": 1, "reduce": "max"}


@op("tensor.index_put")
class IndexPut:
    """x with rows (along axis 0) at `index` replaced by `source`, or added to with `accumulate`."""

    x: Operand
    index: Operand
    source: Operand
    accumulate: Attr[bool] = False

    def infer(self) -> TensorType:
        require(self.index.dtype in (DType.I64, DType.I32), f"index is {self.index.dtype}")
        require(self.source.dtype == self.x.dtype, f"dtypes differ: {self.x} and {self.source}")
        number = self.x.dtype.is_wide_float or self.x.dtype.is_integer
        require(number or not self.accumulate, f"accumulates numbers, got {self.x.dtype}")
        want = (*self.index.shape, *self.x.shape[1:])
        require(broadcast(self.source.shape, want) == want, f"source {self.source} does not fill {list(want)}")
        return self.x

    def reference(self) -> torch.Tensor:
        return self.x.index_put((self.index.long(),), self.source, accumulate=self.accumulate)

    def undefined(self) -> bool:
        """Two writes to one row."""
        rows = self.index.reshape(-1) % max(1, self.x.shape[0])
        return not self.accumulate and rows.unique().numel() < rows.numel()

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m), torch.randperm(r.n, generator=r.generator), r.floats(r.n, r.m)], {}
        yield [r.floats(r.k, r.m), r.ints(0, r.k, r.n), r.floats(r.n, r.m)], {"accumulate": True}


@op("tensor.nonzero", binds=("count",))
class NonZero:
    """Indices of the elements that are not 0 (or true), in row-major order: i64[count, rank]. `count` names their
    number, which is known only at run time."""

    x: Operand
    count: Attr[Any]

    def infer(self) -> TensorType:
        is_size = (isinstance(self.count, Dim) and self.count.is_symbol) or isinstance(self.count, int)
        require(is_size, f"count must be a name, got {self.count!r}")
        kind = self.x.dtype
        require(kind.is_wide_float or kind.is_integer or kind is DType.BOOL, f"takes numbers or bools, got {kind}")
        return TensorType(DType.I64, (self.count, self.x.rank))

    def reference(self) -> torch.Tensor:
        return torch.nonzero(self.x)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m).round()], {"count": Dim("count")}
        yield [r.ints(-1, 2, r.n)], {"count": Dim("count")}
        yield [r.bools(2, r.n, r.k)], {"count": Dim("count")}
        yield [r.bools()], {"count": Dim("count")}


@op("tensor.histc")
class Histc:
    """Counts of integers 0 … bins−1 (others are ignored), i64[bins]."""

    x: Operand
    bins: Attr[int]

    def infer(self) -> TensorType:
        require(self.x.dtype.is_integer, f"takes integers, got {self.x.dtype}")
        require(self.bins > 0, f"{self.bins} bins")
        return TensorType(DType.I64, (self.bins,))

    def reference(self) -> torch.Tensor:
        flat = self.x.reshape(-1).long()
        return torch.bincount(flat[(flat >= 0) & (flat < self.bins)], minlength=self.bins)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.ints(0, r.k, r.n)], {"bins": r.k}
        yield [r.ints(-2, 9, r.n, r.m)], {"bins": 5}


@op("tensor.one_hot")
class OneHot:
    """i64 indicator of each index along a new last axis of `depth`."""

    index: Operand
    depth: Attr[int]

    def infer(self) -> TensorType:
        require(self.index.dtype is DType.I64, f"index is {self.index.dtype}, not i64")
        return TensorType(DType.I64, (*self.index.shape, self.depth))

    def reference(self) -> torch.Tensor:
        return (self.index[..., None] == torch.arange(self.depth)).long()

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.ints(0, r.k, r.n, r.m)], {"depth": r.k}


@op("tensor.pad")
class Pad:
    """Constant padding: `before` and `after` per axis, not negative."""

    x: Operand
    before: Attr[tuple[int | Dim, ...]]
    after: Attr[tuple[int | Dim, ...]]
    value: Attr[bool | int | float] = 0

    def infer(self) -> TensorType:
        require(len(self.before) == len(self.after) == self.x.rank, f"pads {self.before} {self.after} for {self.x}")
        require(all(not isinstance(p, int) or p >= 0 for p in (*self.before, *self.after)), "negative padding")
        check_literal(self.value, self.x.dtype)
        return self.x.with_shape([b + s + a for b, s, a in zip(self.before, self.x.shape, self.after, strict=True)])

    def reference(self) -> torch.Tensor:
        before, after = concrete(*reversed(self.before)), concrete(*reversed(self.after))
        flat = [p for pair in zip(before, after, strict=True) for p in pair]
        return torch.nn.functional.pad(self.x, flat, value=literal(self.value, DType.of(self.x.dtype)))

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m)], {"before": (0, 1), "after": (2, 0), "value": math.pi}
        yield [r.ints(0, 5, r.n)], {"before": (1,), "after": (1,), "value": 7}
