"""An ONNX graph → IR graph, node by node."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from moec.frontend.context import Number, as_number
from moec.frontend.onnx import fold, ranges, sequences
from moec.frontend.onnx.assume import NOTHING, Facts, Undecided
from moec.frontend.onnx.check import free_names
from moec.frontend.onnx.context import KNOWN_LIMIT, ImportContext
from moec.frontend.onnx.extern import UNKNOWN, attribute, element_name, element_type, extern
from moec.frontend.onnx.files import ExternalSource, ProtoSource, external
from moec.frontend.onnx.registry import MICROSOFT, find
from moec.ir import CompileError, Dim, DType, Graph, Location, TensorType, Value, Weight
from moec.ir.arrays import NUMPY, OPAQUE, to_numpy
from moec.ir.dims import parse_size
from moec.ir.ops.extern import op_name, schema_at, table

_RESERVED = {d.value for d in DType} | {"none", "true", "false", "inf", "nan"}
# torch moves these but computes with none of them
_UNCOMPUTED = (DType.U64, DType.U32, DType.U16, DType.C64)
_MOVES = {"Identity", "Cast", "CastLike", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Constant",
          "Expand", "Shape", "Size", "Dropout"}  # fmt: skip
_UNFIT = (ArithmeticError, LookupError, TypeError, ValueError)
_CONTROL = ("If", "Loop", "Scan")
_EXPRESSION = re.compile(r"[\w\s()+*/-]{1,100}", re.ASCII)
_NAMED = re.compile(r"\w")  # "?" is no name: two of them are two sizes
_MOST_TERMS = 8  # of a size: expanding more takes its time
_READ_AT_ONCE = 512  # elements of floats that are read while importing: zeros, ones, scales
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass
class Importer:
    """Builds `graph` from an onnx_ir graph without functions. `folder` holds its external data; `facts` are known of
    sizes, `constants` take the place of inputs; `refused` says of each operator that came in as an extern op, why."""

    model: onnx_ir.Model
    protos: dict[str, onnx.TensorProto]
    folder: Path | None
    facts: Facts = NOTHING
    constants: Mapping[str, Number] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = ImportContext(self.graph)
        self.context.facts = self.facts
        self.opsets = {("" if d == "ai.onnx" else d): v for d, v in self.model.opset_imports.items()}
        self.context.opset = self.opsets.get("", 1)
        self.env: dict[onnx_ir.Value, Value] = {}
        self.lists: dict[onnx_ir.Value, list[Value]] = {}  # sequences
        self.names: dict[str, str] = {}
        self.count = 0  # nodes seen, those of bodies as often as they run

    def run(self) -> Graph:
        source = self.model.graph
        self.graph.name = source.name or "graph"
        self.inputs()
        for name, v in source.initializers.items():
            self.env[v] = self._initializer(str(name), v)
        for i, node in enumerate(source):
            self._node(node, i)
        self._outputs(source)
        self._remove_dead()
        left = {n.op for n in self.graph.nodes}
        self.refused = {op: why for op, why in self.refused.items() if op_name(*op.rpartition(".")[::2]) in left}
        self.graph.verify()
        return self.graph

    # -- inputs, weights, outputs ---------------------------------------------------------------------

    def inputs(self) -> None:
        """The inputs of the graph, and constants in the place of some."""
        source = self.model.graph
        given = [v for v in source.inputs if v.name not in source.initializers]
        texts = [d.value for v in given if v.shape is not None for d in v.shape if isinstance(d, onnx_ir.SymbolicDim)]
        for text in dict.fromkeys(t for t in texts if t and _NAMED.search(t)):
            self.context.taken |= self._dim_symbols(text)
        for v in given:
            try:
                name, type = str(v.name), self._type(v)
                if name in self.constants:
                    self.env[v] = self._constant(type, self.constants[name])
                else:
                    self.env[v] = self.graph.add_input(name, type)
            except CompileError as e:
                raise CompileError(f"input {v.name!r}: {e.message}", code=e.code, hint=e.hint) from None

    def _constant(self, type: TensorType, number: Number) -> Value:
        """A number in the place of an input."""
        if any(isinstance(s, int) and s != 1 for s in type.shape):
            raise CompileError(f"is {type}, {number!r} cannot stand for it", code="arguments")
        try:
            array = np.full([1] * type.rank, as_number(number, type.dtype), NUMPY[type.dtype])
        except (OverflowError, ValueError):
            array = np.array([])
        if not array.size or array.reshape(-1)[0] != number:
            raise CompileError(f"is {type}, {number!r} is none of those", code="arguments")
        return self.context.constant(array)

    def _type(self, v: onnx_ir.Value) -> TensorType:
        if isinstance(v.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
            kind = "sequence" if isinstance(v.type, onnx_ir.SequenceType) else "optional value"
            raise CompileError(f"is a {kind}; only tensors are supported", code="unsupported-model")
        if v.type is None or not isinstance(v.type, onnx_ir.TensorType):
            raise CompileError("has no tensor type", code="unsupported-model")
        dtype = element_type(int(v.type.dtype))
        if dtype is None:
            raise CompileError(
                f"has elements of type {element_name(int(v.type.dtype))}, which are not supported", code="dtype"
            )
        if v.shape is None:
            raise CompileError("has no shape: its rank must be known", code="unsupported-model")
        sizes: list[int | Dim] = []
        for d in v.shape:
            if isinstance(d, int):
                sizes.append(d if d >= 0 else self.context.fresh("d"))
            else:
                size = self._dim(d.value) if d.value and _NAMED.search(d.value) else self.context.fresh("d")
                known = self.facts.value(size)
                sizes.append(size if known is None else known)
        return TensorType(dtype, tuple(sizes))

    def _dim(self, text: str) -> int | Dim:
        """A dimension of the model: its name, or an expression over names."""
        try:
            if not _EXPRESSION.fullmatch(text) or "**" in text or len(re.findall(r"[+*/-]", text)) > _MOST_TERMS:
                raise CompileError("no expression that a size is", code="syntax")
            size = parse_size(text)
            symbols = size.symbols if isinstance(size, Dim) else set()
            if not symbols & _RESERVED and (isinstance(size, Dim) or size >= 0):
                return size
        except CompileError:
            pass
        return Dim(self._name(text))

    def _dim_symbols(self, text: str) -> set[str]:
        size = self._dim(text)
        return set(size.symbols) if isinstance(size, Dim) else set()

    def _name(self, text: str) -> str:
        """A name that the text format takes, the same for the same text."""
        if text not in self.names:
            stem = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "dim"
            stem = f"d_{stem}" if stem[0].isdigit() or stem in _RESERVED else stem
            while stem in self.context.taken:
                stem += "_"
            self.names[text] = stem
            self.context.taken.add(stem)
        return self.names[text]

    def _initializer(self, name: str, v: onnx_ir.Value) -> Value:
        proto = self.protos.get(name)
        if proto is None:  # a constant that became an initializer
            assert v.const_value is not None
            return self.context.constant(v.const_value.numpy(), name)
        return self._tensor(name, proto)

    def _tensor(self, name: str, proto: onnx.TensorProto) -> Value:
        dtype = element_type(proto.data_type)
        if dtype is None or dtype is DType.C64:
            raise CompileError(
                f"initializer {name!r} has elements of type {element_name(proto.data_type)}, which are not supported",
                code="dtype",
            )
        count = int(np.prod(proto.dims, dtype=np.int64))
        source: Any = ProtoSource(proto)
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            assert self.folder is not None
            where = external(proto)
            source = ExternalSource(
                self.folder, where.location, where.offset, tuple(proto.dims), proto.data_type, proto.name
            )
        array = to_numpy(source.load()) if count <= (KNOWN_LIMIT if dtype.is_integer else _READ_AT_ONCE) else None
        if array is not None and (dtype.is_integer or not proto.dims):  # a number is no weight: rules look at it
            return self.context.constant(array, name)
        weight = Weight(self.graph.fresh_weight_name(name), TensorType(dtype, tuple(proto.dims)), source)
        value = self.graph.add_weight(weight)
        if array is not None:
            self.context.arrays[value] = array
        return value

    def _outputs(self, source: onnx_ir.Graph) -> None:
        for v in source.outputs:
            if v in self.lists:
                raise CompileError(
                    f"output {v.name!r} is a sequence; only tensors are supported", code="unsupported-model"
                )
            value = self.value(v)
            known = self._declared(v)
            if known is not None and (known.dtype is not value.dtype or not _may_be(known, value.type)):
                raise CompileError(
                    f"output {v.name!r} is declared {known}, it is {value.type}", code="type", location=value.location
                )
            self.graph.add_output(value, str(v.name))

    def _declared(self, v: onnx_ir.Value) -> TensorType | None:
        """What the model says of a value, as far as it says dtype and rank."""
        if not isinstance(v.type, onnx_ir.TensorType) or v.shape is None:
            return None
        dtype = element_type(int(v.type.dtype))
        if dtype is None:
            return None
        return TensorType(dtype, tuple(d if isinstance(d, int) and d >= 0 else UNKNOWN for d in v.shape))

    # -- nodes ------------------------------------------------------------------------------------------

    def _node(self, node: onnx_ir.Node, index: int) -> None:
        self.count += 1
        location = _location(node, index)
        try:
            self._import(node, location)
        except CompileError as e:
            raise e.located(location) from None
        except _UNFIT as e:  # no import function checks all that a node can say
            c = self.context
            error = c.refuse(f"its operands and attributes do not fit together ({type(e).__name__}: {e})", code="type")
            raise error.located(location) from e

    def _import(self, node: onnx_ir.Node, location: Location) -> None:
        c = self.context
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not domain and (domain, node.op_type) not in table() and find(MICROSOFT, node.op_type, 1):
            domain = MICROSOFT  # ONNX Runtime has some of its own operators in ONNX's domain
        c.op, c.b.location = f"{domain}.{node.op_type}" if domain else node.op_type, location
        if domain not in self.opsets and domain != MICROSOFT:
            raise CompileError(f"{c.op}: the model imports no opset of {domain or 'ai.onnx'}", code="opset")
        c.opset = self.opsets.get(domain, 1)
        if not domain and (node.op_type in sequences.OPERATORS or any(v in self.lists for v in node.inputs)):
            self._sequence(node)
            return
        operands = [None if v is None else self.value(v) for v in node.inputs]
        while operands and operands[-1] is None:
            operands.pop()
        used = [bool(o.name) and (bool(list(o.uses())) or o.is_graph_output()) for o in node.outputs]
        if not any(used):
            used = [bool(o.name) for o in node.outputs]
        if node.op_type == "Split" and not domain:
            used = [True] * len(used)  # into how many parts, it may say by nothing but their number
        c.outputs = max((i + 1 for i, u in enumerate(used) if u), default=0)
        results = self._results(node, domain, operands, used)
        for o, v in zip(node.outputs, results, strict=False):
            if v is not None:
                v = self._narrowed(v)
                if v.producer is not None and o.name:
                    v.origins |= {str(o.name)}
                self.env[o] = v

    def _narrowed(self, v: Value) -> Value:
        """v with the sizes that are known of its axes; the bounds of the inputs' sizes make that all of it."""
        for axis, size in enumerate(v.shape):
            known = self.facts.value(size)
            if known is not None:
                v = self.context.slice(v, axis, 0, known)
        return v

    def value(self, v: onnx_ir.Value) -> Value:
        """What a value of the model is in the graph. Raises CompileError for a sequence."""
        if v not in self.env:
            raise CompileError(f"{v.name!r} is a sequence, no tensor, here", code="unsupported-op")
        return self.env[v]

    def _sequence(self, node: onnx_ir.Node) -> None:
        """An operator that takes or gives a sequence."""
        c = self.context
        operands = [None if v is None else self.lists[v] if v in self.lists else self.value(v) for v in node.inputs]
        if node.op_type == "Identity":
            self.lists[node.outputs[0]] = list(operands[0] or [])  # type: ignore[arg-type]  # it is a list here
            return
        if node.op_type not in sequences.OPERATORS:
            raise c.refuse("a sequence is no operand of it here", code="unsupported-op")
        attrs = {name: a.value for name, a in node.attributes.items()}
        result = sequences.build(c, node.op_type, operands, attrs)
        if isinstance(result, list):
            self.lists[node.outputs[0]] = result
        else:
            self.env[node.outputs[0]] = result

    def _results(
        self, node: onnx_ir.Node, domain: str, operands: list[Value | None], used: list[bool]
    ) -> Sequence[Value | None]:
        c = self.context
        if node.op_type == "Loop" and not domain and len(operands) > 1 and operands[1] is None:
            operands[1] = c.constant(np.array(True))  # ONNX's evaluator takes an absent condition for a false one
        if node.op_type in _CONTROL and not domain:
            from moec.frontend.onnx.control import inlined

            done = inlined(self, node, operands)
            if done is not None:
                return done
        attrs = dict(node.attributes.items())
        if domain != MICROSOFT:
            self._check_call(domain, node.op_type, operands, attrs, len(node.outputs))
        has_body = any(a.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS) for a in attrs.values())
        if not has_body:
            folded = fold.evaluated(c, onnx_ir.to_proto(node), domain, operands)
            if folded is not None:
                return [None if a is None else c.constant(a, str(node.name or c.op)) for a in folded]
        if not domain and not has_body and c.opset >= 7:
            simple = ranges.simplified(c, node.op_type, operands, {n: a.value for n, a in attrs.items()})
            if simple is not None:
                return [simple]
        first = len(c.b.created)
        try:
            return self._in_our_ops(domain, node.op_type, operands, attrs, used)
        except CompileError as e:
            why = e
        self._undo(first)
        if domain == MICROSOFT:
            raise why
        own = {name: attribute(name, a) for name, a in attrs.items()}
        said = [self._declared(o) for o in node.outputs]
        # sizes that a model declares may be those of one run
        declared = [None if d is None else d.with_shape([UNKNOWN] * d.rank) for d in said]
        if node.op_type in _CONTROL and not domain:
            from moec.frontend.onnx.control import declared as from_bodies

            known = from_bodies(self, node, operands)
            declared = [d if known[i] is None else known[i] for i, d in enumerate(declared)]
        try:
            results = extern(c, domain, node.op_type, operands, own, used, declared, self._captured(node))
        except CompileError as e:
            if node.op_type == "If" and not domain and operands[0] in c.open:
                raise Undecided(c.open[operands[0]], e.located(c.b.location)) from None
            if why.code == "no-import" or e.code == "unknown-op":
                raise
            raise CompileError(f"{why.message}; {e.message}", code=e.code, hint=e.hint) from None
        self.refused.setdefault(c.op, why.message)
        return results

    def _check_call(
        self, domain: str, op_type: str, operands: list[Value | None], attrs: dict[str, Any], outputs: int
    ) -> None:
        """Numbers of operands and outputs, and the attributes that must be there."""
        c = self.context
        schema = schema_at(domain, op_type, c.opset)
        if not schema.min_input <= len(operands) <= schema.max_input:
            want = (
                f"{schema.min_input} to {schema.max_input}"
                if schema.max_input < 2**31 - 1
                else f"at least {schema.min_input}"
            )
            raise c.refuse(f"takes {want} operands in opset {c.opset}, got {len(operands)}", code="arity")
        if outputs > schema.max_output:
            raise c.refuse(f"gives {schema.max_output} outputs in opset {c.opset}, {outputs} are named", code="arity")
        parts = attrs["num_outputs"].value if "num_outputs" in attrs and op_type == "Split" else outputs
        if parts != outputs:  # ONNX's inference would write past the end of its outputs
            raise c.refuse(f"num_outputs is {parts}, {outputs} outputs are named", code="arity")
        for i, v in enumerate(operands):
            formal = schema.inputs[min(i, len(schema.inputs) - 1)]
            if v is None and formal.option == formal.option.__class__.Single:
                raise c.refuse(f"operand {formal.name!r} is missing", code="arity")
        for name, spec in schema.attributes.items():
            if spec.required and name not in attrs:
                raise c.refuse(f"attribute {name!r} is missing", code="attribute")
        for name in attrs:
            if name not in schema.attributes:
                raise c.refuse(f"has no attribute {name!r} in opset {c.opset}", code="attribute")

    def _in_our_ops(
        self, domain: str, op_type: str, operands: list[Value | None], attrs: dict[str, Any], used: list[bool]
    ) -> list[Value | None]:
        c = self.context
        results = self._native(domain, op_type, operands, attrs)
        if len(results) < c.outputs or any(u and r is None for u, r in zip(used, results, strict=False)):
            raise c.refuse("a result that only the operator itself has")
        first = results[0] if results else None
        if not domain and first is not None and first.type.rank <= 1:
            sizes = fold.sizes_of_result(c, op_type, operands, {k: a.value for k, a in attrs.items()})
            if sizes is not None and all(isinstance(s, int) for s in sizes) and first not in c.arrays:
                return [c.constant(np.array(sizes, NUMPY[first.dtype]).reshape([int(s) for s in first.shape]))]
            if sizes is not None:
                c.sizes.setdefault(first, sizes)
            decided = fold.condition(c, op_type, operands, first)
            if decided is not None:
                return [decided]
        return results

    def _undo(self, first: int) -> None:
        """Take back what a refused import has built."""
        c = self.context
        for made in reversed(c.b.created[first:]):
            if made.graph is not None and not any(r.uses for r in made.results):
                self.graph.erase(made)
        del c.b.created[first:]

    def _native(
        self, domain: str, op_type: str, operands: list[Value | None], attrs: dict[str, Any]
    ) -> list[Value | None]:
        c = self.context
        found = find(domain, op_type, c.opset)
        if found is None:
            raise c.refuse("no import in terms of our ops", code="no-import")
        fn, taken = found
        kinds = [v.dtype for v in operands if v is not None]
        strange = [d for d in kinds if d in OPAQUE and op_type != "Identity"]
        strange += [d for d in kinds if d in _UNCOMPUTED and op_type not in _MOVES]
        if strange:
            raise c.refuse(f"our ops do not compute with {strange[0]}")
        values: dict[str, Any] = {}
        if not domain:
            for name, spec in schema_at(domain, op_type, c.opset).attributes.items():
                default = spec.default_value
                values[name] = onnx.helper.get_attribute_value(default) if default.name else None
                if isinstance(values[name], bytes):
                    values[name] = values[name].decode()
                elif isinstance(values[name], list):
                    values[name] = [v.decode() if isinstance(v, bytes) else v for v in values[name]]
        for name, a in attrs.items():
            if name not in taken:
                raise c.refuse(f"attribute {name!r}")
            values[name] = a.value.numpy() if a.type == onnx_ir.AttributeType.TENSOR else a.value
        try:
            call = inspect.signature(fn).bind(c, *operands, **{k: values.get(k) for k in taken})
        except TypeError:
            raise c.refuse(f"{len(operands)} operands", code="type") from None
        result = fn(*call.args, **call.kwargs)
        results = list(result) if isinstance(result, list | tuple) else [result]
        for r in results:
            if r is not None and r.dtype in _UNCOMPUTED and op_type not in _MOVES:
                raise c.refuse(f"our ops do not compute with {r.dtype}")
        return results

    def _captured(self, node: onnx_ir.Node) -> dict[str, Value]:
        """What the bodies of a node read from outside, by name."""
        wanted: dict[str, None] = {}
        for a in node.attributes.values():
            if a.type == onnx_ir.AttributeType.GRAPH:
                wanted |= dict.fromkeys(free_names(onnx_ir.to_proto(a.value)))
        if not wanted:
            return {}
        by_name = {str(v.name): value for v, value in self.env.items()}
        return {name: by_name[name] for name in wanted}

    def _remove_dead(self) -> None:
        from moec.ir.runtime_sizes import needs, runtime_symbols

        sources = {symbol: value.producer for symbol, (value, _) in runtime_symbols(self.graph).items()}
        shown = {sources.get(s) for v in self.graph.outputs for s in v.type.symbols}
        for node in reversed(list(self.graph.nodes)):
            if not any(r.uses or r.is_output for r in node.results) and node not in shown:
                self.graph.erase(node)
            else:
                shown |= {sources.get(s) for s in needs(node)}
        self.graph.prune_weights()


def _may_be(declared: TensorType, actual: TensorType) -> bool:
    return declared.rank == actual.rank and not any(
        isinstance(d, int) and isinstance(a, int) and d != a for d, a in zip(declared.shape, actual.shape, strict=True)
    )


def _location(node: onnx_ir.Node, index: int) -> Location:
    """Module path and line where the exporter wrote them down, else the node's name."""
    meta = node.metadata_props
    module = node.name or f"{node.op_type}_{index}"
    scopes = meta.get("pkg.torch.onnx.name_scopes")
    if scopes:
        parts = [p.strip(" '\"") for p in scopes.strip("[]").split(",")]
        module = next((p for p in reversed(parts[:-1]) if p), module)
    frames = _FRAME.findall(meta.get("pkg.torch.onnx.stack_trace", ""))
    if frames:
        return Location.at(module=module, file=Path(frames[-1][0]).name, line=int(frames[-1][1]))
    return Location.at(module=module)
