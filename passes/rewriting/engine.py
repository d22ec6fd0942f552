"""The worklist engine that applies rules, and what it guarantees their authors."""

from __future__ import annotations

import inspect
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moec.ir import Builder, CompileError, Graph, Location, Node, Value
from moec.ir.compare import same_attrs
from moec.ir.location import source_of_class
from moec.ir.opdef import redeclared
from moec.passes.base import Pass, Refusal, active_record
from moec.passes.rewriting.match import Match, Refused
from moec.passes.rewriting.matcher import Matcher
from moec.passes.rewriting.pattern import build_patterns
from moec.passes.rewriting.pattern_types import Pattern

if TYPE_CHECKING:
    from moec.passes.rewrite import Rewrite


@dataclass(frozen=True)
class Application:
    """One firing of a rule: which, where, and the text of its root before."""

    rule: Rewrite
    name: str
    location: Location
    root: str


@dataclass
class Applications:
    """What was applied, in order; engines stop at `limit`."""

    limit: int | None = None
    applications: list[Application] = field(default_factory=list)

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and len(self.applications) >= self.limit


# a value with more uses than this connects no roots
_WIDE = 32
# where a value with more uses than this loses one, its users are visited once, at the end: each layer of a model may
# take one from it, and each time all the others would be visited
_FEW = 8

_limit: ContextVar[Applications | None] = ContextVar("rule_applications", default=None)


@contextmanager
def limited(limit: int | None = None) -> Iterator[Applications]:
    """Inside, rules are applied `limit` times at most, all passes together (None: no limit); the yielded object
    lists the applications."""
    applications = Applications(limit)
    token = _limit.set(applications)
    try:
        yield applications
    finally:
        _limit.reset(token)


@lru_cache(maxsize=1024)
def _source_of_class(cls: Any) -> str:
    file, line = source_of_class(cls)
    return f"{file}:{line}" if file else f"{cls.__module__}.{cls.__qualname__}"


def source_of(rule: object) -> str:
    """file:line of a rule's class."""
    cls: Any = type(rule)
    return _source_of_class(cls)


class RuleError(CompileError):
    """An error of a rule, which is its `rule`."""

    def __init__(self, rule: Pass, message: str, **about: Any):
        super().__init__(f"rule {rule.name} ({source_of(rule)}): {message}", **about)
        self.rule = rule


def rule_error(
    rule: Pass, message: str, *, code: str = "rule", location: Location | None = None, hint: str | None = None
) -> RuleError:
    return RuleError(rule, message, code=code, location=location, hint=hint)


def _raised(rule: Pass, error: Exception) -> str:
    """What the author's code raised, and the line of its file that did."""
    file = inspect.getsourcefile(type(rule))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def compiled_patterns(rule: Rewrite) -> tuple[Pattern, ...]:
    """The rule's pattern, one for each alternative at its root. Raises CompileError naming the rule's
    file:line where it is malformed."""
    # kept by the rule itself: rules that compare equal may build other patterns, and options need no hash
    definitions, patterns = vars(rule).get("_patterns", (None, ()))
    if definitions != redeclared():
        patterns = _compile_patterns(rule)
        vars(rule)["_patterns"] = (redeclared(), patterns)
    return patterns


def _compile_patterns(rule: Rewrite) -> tuple[Pattern, ...]:
    try:
        return build_patterns(rule.pattern)
    except CompileError as e:
        raise rule_error(rule, e.message, hint=e.hint) from None
    except Exception as e:  # whatever the author's code raises is reported as the rule's
        raise rule_error(rule, f"pattern() raised {_raised(rule, e)}") from e


def verdict(rule: Rewrite, m: Match) -> Refused | None:
    """What the rule's `when` says. Raises CompileError naming the rule's file:line where it says nothing clear."""
    try:
        said = rule.when(m)
    except CompileError as e:
        raise rule_error(rule, f"when() failed: {e.message}", location=m.location, hint=e.hint) from e
    except Exception as e:  # whatever the author's code raises is reported as the rule's
        raise rule_error(rule, f"when() raised {_raised(rule, e)}", location=m.location) from e
    if said is None and m.refusal is not None:
        text = f"when() called m.no({m.refusal.reason!r}) and went on"
        raise rule_error(rule, text, location=m.location, hint="return m.no(reason)")
    if not isinstance(said, Refused | None):
        raise rule_error(rule, f"when() returned {said!r}", hint="return m.no(reason), or nothing to accept")
    return said


def apply_rules(rules: Sequence[Rewrite], graph: Graph, *, quiet: bool = False) -> Graph:
    """A rewritten copy: rules fire anywhere, in order of the nodes, until none matches.

    Raises CompileError naming the rule's file:line where a rule loops, changes nothing, changes the graph other
    than through its builder, returns the wrong number or type of values, or its `when` or `replace` raises.
    """
    for rule in rules:
        if not isinstance(rule, Pass) or not hasattr(rule, "replace"):
            hint = f"write {rule.__name__}()" if isinstance(rule, type) else None
            raise CompileError(f"{rule!r} is not a Rewrite", code="rule", hint=hint)
    graph = graph.clone()
    fired: dict[int, int] = {}
    for g in (graph, *graph.functions.values()):
        _Engine(rules, g, quiet, fired).run()
    return graph


class _Engine:
    def __init__(self, rules: Sequence[Rewrite], graph: Graph, quiet: bool, fired: dict[int, int]):
        self.rules = rules
        self.graph = graph
        self.by_op: dict[str, list[tuple[Rewrite, Pattern]]] = {}
        self.depth = 1
        self.uses = 0.0
        self.first_of_several: dict[str, int] = {}  # op of a first root that is beside others: depth of its pattern
        self.tree_ops: frozenset[str] = frozenset()
        for rule in rules:
            for pattern in compiled_patterns(rule):
                self.by_op.setdefault(pattern.roots[0].node.opdef.name, []).append((rule, pattern))
                self.depth = max(self.depth, pattern.depth)
                self.uses = max(self.uses, pattern.uses)
                self.tree_ops |= pattern.tree_ops
                if pattern.forked:
                    op = pattern.roots[0].node.opdef.name
                    self.first_of_several[op] = max(pattern.depth, self.first_of_several.get(op, 0))
        self.record = active_record.get()
        self.notes = None if quiet else self.record  # where refusals go
        self.applications = _limit.get()
        self.refused: set[tuple[str, Node | None, str]] = set()
        self.fired = fired  # by id: rules may share a name
        # a replacement is one generation younger than what it replaces; chains of n nodes have n generations
        self.generation: dict[Node, int] = {}
        self.oldest = len(graph) + 1000
        self.limit = 50 * len(graph) + 1000
        self.count = 0
        self.later: dict[Value, None] = {}  # values with many uses that lost one

    def run(self) -> None:
        queue: deque[Node] = deque(self.graph.nodes)
        waiting = set(queue)
        while (queue or self._resume(queue, waiting)) and not (self.applications and self.applications.exhausted):
            node = queue.popleft()
            waiting.discard(node)
            if node.graph is None:
                continue
            for again in self._visit(node):
                if again not in waiting and again.graph is not None:
                    waiting.add(again)
                    queue.append(again)

    def _resume(self, queue: deque[Node], waiting: set[Node]) -> bool:
        """Queue what the values of `later` may have made possible; whether there is any."""
        users = [u for v in self.later if v.producer and v.producer.graph is not None for u in v.users]
        self.later.clear()
        found = self._above(users, {})
        queue.extend(found)
        waiting.update(found)
        return bool(queue)

    def _visit(self, node: Node) -> list[Node]:
        for rule, pattern in self.by_op.get(node.op, ()):
            if rule.max is not None and self.fired.get(id(rule), 0) >= rule.max:
                continue
            matcher = Matcher(pattern)
            for bindings in matcher.at(node):
                m = Match(bindings, pattern)
                if self._refuses(rule, m):
                    continue
                return self._apply(rule, m)
            if matcher.escape is not None:
                escape = matcher.escape
                self._note(rule, node, escape.reason, escape.value.location)
        return []

    def _note(self, rule: Rewrite, node: Node | None, reason: str, location: Location) -> None:
        key = (rule.name, node, reason)
        if self.notes is not None and key not in self.refused:
            self.refused.add(key)
            self.notes.refused.append(Refusal(rule.name, reason, location, source_of(rule)))

    def _refuses(self, rule: Rewrite, m: Match) -> bool:
        said = verdict(rule, m)
        if said is None:
            return False
        if said.far:
            return True
        where = said.at.location if said.at is not None and said.at.location else m.location
        self._note(rule, m.root.producer, said.reason, where)
        return True

    def _apply(self, rule: Rewrite, m: Match) -> list[Node]:
        self.fired[id(rule)] = self.fired.get(id(rule), 0) + 1
        generation = 1 + max(self.generation.get(n, 0) for n in m.nodes)
        self.count += 1
        if self.count > self.limit or generation > self.oldest:
            busiest = sorted((r for r in self.rules if id(r) in self.fired), key=lambda r: -self.fired[id(r)])
            busy = list(dict.fromkeys(r.name for r in busiest))[:3]
            text = f"rules do not terminate: {', '.join(busy)} fired {self.count} times"
            raise rule_error(rule, text, code="endless", location=m.location)
        anchor = max((r.producer for r in m.roots if r.producer), key=lambda n: n._order)
        if self.applications is not None:
            root = m.root.producer.op if m.root.producer else ""
            self.applications.applications.append(Application(rule, rule.name, m.location, root))
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
        self.generation.update(dict.fromkeys(builder.created, generation))
        # in order, so that two runs apply the same rules in the same order
        released = list(dict.fromkeys(v for n in m.nodes for v in n.operands if v is not None))
        redirected = [u for r in m.roots for u in r.users]
        for old, value in zip(m.roots, new, strict=True):
            self.graph.replace_value(old, value)
        for dead in sorted(m.nodes, key=lambda n: -n._order):
            # a bound inner value may live on in the replacement
            if not any(r.uses or r.is_output for r in dead.results):
                self.graph.erase(dead)
        for v in released:
            # a number that the pattern matched by its value, and nothing else uses
            if v.producer is not None and v.producer.op == "tensor.constant" and not v.uses and not v.is_output:
                self.graph.erase(v.producer)
        if self.record is not None:
            self.record.fired[rule.name] = self.record.fired.get(rule.name, 0) + 1
        return self._affected(builder.created, redirected, new, released)

    def _replacement(self, rule: Rewrite, builder: Builder, m: Match) -> tuple[Value, ...]:
        before = _snapshot(m)
        size = len(self.graph)
        try:
            new = rule.replace(builder, m)
        except CompileError as e:
            raise rule_error(rule, f"replace() failed: {e.message}", location=m.location, hint=e.hint) from e
        except Exception as e:  # whatever the author's code raises is reported as the rule's
            raise rule_error(rule, f"replace() raised {_raised(rule, e)}", location=m.location) from e
        if _snapshot(m) != before or len(self.graph) != size + len(builder.created):
            text = "replace() changed the matched graph itself"
            raise rule_error(rule, text, location=m.location, hint="build new nodes with b, and return their values")
        values = tuple(new) if isinstance(new, list | tuple) else (new,)
        if new is None or len(values) != len(m.roots) or not all(isinstance(v, Value) for v in values):
            shown = "nothing" if new is None else f"{len(values)} of {[type(v).__name__ for v in values]}"
            raise rule_error(
                rule,
                f"replace() returned {shown}, expected {len(m.roots)} Value(s)",
                hint="is a return missing?" if new is None else "return the values that b's ops give",
            )
        for v in (*values, *(o for n in builder.created for o in n.operands if o is not None)):
            if not self._owns(v):
                what = f"weight @{v.weight.name}" if v.weight is not None else repr(v)
                hint = "b.weight(name, tensor) adds a weight" if v.weight is not None else "use the match's captures"
                text = f"replace() used a value of another graph: {what}"
                raise rule_error(rule, text, location=m.location, hint=hint)
        return values

    def _owns(self, v: Value) -> bool:
        if v.producer is not None:
            return v.producer.graph is self.graph
        return v in self.graph.inputs if v.weight is None else self.graph.weights.get(v.weight.name) is v

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

    def _affected(
        self, created: Sequence[Node], redirected: Sequence[Node], new: Sequence[Value], released: Sequence[Value]
    ) -> list[Node]:
        """Nodes where a match may have become possible: the new ones, and users up to the pattern depth."""
        affected = dict.fromkeys(n for n in created if n.graph is not None)
        frontier = [*redirected, *(u for n in created for r in n.results for u in r.users)]
        # a value that lost a use may now be an inner one; with more uses left than in any pattern it cannot
        made = [(v, v.producer) for v in released if v.producer is not None and v.producer.graph is not None]
        for v, _ in made:
            if len(v.uses) <= min(self.uses, _FEW):
                frontier += v.users
            elif len(v.uses) <= self.uses:
                self.later[v] = None
        # or its node a root: the top of a tree, or one whose other results are no longer used
        frontier += [n for _, n in made if n.op in self.tree_ops or len(n.results) > 1]
        frontier += [v.producer for v in new if v.producer is not None and v.producer.op in self.tree_ops]
        return self._above([n for n in frontier if n.graph is not None], affected)

    def _above(self, frontier: list[Node], affected: dict[Node, None]) -> list[Node]:
        """`affected`, the nodes of `frontier`, and users up to the pattern depth."""
        for _ in range(self.depth):
            fresh = [n for n in dict.fromkeys(frontier) if n not in affected]
            if self.tree_ops:
                fresh += [n for n in dict.fromkeys(map(self._tree_top, fresh)) if n not in affected]
            affected.update(dict.fromkeys(fresh))
            frontier = [u for n in fresh for r in n.results for u in r.users]
        if self.first_of_several:
            affected.update(dict.fromkeys(self._first_roots(affected)))
        return list(affected)

    def _first_roots(self, nodes: Iterable[Node]) -> list[Node]:
        """First roots of matches whose other roots may be `nodes`: they share what they are computed from."""
        depth = max(self.first_of_several.values())
        shared: dict[Value, None] = {}
        below = [v for n in nodes for v in n.operands if v is not None]
        for _ in range(depth):
            # what the whole graph uses (weights, constants, tables) says nothing of which roots belong together
            below = [v for v in dict.fromkeys(below) if v not in shared and v.producer and len(v.uses) <= _WIDE]
            shared.update(dict.fromkeys(below))
            below = [o for v in below if v.producer for o in v.producer.operands if o is not None]
        seen: dict[Node, None] = {}
        frontier = [u for v in shared for u in v.users]
        for _ in range(depth):
            frontier = [n for n in dict.fromkeys(frontier) if n not in seen]
            seen.update(dict.fromkeys(frontier))
            frontier = [u for n in frontier for r in n.results if len(r.uses) <= _WIDE for u in r.users]
        return [n for n in seen if n.op in self.first_of_several]

    def _tree_top(self, node: Node) -> Node:
        """The top of the tree of one op that a node is in."""
        while node.op in self.tree_ops:
            users = node.result.users
            if len(users) != 1 or users[0].opdef is not node.opdef:
                break
            node = users[0]
        return node


def _snapshot(m: Match) -> list[Any]:
    """What a replacement must leave as it is."""
    return [
        (n.graph, n.opdef, n.operands, tuple(n.attrs.items()), n.location, tuple(r.type for r in n.results))
        for n in m.nodes
    ] + [v.type for v in m.values]


def _equivalent(new: Value, old: Value, created: set[Node]) -> bool:
    """Whether a created value rebuilds the old one, up to commutativity."""
    known: dict[tuple[Value | None, Value | None], bool] = {}
    stack: list[tuple[Value | None, Value | None]] = [(new, old)]  # chains may be long: no recursion
    while stack:
        pair = stack[-1]
        if pair not in known:
            orders = _operand_pairs(*pair, created)
            open_pairs = [next((p for p in pairs if not known.get(p, False)), None) for pairs in orders]
            pending = [p for p in open_pairs if p is not None and p not in known]
            if None not in open_pairs and pending:
                stack.append(pending[0])
                continue
            known[pair] = None in open_pairs
        stack.pop()
    return known[new, old]


def _operand_pairs(
    new: Value | None, old: Value | None, created: set[Node]
) -> list[list[tuple[Value | None, Value | None]]]:
    """The pairs that must be equivalent for two values to be so: one list for each order of the operands."""
    if new is old:
        return [[]]
    if new is None or old is None or new.index != old.index:
        return []
    a, b = new.producer, old.producer
    if a is None or b is None or a not in created or a.opdef is not b.opdef:
        return []
    if not same_attrs(a.attrs, b.attrs) or len(a.operands) != len(b.operands):
        return []
    orders = [a.operands, a.operands[::-1]] if a.opdef.commutative else [a.operands]
    return [list(zip(operands, b.operands, strict=True)) for operands in orders]
