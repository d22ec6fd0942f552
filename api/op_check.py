"""`check_op`: the tests that every shipped op passes, for an op of the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.backends import Backend, Executable, get_backend
from moec.backends.reference.backend import ReferenceBackend
from moec.difference import difference
from moec.ir import ArgumentTypeError, CompileError, DType, Graph, Node, OpDef, TensorType, lookup, parse, run
from moec.ir.arrays import copied
from moec.ir.interpreter import bind_inputs
from moec.ir.types import broadcast
from moec.op_cases import all_cases, single, symbolic_cases, symbolic_types
from moec.passes.pipeline import Pipeline
from moec.program import Settings, legalise, lower
from moec.tolerance import one_node, scale_of


@dataclass
class OpCheck:
    """What was checked: the number of cases, and for each backend how it did."""

    op: str
    cases: int
    backends: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.op}: {self.cases} cases", *(f"  {k}: {v}" for k, v in self.backends.items())])


def check_op(op: str | type, *, backends: Sequence[str] = ("onnxruntime", "triton")) -> OpCheck:
    """Hold an op's parts against each other. AssertionError naming the op, the case and what differs.

    On the op's `samples` at sizes 0, 1 and odd (without them: float operands of one shape, f32 and bf16): `infer`
    gives the types of `reference`, with symbolic sizes too; `reference` leaves its operands alone; text comes back;
    what is declared elementwise or commutative is; the decomposition means the same; on each backend the lowering
    agrees with `reference` within the tolerance of one node, at sizes it was not compiled for as well, and that of an
    elementwise op also on NaN, zeros and large numbers; Triton kernels compile for sm_90. A backend that an op is not
    meant for `refuses` it.
    """
    opdef = lookup(op) if isinstance(op, str) else getattr(op, "opdef", None)
    if not isinstance(opdef, OpDef):
        raise ArgumentTypeError(f"{op!r} is no op", code="arguments", hint='@moec.ir.op("family.name") makes it one')
    tries = [_Backend(get_backend(name)) for name in backends]
    if opdef.decompose is not None:
        tries.append(_Backend(_Decomposing(opdef.name)))
    found = [_Case(opdef, operands, attrs, i) for i, (operands, attrs) in enumerate(all_cases(opdef))]
    if not found:
        raise AssertionError(f"{opdef.name} ({opdef.file}:{opdef.line}): samples() yields nothing")
    for case in found:
        case.check_declaration()
    for case in found:
        for t in tries:
            t.run(case)
    for operands, attrs, others in symbolic_cases(opdef):
        _check_symbolic(opdef, operands, attrs, others, tries)
    for t in tries:
        if t.backend.name == "triton" and t.errors:
            t.refused = "; ".join(x for x in (_compiled_kernels(found), t.refused) if x)
    return OpCheck(opdef.name, len(found), {t.backend.name: t.verdict(opdef) for t in tries})


class _Decomposing(ReferenceBackend):
    """The reference without one op."""

    def __init__(self, op: str):
        super().__init__("decomposition", dtypes=frozenset(DType))
        self.op = op

    def missing(self, node: Node) -> str | None:
        return "it is to be decomposed" if node.op == self.op else None


class _Case:
    """One set of operands and attributes with what the reference makes of them."""

    def __init__(self, opdef: OpDef, operands: Sequence[Any], attrs: dict[str, Any], number: int):
        shown = ", ".join("_" if t is None else str(TensorType.of(t)) for t in operands)
        self.what = f"{opdef.name} ({opdef.file}:{opdef.line}), case {number}: ({shown}) {attrs or ''}".rstrip()
        self.opdef = opdef
        self.inputs = [t for t in operands if t is not None]
        self.binding: dict[str, int] = {}
        before = [copied(t) for t in self.inputs]
        try:
            self.graph = single(opdef, operands, attrs)
            self.expected = run(self.graph, self.inputs)
        except CompileError as e:
            raise AssertionError(f"{self.what}: {e}") from e
        if not all(_equal(a, b) for a, b in zip(before, self.inputs, strict=True)):
            raise AssertionError(f"{self.what}: reference() changes an operand in place")

    def check_declaration(self) -> None:
        """The text, and what the op is declared to be."""
        if parse(str(self.graph)) != self.graph:
            raise AssertionError(f"{self.what}: its text does not come back equal\n{self.graph}")
        same = len({TensorType.of(t) for t in self.inputs}) == 1
        if self.opdef.commutative and len(self.inputs) == 2 and same:
            self.compare(run(self.graph, self.inputs[::-1]), "is declared commutative, with operands exchanged")
        if self.opdef.elementwise:
            self._check_elementwise()

    def _check_elementwise(self) -> None:
        shape = broadcast(*(t.shape for t in self.inputs))
        if len(self.expected) != 1 or tuple(self.expected[0].shape) != shape:
            got = ", ".join(str(TensorType.of(t)) for t in self.expected)
            raise AssertionError(f"{self.what}: is declared elementwise, but its result is {got}")

        def last(t: torch.Tensor) -> torch.Tensor:
            return t[tuple(slice(-1, None) for _ in t.shape)]

        if self.expected[0].numel():  # the last element must not depend on the others
            alone = run(single(self.opdef, self._filled(map(last, self.inputs)), self.attrs), [*map(last, self.inputs)])
            want = [last(t) for t in self.expected]
            self.compare(alone, "is declared elementwise, with the last element by itself", want)

    @property
    def attrs(self) -> dict[str, Any]:
        return self.node.attrs

    @property
    def node(self) -> Node:
        return next(iter(self.graph.nodes))

    def _filled(self, tensors: Iterable[torch.Tensor]) -> list[Any]:
        left = iter(tensors)
        return [None if v is None else next(left) for v in self.node.operands]

    def compare(
        self,
        got: Sequence[torch.Tensor],
        how: str,
        expected: Sequence[torch.Tensor] | None = None,
        coarse: tuple[float, int] | None = None,
    ) -> float:
        """The largest error in units of the tolerance. AssertionError beyond 1."""
        operands = dict(zip(self.graph.inputs, self.inputs, strict=True))
        worst = 0.0
        for value, want, g in zip(self.node.results, expected or self.expected, got, strict=True):
            bound = one_node(self.node, value, self.binding, coarse)
            # a case may be one small number, with no larger one beside it for an approximated function to be small to
            bound = replace(bound, relative=2 * bound.relative, typical=math.inf)
            d = difference(want, g, bound, scale_of(want, self.node, operands))
            if not d.ok:
                raise AssertionError(
                    f"{self.what}, {how}: error {d.max_error:.3g}, tolerance {d.tolerance:.3g} ({d.why})\n"
                    f"  expected {_short(want)}\n  got      {_short(g)}"
                )
            worst = max(worst, d.max_error / d.tolerance if d.tolerance else 0.0)
        return worst


class _Backend:
    """How an op does on one backend."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.settings = Settings(backend, Pipeline(()))
        self.errors: list[float] = []
        self.refused: str | None = None

    def compiled(self, graph: Graph, what: str) -> Executable | None:
        """None where the backend does not take the op, with `refused` saying why."""
        try:
            legal, _, _ = legalise(graph, self.settings)
            return lower(legal, self.settings, [])
        except CompileError as e:
            if e.code != "unsupported-op":
                raise AssertionError(f"{what}, on {self.backend.name}: {e}") from e
            self.refused = e.message.split(f" on {self.backend.name}: ", 1)[-1]
            return None

    def run(self, case: _Case) -> None:
        executable = self.compiled(case.graph, case.what)
        if executable is None:
            return
        try:
            got = executable.run(case.inputs)
        except CompileError as e:
            raise AssertionError(f"{case.what}, on {self.backend.name}: {e}") from e
        coarse = self.backend.coarse_sums(case.node)
        self.errors.append(case.compare(got, f"on {self.backend.name}", coarse=coarse))

    def verdict(self, opdef: OpDef) -> str:
        """What to report. AssertionError where the op never ran and was not refused on purpose."""
        name = self.backend.name
        if not self.errors and opdef.name not in self.backend.unsupported:
            raise AssertionError(
                f"{opdef.name} ({opdef.file}:{opdef.line}) never runs on {name}: {self.refused}. Write a lowering, "
                f"decompose(), or backend.refuses({opdef.name!r}, reason)"
            )
        text = f"{len(self.errors)} cases, largest error {max(self.errors):.0%} of its tolerance" if self.errors else ""
        return "; ".join(x for x in (text, self.refused) if x)


def _check_symbolic(
    opdef: OpDef, operands: Sequence[Any], attrs: dict[str, Any], others: Sequence[Any], tries: Sequence[_Backend]
) -> None:
    """Sizes by name: the type rule and the lowerings may not have been made for numbers only."""
    try:
        graph = single(opdef, operands, attrs, symbolic_types(operands))
    except CompileError:  # a type rule may ask for numbers
        return
    for tensors in (operands, others):
        inputs = [t for t in tensors if t is not None]
        try:
            bind_inputs(graph, inputs)
        except CompileError:  # an axis of another size is no free one
            continue
        case = _Case(opdef, tensors, attrs, 0)
        case.what = case.what.replace("case 0", f"compiled for {', '.join(str(v.type) for v in graph.inputs)}")
        case.graph, case.binding = graph, bind_inputs(graph, inputs)
        try:
            run(graph, inputs)
        except CompileError as e:
            raise AssertionError(f"{case.what}: {e}") from e
        for t in tries:
            if t.errors:
                t.run(case)


def _compiled_kernels(found: Sequence[_Case]) -> str:
    """Compile what the Triton lowering launches on the largest case, in every dtype, for sm_90: the interpreter takes
    what the compiler refuses. AssertionError with the compiler's words."""
    from moec.backends.triton.aot import compile_launch, lowering_launches
    from moec.backends.triton.backend import limits
    from moec.backends.triton.launch import interpreted

    if interpreted():
        return "not compiled for sm_90 in a process that interprets"
    largest = {
        tuple(t.dtype for t in c.inputs): c for c in sorted(found, key=lambda c: sum(map(torch.numel, c.inputs)))
    }
    names = []
    for case in largest.values():
        if limits(case.node, gpu=True) is not None:
            continue
        try:
            launches = lowering_launches(case.node)
        except Exception as e:  # a lowering may look at values, which tensors without memory have not
            return f"not compiled for sm_90 ({type(e).__name__} without data)"
        for launch in launches:
            try:
                compile_launch(launch)
            except Exception as e:  # Triton's compiler has many kinds
                kernel = launch.kernel.__name__
                raise AssertionError(f"{case.what}: kernel {kernel} does not compile for sm_90\n{e}") from e
            names.append(launch.kernel.__name__)
    return f"{len(names)} kernels compile for sm_90" if names else ""


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (copied(t.reshape(-1)).view(torch.uint8) for t in (a, b))  # strides of 0 have no view as bytes
    return torch.equal(a, b)


def _short(t: torch.Tensor) -> str:
    return f"{TensorType.of(t)} {t.flatten()[:6].tolist()}{' …' if t.numel() > 6 else ''}"
