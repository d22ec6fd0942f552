"""Random graphs for property tests (hypothesis): every op, dtypes, symbolic sizes, weights, functions, and what rules
look for, written by hand and nearly so.

    @given(moec.testing.graphs())
    def test_my_pass(graph):
        moec.testing.check_random(MyPass(), graph)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from moec.ir import Builder, CompileError, Dim, DType, Graph, Location, TensorType, Value, Weight, run
from moec.ir.cases import candidate_bindings, fits, make_inputs, with_data
from moec.ir.dims import evaluate
from moec.ir.location import Frame
from moec.ir.runtime_sizes import runtime_symbols
from moec.ir.weight import TensorSource

FLOATS = (DType.F32, DType.F32, DType.BF16, DType.F16, DType.F64)
INTEGERS = (DType.I64, DType.I64, DType.I32, DType.I16, DType.I8, DType.U8)
SIZES = (4, 2, 3, 1, 8, 5, 7, 0)
NUMBERS = (1.0, 2.0, 0.5, 0.0, -1.0, 0.1, 1 / 3, 3.0, -0.0, 1e-5, 1e-30, 1e30, float("inf"), float("nan"))
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-40, -1e-42, 3e38, -3e38, 6e4, 448.0, 480.0, 1.5)
KINDS = ("normal", "positive", "wide", "whole", "special")
_LARGEST = 8192  # elements of a value where every symbol is _TYPICAL
_TYPICAL = 9
_NAMES = ("x", "hidden", "0", "a b", 'q"t', "ü", "layers.0.w", "%p", "kv-cache")


@dataclass(frozen=True)
class Run:
    """A graph whose weights have data, and inputs that it runs on; `kind` says what the inputs are like."""

    graph: Graph
    binding: Mapping[str, int]
    inputs: tuple[torch.Tensor, ...] = field(repr=False)
    kind: str


@cache
def _between(low: int, high: int) -> Any:
    return st.integers(low, high)


class Draws:
    """Choices; each shrinks to the first option."""

    def __init__(self, draw: Callable[[Any], Any]):
        self._draw = draw

    def number(self, low: int, high: int) -> int:
        return self._draw(_between(low, high)) if high > low else low

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.number(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.number(0, 99) >= 100 - percent

    def shuffled(self, options: Sequence[Any]) -> list[Any]:
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in options]


class Grower:
    """A graph on the way, and the values that the next step may take."""

    def __init__(self, draws: Draws, symbols: Sequence[Dim], *, plain: bool = False, inner: bool = False):
        self.d = draws
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.symbols = tuple(symbols)
        self.values: list[Value] = []
        self.plain = plain  # no odd names and places
        self.inner = inner  # a function: what is passed to it has no role there

    # -- types -------------------------------------------------------------------------------------

    def size(self) -> int | Dim:
        return self.d.pick((*self.symbols, *SIZES))

    def shape(self, most: int = 3) -> tuple[int | Dim, ...]:
        return tuple(self.size() for _ in range(self.d.pick((2, 3, 1, 0, 4)[: most + 2]))) if most else ()

    def dtype(self) -> DType:
        return self.d.pick((*FLOATS, *FLOATS, DType.BOOL, *INTEGERS, DType.F8E4M3, DType.F8E5M2))

    # -- values ------------------------------------------------------------------------------------

    def add(self, *values: Value) -> None:
        self.values += values

    def recent(self, wanted: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A value that is wanted, mostly one of the last."""
        found = [v for v in reversed(self.values) if wanted(v)]
        if not found:
            return None
        near = found[:5] if not self.d.chance(15) else found
        return self.d.pick(near)

    def fresh(self, type: TensorType, name: str = "x", *, weight: bool | None = None) -> Value:
        """A new input, or a weight where sizes are numbers."""
        if type.is_static and (self.d.chance(50) if weight is None else weight):
            value = self.graph.add_weight(Weight(self.graph.fresh_weight_name(name), type))
        else:
            taken = {v.name for v in self.graph.inputs}
            name = next(n for n in (name, *(f"{name}{i}" for i in range(999))) if n not in taken)
            value = self.graph.add_input(name, type)
        self.add(value)
        return value

    def stored(self, tensor: torch.Tensor, name: str = "w") -> Value:
        """A weight that holds a tensor."""
        name = self.graph.fresh_weight_name(name)
        return self.graph.add_weight(Weight(name, TensorType.of(tensor), TensorSource(tensor)))

    def odd_name(self, plain: str) -> str:
        return plain if self.plain or not self.d.chance(10) else self.d.pick(_NAMES)

    def fit(self, type: TensorType, name: str = "x") -> Value:
        """A value of a type: one that is there, a new one, or one that is there brought into the type."""
        exact = self.recent(lambda v: v.type == type)
        if exact is not None and not self.d.chance(10):
            return exact
        if type.dtype.bits < 8 or type.dtype is DType.C64 or self.d.chance(45):
            return self.fresh(type, self.odd_name(name))
        near = self.recent(lambda v: v.dtype is not DType.C64 and v.dtype.bits >= 8)
        return self.fresh(type, self.odd_name(name)) if near is None else self.brought(near, type)

    def brought(self, v: Value, type: TensorType) -> Value:
        """`v` cast, reshaped, repeated and cut until it has the type."""
        b, want = self.b, type.shape
        v = self.cast(v, type.dtype)
        if v.shape == want:
            return v
        if v.type.numel == type.numel:
            return b.reshape(v, shape=want)
        if v.type.rank > len(want):  # leading axes go
            extra = v.type.rank - len(want)
            v = self.summed(v, tuple(range(extra)), keepdim=False)
        if v.type.rank < len(want):
            v = b.reshape(v, shape=(*(1,) * (len(want) - v.type.rank), *v.shape))
        for axis, (have, size) in enumerate(zip(v.shape, want, strict=True)):
            if have == size or have == 1:
                continue
            if isinstance(have, int) and isinstance(size, int) and have > size:
                v = b.slice(v, axis=axis, start=0, end=size)
            elif isinstance(have, int) and isinstance(size, int) and have and v.dtype.bits > 8:
                after = tuple(size - have if i == axis else 0 for i in range(len(want)))
                v = b.pad(v, before=(0,) * len(want), after=after, value=self.d.pick((0, 1)))
            else:
                v = self.summed(v, (axis,), keepdim=True)
        return v if v.shape == want else b.expand(v, shape=want)

    def summed(self, v: Value, axes: tuple[int, ...], keepdim: bool) -> Value:
        if v.dtype is DType.BOOL:
            return self.b.any(v, axes=axes, keepdim=keepdim)
        if v.dtype.bits == 8 and v.dtype.is_float:
            total = self.b.sum(self.cast(v, DType.F32), axes=axes, keepdim=keepdim)
            return self.cast(total, v.dtype)
        return self.b.sum(v, axes=axes, keepdim=keepdim)

    def cast(self, v: Value, dtype: DType) -> Value:
        """As `math.cast`; floats that become integers are brought into the range of the integers first."""
        if v.dtype == dtype:
            return v
        if v.dtype.is_float and dtype.is_integer:
            v = self.b.clamp(v if v.dtype.bits > 8 else self.b.cast(v, dtype=DType.F32), low=-100.0, high=100.0)
            if dtype is DType.U8:
                v = self.b.abs(v)
            v = self.b.where(self.b.isnan(v), 0.0, v)
        return self.b.cast(v, dtype=dtype)

    def number(self, dtype: DType) -> Value:
        """A scalar constant."""
        if dtype is DType.BOOL:
            return self.b.const(self.d.pick((True, False)), dtype)
        if dtype.is_integer:
            return self.b.const(self.d.pick((1, 2, 0, 3, 7)), dtype)
        return self.b.const(self.d.pick(NUMBERS[:10] if self.d.chance(85) else NUMBERS), dtype)

    # -- steps -------------------------------------------------------------------------------------

    def step(self, make: Callable[[Grower], Any]) -> bool:
        """The values that `make` builds join the pool; nothing happens where an op does not take what it was given,
        or where sizes get large."""
        last, inputs, weights = self.graph._last, len(self.graph.inputs), set(self.graph.weights)
        values, functions = list(self.values), set(self.graph.functions)
        self.b.location = self._place()
        try:
            made = make(self)
            results = [v for v in (made if isinstance(made, list | tuple) else (made,)) if v is not None]
            if not results or not all(_small(r) for n in _after(self.graph, last) for r in n.results):
                raise CompileError("nothing, or too much", code="size")
        except CompileError:
            for node in reversed(list(_after(self.graph, last))):
                self.graph.erase(node)
            del self.graph.inputs[inputs:]
            self.graph.weights = {n: v for n, v in self.graph.weights.items() if n in weights}
            for name in set(self.graph.functions) - functions:
                del self.graph.functions[name]
            self.values = values
            return False
        self.add(*results)
        return True

    def _place(self) -> Location:
        if self.plain or not self.d.chance(30):
            return Location()
        module = self.d.pick(("layers.0.mlp", 'odd "name"', "", "ä.ö"))
        return Location((Frame(module, self.d.pick(("model.py", "a b\\c.py")), self.d.number(0, 99)),))

    def finish(self) -> Graph:
        """With outputs: mostly all that nothing uses, now and then an input, a weight or one value twice."""
        d, graph = self.d, self.graph
        results = [r for n in graph.nodes for r in n.results]
        unused = [r for r in results if not r.uses]
        if unused and not d.chance(25):  # everything is needed
            chosen = unused[-8:]
        else:
            pool = [*results, *graph.inputs, *graph.weights.values()][::-1]
            chosen = [d.pick(pool) for _ in range(d.pick((1, 2, 3, 4)))]
        chosen += [d.pick([*results, *graph.inputs, *graph.weights.values()])] if d.chance(20) else []
        if not d.chance(25):
            chosen = list(dict.fromkeys(chosen))
        for v in chosen:
            if not self.plain and v.producer is not None and d.chance(10):
                v.origins = frozenset({*v.origins, d.pick(("mul_1", 'o"x', "layers.0"))})
            graph.add_output(v, d.pick(_NAMES) if not self.plain and d.chance(5) and not graph.outputs else None)
        graph.prune_weights()
        return graph


def _after(graph: Graph, last: Any) -> list[Any]:
    return [n for n in graph.nodes if last is None or last.precedes(n)]


def _small(v: Value) -> bool:
    count = 1
    for s in v.shape:
        size = evaluate(s, dict.fromkeys(s.symbols, _TYPICAL)) if isinstance(s, Dim) else s
        count *= max(1, size)
    return count <= _LARGEST and v.type.rank <= 6


def grown(draws: Draws, max_nodes: int = 25, *, functions: bool = True, plain: bool = False) -> Graph:
    """One verified graph, with data in its weights."""
    from moec.fuzzing.chains import chain
    from moec.fuzzing.steps import STEPS, call

    count = draws.pick((0, 1, 2, 3))
    symbols = [Dim(n) for n in draws.pick((("B", "S", "T"), ("T", "N", "k")))[:count]]
    g = Grower(draws, symbols, plain=plain)
    for _ in range(draws.pick((1, 2, 3))):
        g.fresh(TensorType(g.dtype() if draws.chance(40) else draws.pick(FLOATS), g.shape()), "x", weight=False)
    for symbol in symbols:  # sizes of the inputs give every symbol
        if symbol not in {s for v in g.graph.inputs for s in v.shape}:
            g.fresh(TensorType(draws.pick(FLOATS), (symbol, draws.pick((4, 2, 3)))), "y", weight=False)
    steps = [*STEPS, *[chain] * 5] + ([call] if functions else [])
    wanted = draws.number(1, max_nodes)
    for _ in range(2 * max_nodes):
        if len(g.graph) >= wanted:
            break
        g.step(draws.pick(steps))
    assume(len(g.graph) > 0)
    graph = with_data(g.finish(), draws.number(0, 3))
    graph.verify()
    return graph


@st.composite
def graphs(draw: Any, max_nodes: int = 25, *, functions: bool = True) -> Graph:
    """Verified graphs of up to about `max_nodes` nodes, with data in their weights; `functions`: whether they may call
    some. Every graph runs in the reference under some binding of its dims."""
    return draw(runs(max_nodes, functions=functions)).graph


@st.composite
def runs(draw: Any, max_nodes: int = 25, *, functions: bool = True) -> Run:
    """Graphs with inputs that they run on: sizes 0 and 1 included, and for a share of them with NaN, infinities,
    negative zeros, subnormal and very large numbers among the inputs."""
    draws = Draws(draw)
    graph = grown(draws, max_nodes, functions=functions)
    kind, seed = draws.pick(KINDS), draws.number(0, 99)
    symbols = sorted(graph.symbols)
    drawn = {s: draws.pick((3, 1, 2, 5, 0, 8, 11)) for s in symbols}
    error: CompileError | None = None
    for binding in [drawn, *candidate_bindings(symbols)] if symbols else [{}]:
        if not fits(graph, binding):
            continue
        inputs = inputs_of(graph, binding, seed, kind)
        try:
            run(graph, inputs)
        except CompileError as e:
            error = e  # an index into an axis of size 0, say, or more chosen than there are
            continue
        return Run(graph, binding, inputs, kind)
    if error is not None and not any(map(runtime_symbols, (graph, *graph.functions.values()))):
        raise error  # else a size may be 0, whatever the inputs' are
    assume(False)
    raise AssertionError


def of_seed(seed: int, look: Callable[[Run], None], phases: tuple[Phase, ...] = (Phase.generate,)) -> None:
    """`look` at the run that a seed makes. Hypothesis tries the simplest first, the same for all; the second depends on
    the seed. With `Phase.shrink`, all that follow are looked at too, for as long as `look` raises."""
    count = 0

    @seeded(seed)
    @settings(
        max_examples=2, database=None, deadline=None, derandomize=False, phases=phases, print_blob=False,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(runs())
    def made(case: Run) -> None:
        nonlocal count
        count += 1
        if count > 1 and (Phase.shrink in phases or count == 2):
            look(case)

    made()


def inputs_of(graph: Graph, binding: Mapping[str, int], seed: int, kind: str) -> tuple[torch.Tensor, ...]:
    """Inputs of a kind (see `KINDS`) that fit their roles."""
    inputs = make_inputs(graph, binding, seed, positive=kind == "positive", wide=kind == "wide")
    r = torch.Generator().manual_seed(seed)
    found = []
    for t in inputs:
        if t.is_floating_point() and t.numel() and kind == "special":
            values = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(0, len(SPECIAL), t.shape, generator=r)]
            t = torch.where(torch.rand(t.shape, generator=r) < 0.3, values, t.double()).to(t.dtype)
        elif t.is_floating_point() and kind == "whole":
            t = t.double().round().to(t.dtype)
        found.append(t)
    return tuple(found)
