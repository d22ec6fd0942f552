"""What `check_op` runs an op on: its samples, or what can be guessed from its declaration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moec.ir import CompileError, Dim, Graph, OpDef, TensorType
from moec.ir.opdef import REQUIRED
from moec.ir.sampling import Case, Sampler, cases

SIZES = ((0, 1, 5), (1, 2, 3), (5, 3, 7))  # n, m, k of the samples
NAMED = {11: "N", 13: "M", 17: "K"}  # sizes that are told apart, to stand for symbols
SPECIAL = (float("nan"), 0.0, -0.0, 1e4, -1e4)
_GUESSES = {float: 1.5, bool: True}


def single(opdef: OpDef, operands: Sequence[Any], attrs: dict[str, Any], types: Sequence[Any] | None = None) -> Graph:
    """A verified graph of one node. Raises CompileError where the op does not take these."""
    graph = Graph(opdef.name)
    given = types if types is not None else [None if t is None else TensorType.of(t) for t in operands]
    values = [None if t is None else graph.add_input(f"x{i}", t) for i, t in enumerate(given)]
    for r in graph.create(opdef, values, attrs).results:
        graph.add_output(r)
    graph.verify()
    return graph


def all_cases(opdef: OpDef) -> Iterator[Case]:
    """Samples at several sizes; for an elementwise op also special values in all combinations."""
    for size in SIZES:
        yield from _cases(opdef, Sampler(*size))
    for operands, attrs in _cases(opdef, Sampler(*SIZES[-1])) if opdef.elementwise else ():
        given = [t for t in operands if t is not None]
        if 0 < len(given) <= 3 and all(t.dtype == torch.float32 for t in given):
            grid = torch.cartesian_prod(*[torch.tensor(SPECIAL)] * len(given)).reshape(-1, len(given))
            columns = iter(grid.T.contiguous())
            yield [None if t is None else next(columns) for t in operands], attrs
            return


def symbolic_cases(opdef: OpDef) -> Iterator[tuple[list[Any], dict[str, Any], list[Any]]]:
    """(operands whose sizes stand for symbols, attributes, operands of other sizes); see `symbolic_types`."""
    pairs = zip(_cases(opdef, Sampler(*NAMED)), _cases(opdef, Sampler(*SIZES[-1])), strict=True)
    for (operands, attrs), (others, other_attrs) in pairs:
        if attrs == other_attrs:
            yield operands, attrs, others


def symbolic_types(operands: Sequence[Any]) -> list[TensorType | None]:
    """The types of operands with the sizes of `NAMED` as symbols."""

    def named(size: int) -> int | Dim:
        return Dim(NAMED[size]) if size in NAMED else size

    return [None if t is None else TensorType(t.dtype, tuple(map(named, t.shape))) for t in operands]


def _cases(opdef: OpDef, r: Sampler) -> Iterator[Case]:
    """The op's samples; without them, floats of one shape, with and without the optional operands."""
    if opdef.samples is not None:
        yield from cases(opdef, r)
        return
    attrs = {}
    for name, spec in opdef.attrs.items():
        if spec.default is REQUIRED:
            if spec.type not in _GUESSES:
                raise _wants_samples(opdef, f"a value of its attribute {name!r}")
            attrs[name] = _GUESSES[spec.type]
    optional = any(kind == "optional" for _, kind in opdef.operands)
    for dtype in ("f32", "bf16"):
        for absent in (False, True) if optional else (False,):
            operands: list[Any] = []
            for _, kind in opdef.operands:
                for _ in range(2 if kind == "variadic" else 1):
                    operands.append(None if kind == "optional" and absent else r.floats(r.n, r.m, dtype=dtype))
            try:
                single(opdef, operands, attrs)
            except CompileError as e:
                raise _wants_samples(opdef, f"operands that it takes ({e.message})") from e
            yield operands, attrs


def _wants_samples(opdef: OpDef, what: str) -> AssertionError:
    return AssertionError(
        f"{opdef.name} ({opdef.file}:{opdef.line}): there is no guessing {what}; give the class samples:\n"
        "    @staticmethod\n    def samples(r):\n        yield [r.floats(r.n, r.k)], {}  # operands, attributes"
    )
