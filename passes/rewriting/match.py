"""What a rule's `when` and `replace` are given: the match."""

from __future__ import annotations

from typing import Any

from moec.ir import CompileError, Location, Node, Value
from moec.passes.rewriting.bindings import Bindings
from moec.passes.rewriting.pattern_types import Pattern


class Refused(Exception):
    """Returned by `m.no(...)`: the match holds but the rule does not apply. `far`: nothing that a report tells."""

    def __init__(self, reason: str, at: Value | None = None, far: bool = False):
        super().__init__(reason)
        self.reason = reason
        self.at = at
        self.far = far


class Match:
    """A match: captures are attributes (`m.gate` a Value, `m.eps` a number, a tuple for a repetition's)."""

    def __init__(self, bindings: Bindings, pattern: Pattern):
        self._captures = bindings.captures
        self.refusal: Refused | None = None
        single = [n for p, n in bindings.nodes.items() if p not in pattern.shared]
        self.nodes: tuple[Node, ...] = tuple(dict.fromkeys([*single, *bindings.repeated]))
        self.roots: tuple[Value, ...] = tuple(bindings.nodes[r.node].results[r.index] for r in pattern.roots)
        self.location = Location.merge(*(n.location for n in sorted(self.nodes, key=lambda n: n._order)))

    @property
    def root(self) -> Value:
        """The value to replace (the first where there are several)."""
        return self.roots[0]

    def get(self, name: str, default: Any = None) -> Any:
        """A capture that only some alternatives bind."""
        return self._captures.get(name, default)

    def no(self, reason: str, at: Value | None = None, *, far: bool = False) -> Refused:
        """Return this from `when` to refuse, with the reason that reports show; `far` where what was found is no
        near miss (a matrix product, where experts end in one): only `explain` shows it then."""
        self.refusal = Refused(reason, at, far)
        return self.refusal

    @property
    def values(self) -> list[Value]:
        """The captured values, those of repetitions too."""
        flat = [v for c in self._captures.values() for v in (c if isinstance(c, tuple) else (c,))]
        return [v for v in flat if isinstance(v, Value)]

    def __getattr__(self, name: str) -> Any:
        try:
            return self._captures[name]
        except KeyError:
            known = ", ".join(self._captures) or "none"
            raise CompileError(
                f"the match has no capture {name!r}", code="pattern", hint=f"captures: {known}"
            ) from None
