"""Rewrites: a pattern, an optional condition, a replacement."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from moec.ir import CompileError, Graph
from moec.passes.base import Pass
from moec.passes.rewriting.engine import (
    Application,
    Applications,
    RuleError,
    apply_rules,
    compiled_patterns,
    limited,
    rule_error,
    source_of,
)
from moec.passes.rewriting.match import Match, Refused

__all__ = [
    "Application",
    "Applications",
    "Match",
    "Refused",
    "Rewrite",
    "RuleError",
    "RuleSet",
    "apply_rules",
    "compiled_patterns",
    "limited",
    "rule_error",
    "source_of",
]


# what an author defines; a misspelt one would be silently without effect
_METHODS = ("pattern", "when", "replace")


@dataclass(frozen=True)
class Rewrite(Pass):
    """A rule: `pattern(self, p, x, …)` builds what to find, `when(self, m)` may refuse with
    `return m.no(reason)`, `replace(self, b, m)` builds what comes instead and returns as many values as
    the pattern has roots, of the same types. `max` limits how often it is applied in one run."""

    max: int | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, method in vars(cls).items():
            if not callable(method) or name in _METHODS:
                continue
            for meant in _METHODS:
                if sorted(name) == sorted(meant) or (len(name) < len(meant) and name[0] == meant[0]
                                                     and get_close_matches(name, [meant], 1, 0.85)):  # fmt: skip
                    where = f"{inspect.getsourcefile(method)}:{method.__code__.co_firstlineno}"
                    raise CompileError(
                        f"rule {cls.__name__} ({where}): {name}() is no method of a rule",
                        code="rule",
                        hint=f"did you mean {meant}()?",
                    )

    @abstractmethod
    def pattern(self, p: Any, *captures: Any) -> Any: ...

    def when(self, m: Match) -> Refused | None:
        return None

    @abstractmethod
    def replace(self, b: Any, m: Match) -> Any: ...

    def run(self, graph: Graph) -> Graph:
        return apply_rules([self], graph)


@dataclass(frozen=True)
class RuleSet(Pass):
    """Several rules applied together until none fires; earlier ones have precedence at a node.

    `quiet` keeps refusals out of the report, where a refusal tells nothing (a cast that does something).
    """

    rules: tuple[Rewrite, ...] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (self.rules,) if isinstance(self.rules, Rewrite) else tuple(self.rules))

    def run(self, graph: Graph) -> Graph:
        return apply_rules(self.rules, graph, quiet=self.quiet)
