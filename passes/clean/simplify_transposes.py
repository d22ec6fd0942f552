"""Transposes that cancel or move nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import lookup
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet

_UNARY = (
    "math.neg", "math.abs", "math.exp", "math.log", "math.sqrt", "math.rsqrt", "math.reciprocal", "math.sin",
    "math.cos", "math.tanh", "math.sigmoid", "math.silu", "math.relu", "math.softplus", "math.gelu", "math.clamp",
    "math.cast", "math.not",
)  # fmt: skip
_BINARY = ("math.add", "math.sub", "math.mul", "math.div", "math.swiglu", "math.glu")


def _captured(op: str) -> dict[str, str]:
    return {name: f"{name}_" for name in lookup(op).attrs}


def _why_not_cancelled(m: Match) -> Refused | None:
    if tuple(m.inner[i] for i in m.outer) != tuple(range(len(m.inner))):
        return m.no(f"transposed by {list(m.inner)} and then by {list(m.outer)}")
    return None


@dataclass(frozen=True)
class TransposeAcross(Rewrite):
    """transpose(f(transpose(x, p)), p⁻¹) → f(x) for an elementwise f of one operand"""

    op: str = "math.cast"

    @property
    def name(self) -> str:
        return f"transpose_across_{self.op.split('.')[1]}"

    def pattern(self, p: Any, x: Any) -> Any:
        attrs = {a: p.attr(c) for a, c in _captured(self.op).items()}
        inner = p.shared(p.transpose(x, perm=p.attr("inner")))
        return p.transpose(p.op(self.op, [inner], attrs), perm=p.attr("outer"))

    def when(self, m: Match) -> Refused | None:
        return _why_not_cancelled(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.op(self.op, [m.x], {a: m.get(c) for a, c in _captured(self.op).items()})


@dataclass(frozen=True)
class TransposeAcrossTwo(Rewrite):
    """transpose(f(transpose(x, p), transpose(y, p)), p⁻¹) → f(x, y) for an elementwise f of two operands"""

    op: str = "math.add"

    @property
    def name(self) -> str:
        return f"transpose_across_{self.op.split('.')[1]}"

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        attrs = {a: p.attr(c) for a, c in _captured(self.op).items()}
        both = [p.shared(p.transpose(v, perm=p.attr("inner"))) for v in (x, y)]
        return p.transpose(p.op(self.op, both, attrs), perm=p.attr("outer"))

    def when(self, m: Match) -> Refused | None:
        return _why_not_cancelled(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.op(self.op, [m.x, m.y], {a: m.get(c) for a, c in _captured(self.op).items()})


@dataclass(frozen=True)
class TransposeToReshape(Rewrite):
    """transpose(x) that moves axes of size 1 only → reshape(x), which copies nothing"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.transpose(x, perm=p.attr("perm"))

    def when(self, m: Match) -> Refused | None:
        moved = [a for a in m.perm if m.x.shape[a] != 1]
        return m.no(f"axes {moved} change places") if moved != sorted(moved) else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.reshape(m.x, shape=m.root.shape)


@dataclass(frozen=True)
class SimplifyTransposes(RuleSet):
    """Transposes around elementwise ops that cancel, and those that move nothing. For after the fusions, which look for
    transposes as they were written."""

    rules: tuple[Rewrite, ...] = (
        *map(TransposeAcross, _UNARY),
        *map(TransposeAcrossTwo, _BINARY),
        TransposeToReshape(),
    )
    quiet: bool = True
