"""The declaration of an op: signature, type inference and reference meaning in one class."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch

from moec.ir.dims import Dim
from moec.ir.errors import CompileError
from moec.ir.location import source_of_class
from moec.ir.types import DType, TensorType

if TYPE_CHECKING:
    from moec.ir.graph import Graph, Value

# Field kinds of an op class. `Operand` is one tensor, `OptionalOperand` may be absent (None),
# `Operands` is any number (at most one such field per op), `OptionalOperands` any number of which some may be absent,
# `Attr[T]` a constant of type T.
Operand = Annotated[Any, "operand"]
OptionalOperand = Annotated[Any, "optional"]
Operands = Annotated[Any, "variadic"]
OptionalOperands = Annotated[Any, "optional variadic"]
T = TypeVar("T")
Attr = Annotated[T, "attr"]

REQUIRED: Any = object()
_VARIADIC = ("variadic", "optional variadic")


@dataclass(frozen=True)
class AttrSpec:
    """`members`: the types that a value of a union may have, or the items of a tuple; none: any."""

    name: str
    type: Any
    default: Any = REQUIRED
    members: tuple[type, ...] = ()


@dataclass(frozen=True, eq=False)
class OpDef:
    """What the rest of the compiler knows of an op."""

    name: str
    cls: type
    operands: tuple[tuple[str, str], ...]  # (field name, "operand" | "optional" | "variadic" | "optional variadic")
    attrs: Mapping[str, AttrSpec]
    doc: str
    commutative: bool = False
    elementwise: bool = False
    results: int | None = 1  # None: as many as `infer` says
    binds: tuple[str, ...] = ()  # attributes that name sizes which its results are the first to have

    @property
    def family(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def source(self) -> tuple[str, int]:
        """File and line of the class, ("", 0) where it has none. Looked up when asked for: that parses the file, which
        for every op at import takes longer than all else of the import."""
        return source_of_class(self.cls)

    @property
    def file(self) -> str:
        return self.source[0]

    @property
    def line(self) -> int:
        return self.source[1]

    @property
    def decompose(self) -> Callable[..., Any] | None:
        """`decompose(self, b)`: builds the same meaning from simpler ops; None where the op is primitive."""
        return getattr(self.cls, "decompose", None)

    @property
    def samples(self) -> Callable[..., Iterable[Any]] | None:
        """Generator of test cases for the op; see moec.ir.sampling."""
        return getattr(self.cls, "samples", None)

    def undefined(self, operands: Sequence[Any], attrs: Mapping[str, Any]) -> bool:
        """Whether the op leaves open what it gives for these tensors: its class may say so by `undefined(self)`, a
        bool or a bool tensor (any), with the fields set as for `reference`. Backends may then differ."""
        rule = getattr(self.cls, "undefined", None)
        if rule is None:
            return False
        return bool(torch.as_tensor(rule(self.instance(operands, attrs))).any())

    def instance(self, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Any:
        """The op class with its fields set (types for `infer`, tensors for `reference`, values for
        `decompose`)."""
        obj: Any = object.__new__(self.cls)
        for name, value in self.named_operands(operands).items():
            setattr(obj, name, value)
        for name, value in attrs.items():
            setattr(obj, name, value)
        return obj

    def named_operands(self, operands: Sequence[Any]) -> dict[str, Any]:
        variadic = len(operands) - (len(self.operands) - 1)
        result: dict[str, Any] = {}
        i = 0
        for name, kind in self.operands:
            if kind in _VARIADIC:
                result[name] = tuple(operands[i : i + variadic])
                i += variadic
            else:
                result[name] = operands[i]
                i += 1
        return result

    def pad_operands(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Check the count and fill absent trailing optional operands with None. Raises CompileError."""
        operands = list(operands)
        kinds = [k for _, k in self.operands]
        if any(k in _VARIADIC for k in kinds):
            fixed = len(kinds) - 1
            if len(operands) < fixed:
                raise CompileError(f"{self.name} takes at least {fixed} operands, got {len(operands)}", code="arity")
        else:
            least = max((i + 1 for i, k in enumerate(kinds) if k == "operand"), default=0)
            if not least <= len(operands) <= len(kinds):
                want = str(least) if least == len(kinds) else f"{least} to {len(kinds)}"
                names = ", ".join(n for n, _ in self.operands)
                raise CompileError(f"{self.name}({names}) takes {want} operands, got {len(operands)}", code="arity")
            operands += [None] * (len(kinds) - len(operands))
        named = self.named_operands(operands)
        for name, kind in self.operands:
            absent = any(v is None for v in named[name]) if kind in _VARIADIC else named[name] is None
            if absent and not kind.startswith("optional"):
                raise CompileError(f"{self.name}: operand {name!r} is missing", code="arity")
        return tuple(operands)

    def complete_attrs(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """Check names and kinds, and fill defaults. Raises CompileError."""
        for name in attrs:
            if name not in self.attrs:
                near = difflib.get_close_matches(name, self.attrs, 1)
                raise CompileError(
                    f"{self.name} has no attribute {name!r}",
                    code="attribute",
                    hint=f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(self.attrs) or 'none'}",
                )
        result = {}
        for name, spec in self.attrs.items():
            value = attrs.get(name, spec.default)
            if value is REQUIRED:
                raise CompileError(f"{self.name}: attribute {name!r} is required", code="attribute")
            result[name] = normalise_attr(value, spec, self.name)
        return result


def normalise_attr(value: Any, spec: AttrSpec, op: str) -> Any:
    """Lists become tuples, ints become floats where a float is declared, dtype names become DType."""
    if spec.type is DType:
        return DType.of(value)
    if isinstance(value, list):
        value = tuple(value)
    if spec.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    plain = {float: float, int: int, str: str, bool: bool, tuple: tuple, TensorType: TensorType}.get(spec.type)
    if plain is not None and (not isinstance(value, plain) or (plain is int and isinstance(value, bool))):
        raise CompileError(
            f"{op}: attribute {spec.name!r} must be {plain.__name__}, got {shown_value(value)}",
            code="attribute",
        )
    if not _is_attr_value(value):
        raise CompileError(f"{op}: attribute {spec.name!r} cannot hold {shown_value(value)}", code="attribute")
    if spec.members:
        items = value if spec.type is tuple else (value,)
        wrong = next((v for v in items if not _is_one_of(v, spec.members)), REQUIRED)
        if wrong is not REQUIRED:
            names = " or ".join("None" if t is type(None) else t.__name__ for t in spec.members)
            what = f"must hold {names}" if spec.type is tuple else f"must be {names}"
            raise CompileError(f"{op}: attribute {spec.name!r} {what}, got {shown_value(wrong)}", code="attribute")
    return value


_DEEPEST = 8  # tuples in tuples; what handles attributes is recursive
_INTEGERS = range(-(2**63), 2**64)  # i64 and u64


def _is_attr_value(value: Any, depth: int = 0) -> bool:
    if isinstance(value, tuple):
        return depth < _DEEPEST and all(_is_attr_value(v, depth + 1) for v in value)
    if isinstance(value, int):
        return value in _INTEGERS
    return value is None or isinstance(value, float | str | DType | Dim | TensorType)


def _is_one_of(value: Any, members: tuple[type, ...]) -> bool:
    return isinstance(value, members) and (not isinstance(value, bool) or bool in members)


def shown_value(value: Any) -> str:
    """Type and text of what stands for an attribute, at most 80 characters of it."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, a nest of thousands of tuples, an object of the user's
        text = "…"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _declared_kind(kind: Any) -> tuple[Any, tuple[type, ...]]:
    """The type of an `Attr[…]` field, and its members (see `AttrSpec`)."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return Any, typing.get_args(kind)
    if origin is tuple:
        items = [a for a in typing.get_args(kind) if a is not ...]
        members = tuple(dict.fromkeys(m for item in items for m in typing.get_args(item) or (item,)))
        return tuple, members if all(isinstance(m, type) for m in members) else ()
    return origin or kind, ()


_OPS: dict[str, OpDef] = {}
_BARE: dict[str, list[str]] = {}


def op(
    name: str,
    *,
    commutative: bool = False,
    elementwise: bool = False,
    results: int | None = 1,
    binds: tuple[str, ...] = (),
) -> Callable[[type], type]:
    """Class decorator that declares an op.

    The class has operand and attribute fields, `infer(self)` returning one TensorType or a tuple,
    `reference(self)` returning one torch tensor or a tuple, and optionally `decompose(self, b)`.
    `results` is their number, None where it depends on operands or attributes; `binds` names the attributes that hold
    sizes known only when the op has run (see moec.ir.runtime_sizes).
    """
    if name.count(".") != 1:
        raise CompileError(f"op name {name!r} must be family.op", code="name")

    def declare(cls: type) -> type:
        operands, attrs = [], {}
        try:
            hints = _hints(cls)
        except NameError as e:
            raise CompileError(
                f"{_place(name, cls)}: its fields name {e.name!r}, which is not defined", code="op"
            ) from None
        for fname, hint in hints.items():
            if typing.get_origin(hint) is typing.ClassVar:
                continue
            meta = getattr(hint, "__metadata__", ("",))[0]
            if meta in ("operand", "optional", *_VARIADIC):
                operands.append((fname, meta))
            elif meta == "attr":
                kind, members = _declared_kind(hint.__origin__)
                attrs[fname] = AttrSpec(fname, kind, getattr(cls, fname, REQUIRED), members)
            else:
                raise CompileError(f"{_place(name, cls)}: field {fname!r} must be an Operand or Attr[...]", code="op")
        if sum(k in _VARIADIC for _, k in operands) > 1:
            raise CompileError(f"{_place(name, cls)}: more than one variadic operand", code="op")
        for method in ("infer", "reference"):
            if not callable(getattr(cls, method, None)):
                raise CompileError(f"{_place(name, cls)} lacks {method}()", code="op")
        for attr in binds:
            if attr not in attrs:
                raise CompileError(f"{_place(name, cls)}: binds names {attr!r}, which is no attribute", code="op")
        doc = inspect.getdoc(cls) or ""
        opdef = OpDef(name, cls, tuple(operands), attrs, doc, commutative, elementwise, results, tuple(binds))
        old = _OPS.get(name)
        if old is None:
            _BARE.setdefault(name.split(".")[1], []).append(name)
            _OPS[name] = opdef
        elif _path(old.cls) == _path(cls) or old.file == opdef.file:
            # run again (a notebook cell, a reloaded module): what holds the op sees its new definition
            vars(old).pop("source", None)
            vars(old).update(vars(opdef))
            global _redeclared
            _redeclared += 1
        else:
            raise CompileError(
                f"{_place(name, cls)} is already declared at {old.file}:{old.line}",
                code="name",
                hint="names are family.op: choose a family of your own",
            )
        cls.opdef = _OPS[name]  # type: ignore[attr-defined]  # the decorator adds it
        return cls

    return declare


def _place(name: str, cls: type) -> str:
    """An op and its file:line, for a message."""
    file, line = source_of_class(cls)
    return f"op {name} ({file}:{line})" if file else f"op {name}"


_redeclared = 0


def redeclared() -> int:
    """How often an op was declared again: what was built from the definitions of ops is out of date when it grows."""
    return _redeclared


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:  # text annotations of a class whose module is not loaded under its name (exec)
        rule = getattr(cls, "infer", None)
        return typing.get_type_hints(cls, getattr(rule, "__globals__", None), include_extras=True)


def _path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def known(name: str) -> OpDef | None:
    """The op of a full (`math.silu`) or unambiguous bare (`silu`) name, or None."""
    import moec.ir.ops  # noqa: F401  (declares the ops)

    if name.startswith("extern.") and not name.startswith("extern.aten_"):  # made from a table, when first asked for
        from moec.ir.ops.extern import extern_op

        return extern_op(name)
    full = _BARE.get(name, [])
    return _OPS.get(name) or (_OPS[full[0]] if len(full) == 1 else None)


def lookup(name: str) -> OpDef:
    """The op of a full (`math.silu`) or unambiguous bare (`silu`) name. Raises CompileError with a hint."""
    found = known(name)
    if found is not None:
        return found
    full = _BARE.get(name, [])
    if full:
        raise CompileError(f"op name {name!r} is ambiguous: {', '.join(full)}", code="unknown-op")
    near = difflib.get_close_matches(name, [*_OPS, *_BARE], 3)
    raise CompileError(
        f"unknown op {name!r}", code="unknown-op", hint=f"did you mean {', '.join(near)}?" if near else None
    )


def all_ops() -> list[OpDef]:
    """Every declared op, by name; those that stand in tables of others' ops (`extern`) are not among them."""
    import moec.ir.ops  # noqa: F401

    return [_OPS[k] for k in sorted(_OPS) if not k.startswith("extern.")]


def infer_types(
    opdef: OpDef,
    operands: Sequence[Value | None],
    attrs: Mapping[str, Any],
    functions: Mapping[str, Graph] | None = None,
) -> tuple[TensorType, ...]:
    """Result types. Raises CompileError naming the op where its type rule fails."""
    given = [None if v is None else v.type for v in operands]
    instance = opdef.instance(given, attrs)
    instance.functions = functions or {}
    try:
        result = instance.infer()
    except CompileError as e:
        shown = ", ".join("_" if t is None else str(t) for t in given)
        e.args = (f"{opdef.name}({shown}): {e.message}",)
        e.message = e.args[0]
        raise
    except Exception as e:  # whatever a type rule does wrong is said with its place
        raise _wrong_rule(opdef, f"raised {type(e).__name__}: {e}") from e
    if not isinstance(result, TensorType) and not (
        isinstance(result, list | tuple) and all(isinstance(t, TensorType) for t in result)
    ):
        raise _wrong_rule(opdef, f"returned {result!r}, expected a TensorType or a tuple of them")
    types = (result,) if isinstance(result, TensorType) else tuple(result)
    if opdef.results is not None and len(types) != opdef.results:
        raise CompileError(
            f"{opdef.name} is declared with {opdef.results} results, infer() gives {len(types)}",
            code="op",
            hint=f"@op({opdef.name!r}, results={len(types)}) at {opdef.file}:{opdef.line}",
        )
    return types


def _wrong_rule(opdef: OpDef, what: str) -> CompileError:
    return CompileError(f"infer() of {opdef.name} ({opdef.file}:{opdef.line}) {what}", code="op")
