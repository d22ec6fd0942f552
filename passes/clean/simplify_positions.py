"""Conditions, choices and gathers that positions alone decide: what is left of packed-sequence detection, of bounds
checks on indices, and of reading a mask element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.clean.index_forms import Affine, Holds, Size, index_form, unflattened, unraveled
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class DecidedWhere(Rewrite):
    """where(condition, a, b) → a, where the condition is provably always true; → b, where never"""

    def pattern(self, p: Any, condition: Any, a: Any, b: Any) -> Any:
        return p.where(condition, a, b)

    def when(self, m: Match) -> Refused | None:
        holds = index_form(m.condition)
        if not isinstance(holds, Holds) or holds.conditions:
            return m.no("its condition is not decided by structure", at=m.condition)
        return m.no("it broadcasts") if (m.b if holds.never else m.a).type != m.root.type else None

    def replace(self, b: Any, m: Match) -> Any:
        holds = index_form(m.condition)
        return m.b if isinstance(holds, Holds) and holds.never else m.a


@dataclass(frozen=True)
class TrueConjunct(Rewrite):
    """and(x, y) with y provably true everywhere → x"""

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.and_(x, y)

    def when(self, m: Match) -> Refused | None:
        holds = index_form(m.y)
        if not isinstance(holds, Holds) or not holds.always:
            return m.no(f"{m.y.type} is not provably true", at=m.y)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x if m.x.type == m.root.type else b.expand(m.x, shape=m.root.shape)


@dataclass(frozen=True)
class GatherInOrder(Rewrite):
    """gather(reshape(x, [n]), i) where i counts through x row by row → slices of x, reshaped (a padding mask is read
    this way)"""

    def pattern(self, p: Any, table: Any, index: Any) -> Any:
        return p.gather(table, index, axis=0)

    @staticmethod
    def _reading(m: Match) -> list[tuple[Size, Size]] | None:
        """For each axis of the unflattened table where reading starts and ends, if the index's axes are its axes."""
        table, at = unflattened(m.table), m.index.shape
        form = index_form(m.index)
        if m.table.type.rank != 1 or not isinstance(form, Affine):
            return None
        positions = unraveled(form, at, table.shape)
        if positions is None:
            return None
        result: list[tuple[Size, Size]] = []
        used = []
        for position in positions:
            axes = list(position.factors)
            if not axes:
                result.append((position.const, position.const + 1))
            elif len(axes) == 1 and position.factors[axes[0]] == 1:
                used.append(axes[0])
                result.append((position.const, position.const + at[axes[0]]))
            else:
                return None
        in_order = used == sorted(set(used))
        read_once = all(at[a] == 1 or a in used for a in range(-len(at), 0))
        return result if in_order and read_once else None

    def when(self, m: Match) -> Refused | None:
        if self._reading(m) is None:
            return m.no(f"the index {m.index.type} does not count through {m.table.type}", at=m.index)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        x = unflattened(m.table)
        for axis, (start, end) in enumerate(self._reading(m) or ()):
            if (start, end) != (0, x.shape[axis]):
                x = b.slice(x, axis=axis, start=start, end=end)
        return b.reshape(x, shape=m.root.shape)


# (op, result) that hold indices, which are not negative
_INDICES = {
    ("tensor.nonzero", 0), ("math.topk", 1), ("math.sort", 1), ("math.argmax", 0),
    ("math.argmin", 0), ("moe.route", 1),
}  # fmt: skip
_MOVING = ("tensor.reshape", "tensor.expand", "tensor.transpose", "tensor.slice", "tensor.split", "tensor.gather")


def counts_from_zero(v: Value) -> bool:
    """Whether v holds indices, none of them negative, by the op that gives them."""
    while v.producer is not None:
        if (v.producer.op, v.index) in _INDICES:
            return True
        if v.producer.op not in _MOVING:
            return False
        source = v.producer.operands[0]
        assert source is not None
        v = source
    return False


@dataclass(frozen=True)
class WrappedIndex(Rewrite):
    """where(x < 0, x + n, x) → x, where x are indices that count from 0 (torch counts negative ones from the end)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.where(p.lt(x, 0), p.add(x, p.any("size")), x)

    def when(self, m: Match) -> Refused | None:
        if m.x.type != m.root.type:
            return m.no(f"{m.x.type} is broadcast to {m.root.type}", at=m.x)
        return None if counts_from_zero(m.x) else m.no(f"{m.x.type} may be negative", at=m.x)

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class SimplifyPositions(RuleSet):
    """Conditions, choices and gathers that positions alone decide."""

    rules: tuple[Rewrite, ...] = (DecidedWhere(), TrueConjunct(), GatherInOrder(), WrappedIndex())
    quiet: bool = True
