"""Rewrites and the worklist engine that applies them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moec.ir import Builder, CompileError, Graph, Location, Node, Value
from moec.ir.compare import same_attrs
from moec.passes.base import Pass, Refusal, active_record
from moec.passes.matcher import Bindings, Matcher
from moec.passes.pattern import Pattern, build_pattern


class Refused(Exception):
    """Returned by `m.no(...)`: the match holds but the rule does not apply."""

    def __init__(self, reason: str, at: Value | None = None):
        super().__init__(reason)
        self.reason = reason
        self.at = at


class Match:
    """A match: captures are attributes (`m.gate` a Value, `m.eps` a number)."""

    def __init__(self, bindings: Bindings, pattern: Pattern):
        self._captures = bindings.captures
        self.nodes: tuple[Node, ...] = tuple(n for p, n in bindings.nodes.items() if p not in pattern.shared)
        self.roots: tuple[Value, ...] = tuple(bindings.nodes[r.node].results[r.index] for r in pattern.roots)
        self.location = Location.merge(*(n.location for n in sorted(self.nodes, key=lambda n: n._order)))

    @property
    def root(self) -> Value:
        return self.roots[0]

    def get(self, name: str, default: Any = None) -> Any:
        """A capture that only some alternatives bind."""
        return self._captures.get(name, default)

    def no(self, reason: str, at: Value | None = None) -> Refused:
        """Return this from `when` to refuse, with the reason that reports show."""
        return Refused(reason, at)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._captures[name]
        except KeyError:
            known = ", ".join(self._captures) or "none"
            raise CompileError(
                f"the match has no capture {name!r}", code="pattern", hint=f"captures: {known}"
            ) from None


@dataclass(frozen=True)
class Rewrite(Pass):
    """A rule: `pattern(self, p, x, …)` builds what to find, `when(self, m)` may refuse with
    `return m.no(reason)`, `replace(self, b, m)` builds what comes instead and returns as many values as
    the pattern has roots, of the same types."""

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

    def run(self, graph: Graph) -> Graph:
        return apply_rules(self.rules, graph, quiet=self.quiet)


def source_of(rule: object) -> str:
    """file:line of a rule's class."""
    cls = type(rule)
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def rule_error(rule: Pass, message: str, *, location: Location | None = None, hint: str | None = None) -> CompileError:
    return CompileError(f"rule {rule.name} ({source_of(rule)}): {message}", code="rule", location=location, hint=hint)


@lru_cache(maxsize=4096)
def compiled_pattern(rule: Rewrite) -> Pattern:
    """The rule's pattern. Raises CompileError naming the rule's file:line where it is malformed."""
    try:
        return build_pattern(rule.pattern)
    except CompileError as e:
        raise rule_error(rule, e.message, hint=e.hint) from None
    except TypeError as e:
        raise rule_error(rule, f"pattern() failed: {e}") from e


def apply_rules(rules: Sequence[Rewrite], graph: Graph, *, quiet: bool = False) -> Graph:
    """A rewritten copy: rules fire anywhere, in order of the nodes, until none matches.

    Raises CompileError naming the rule's file:line where a rule loops, changes nothing, returns the wrong
    number or type of values, or its `when` or `replace` raises.
    """
    graph = graph.clone()
    for g in (graph, *graph.functions.values()):
        _Engine(rules, g, quiet).run()
    return graph


class _Engine:
    def __init__(self, rules: Sequence[Rewrite], graph: Graph, quiet: bool):
        self.graph = graph
        self.quiet = quiet
        self.by_op: dict[str, list[tuple[Rewrite, Pattern]]] = {}
        self.depth = 1
        for rule in rules:
            pattern = compiled_pattern(rule)
            self.by_op.setdefault(pattern.roots[0].node.opdef.name, []).append((rule, pattern))
            self.depth = max(self.depth, pattern.depth)
        self.record = active_record.get()
        self.refused: set[tuple[str, Node | None, str]] = set()
        # every application of a terminating rule set shrinks or lowers something; far beyond that it loops
        self.limit = 50 * len(graph) + 1000
        self.fired: dict[str, int] = {}

    def run(self) -> None:
        queue: deque[Node] = deque(self.graph.nodes)
        waiting = set(queue)
        while queue:
            node = queue.popleft()
            waiting.discard(node)
            if node.graph is None:
                continue
            for again in self._visit(node):
                if again not in waiting and again.graph is not None:
                    waiting.add(again)
                    queue.append(again)

    def _visit(self, node: Node) -> list[Node]:
        for rule, pattern in self.by_op.get(node.op, ()):
            for bindings in Matcher(pattern).at(node):
                m = Match(bindings, pattern)
                if self._refuses(rule, m):
                    continue
                return self._apply(rule, m)
        return []

    def _refuses(self, rule: Rewrite, m: Match) -> bool:
        try:
            verdict = rule.when(m)
        except CompileError as e:
            raise rule_error(rule, f"when() failed: {e.message}", location=m.location, hint=e.hint) from e
        except Exception as e:
            raise rule_error(rule, f"when() raised {type(e).__name__}: {e}", location=m.location) from e
        if verdict is None:
            return False
        if not isinstance(verdict, Refused):
            raise rule_error(rule, f"when() returned {verdict!r}", hint="return m.no(reason), or nothing to accept")
        key = (rule.name, m.root.producer, verdict.reason)
        if self.record is not None and not self.quiet and key not in self.refused:
            where = verdict.at.location if verdict.at is not None and verdict.at.location else m.location
            self.record.refused.append(Refusal(rule.name, verdict.reason, where))
        self.refused.add(key)
        return True

    def _apply(self, rule: Rewrite, m: Match) -> list[Node]:
        self.fired[rule.name] = self.fired.get(rule.name, 0) + 1
        if sum(self.fired.values()) > self.limit:
            busy = sorted(self.fired, key=lambda n: -self.fired[n])[:3]
            raise rule_error(rule, f"rules do not terminate: {', '.join(busy)} fired {self.limit} times")
        anchor = max((r.producer for r in m.roots if r.producer), key=lambda n: n._order)
        builder = Builder(self.graph, before=anchor, location=m.location)
        new = self._replacement(rule, builder, m)
        for old, value in zip(m.roots, new, strict=True):
            if value.type != old.type:
                raise rule_error(rule, f"replace() returned {value.type} for {old.type}", location=m.location)
        created = set(builder.created)
        if all(_equivalent(a, b, created) for a, b in zip(new, m.roots, strict=True)):
            raise rule_error(
                rule, "replace() builds what was matched: the rule would fire forever", location=m.location
            )
        if any(u in created for r in m.roots for u in r.users):
            raise rule_error(rule, "replace() uses the value that it replaces", location=m.location)
        if len(m.roots) > 1:
            self._reorder(rule, m, builder.created)
        for old, value in zip(m.roots, new, strict=True):
            self.graph.replace_value(old, value)
        released = {v for n in m.nodes for v in n.operands if v is not None}
        for dead in sorted(m.nodes, key=lambda n: -n._order):
            # a bound inner value may live on in the replacement
            if not any(r.uses or r.is_output for r in dead.results):
                self.graph.erase(dead)
        if self.record is not None:
            self.record.fired[rule.name] = self.record.fired.get(rule.name, 0) + 1
        return self._affected(builder.created, new, released)

    def _replacement(self, rule: Rewrite, builder: Builder, m: Match) -> tuple[Value, ...]:
        try:
            new = rule.replace(builder, m)
        except CompileError as e:
            raise rule_error(rule, f"replace() failed: {e.message}", location=m.location, hint=e.hint) from e
        except Exception as e:
            raise rule_error(rule, f"replace() raised {type(e).__name__}: {e}", location=m.location) from e
        values = tuple(new) if isinstance(new, list | tuple) else (new,)
        if new is None or len(values) != len(m.roots) or not all(isinstance(v, Value) for v in values):
            shown = "nothing" if new is None else f"{len(values)} of {[type(v).__name__ for v in values]}"
            raise rule_error(
                rule, f"replace() returned {shown}, expected {len(m.roots)} Value(s)", hint="is a return missing?"
            )
        for v in values:
            foreign = v.producer is not None and v.producer.graph is not self.graph
            if foreign or (v.producer is None and v not in self.graph.inputs and v.weight is None):
                raise rule_error(rule, "replace() returned a value of another graph", location=m.location)
        return values

    def _reorder(self, rule: Rewrite, m: Match, created: Sequence[Node]) -> None:
        """The new nodes stand before the last root; users of the other roots must come after them."""
        last = max((r.producer for r in m.roots if r.producer), key=lambda n: n._order)
        late: list[Node] = []
        stack = [u for r in m.roots for u in r.users if u.precedes(last) and u not in m.nodes]
        seen: set[Node] = set()
        while stack:
            n = stack.pop()
            if n in seen or last.precedes(n):
                continue
            if n in created:
                raise rule_error(rule, "the replacement depends on a user of a root", location=m.location)
            seen.add(n)
            late.append(n)
            stack += [u for r in n.results for u in r.users]
        following = last._next
        for n in sorted(late, key=lambda n: n._order):
            self.graph.move_before(n, following)

    def _affected(self, created: Sequence[Node], new: Sequence[Value], released: set[Value]) -> list[Node]:
        """Nodes where a match may have become possible: the new ones, and users up to the pattern depth."""
        affected = dict.fromkeys(n for n in created if n.graph is not None)
        frontier = [u for v in new for u in v.users] + [u for n in created for r in n.results for u in r.users]
        # a value that lost a use may now be an inner one; with many users left it cannot
        frontier += [u for v in released if len(v.uses) <= 2 for u in v.users]
        for _ in range(self.depth):
            fresh = [n for n in dict.fromkeys(frontier) if n not in affected]
            affected.update(dict.fromkeys(fresh))
            frontier = [u for n in fresh for r in n.results for u in r.users]
        return list(affected)


def _equivalent(new: Value, old: Value, created: set[Node]) -> bool:
    """Whether a created value rebuilds the old one, up to commutativity."""
    if new is old:
        return True
    a, b = new.producer, old.producer
    if a is None or b is None or a not in created or a.opdef is not b.opdef or new.index != old.index:
        return False
    if not same_attrs(a.attrs, b.attrs) or len(a.operands) != len(b.operands):
        return False

    def pairwise(xs: Sequence[Value | None], ys: Sequence[Value | None]) -> bool:
        return all(
            x is y or (x is not None and y is not None and _equivalent(x, y, created))
            for x, y in zip(xs, ys, strict=True)
        )

    return pairwise(a.operands, b.operands) or (a.opdef.commutative and pairwise(a.operands[::-1], b.operands))
