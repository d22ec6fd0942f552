"""An exported (functional) FX graph → IR graph, node by node."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, SymIntArgument

from moec.frontend.aten import LOWERINGS
from moec.frontend.aten.extern import EXTERN
from moec.frontend.aten.registry import PARAMETERS, op_name
from moec.frontend.complex import COMPLEX_ONLY, Complex, extern, interleaved, involves_complex, lower_complex
from moec.frontend.context import Context
from moec.frontend.dynamic import result_names
from moec.frontend.locate import node_location, strip_prefix
from moec.frontend.ranges import Ranges
from moec.frontend.symbols import Symbols
from moec.ir import CompileError, Dim, DType, Graph, Location, TensorType, Value, Weight
from moec.ir.ops.tensor import INLINE_LIMIT

# statements about the trace, not about values
_DROPPED = {
    "aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::_assert_async.msg", "aten::_assert_async",
    "aten::sym_constrain_range", "aten::sym_constrain_range_for_size", "aten::_functional_assert_async.msg",
    "aten::_functional_assert_scalar",
}  # fmt: skip
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
# ops whose lowerings say how many elements there are, see tensor.nonzero
_COUNTS = {"aten::argwhere", "aten::nonzero", "aten::nonzero_numpy", "aten::where", "aten::masked_select",
           "aten::index.Tensor"}  # fmt: skip
_ITEMS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)


class Lowerer:
    """Builds `graph` from an exported program; `outputs` describes the flattened results, see Signature.outputs.

    `prefix` is the module path of the user's model inside the exported one, `input_names` the names of the tensor
    inputs in order (torch's own where None), `user_dims` the sizes the user
    declared for axes, `ranges` those of torch's symbols that the program holds for.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        *,
        prefix: str = "",
        input_names: list[str] | None = None,
        user_dims: list[dict[int, Dim]] | None = None,
        ranges: Ranges | None = None,
    ):
        self.program = program
        self.prefix = prefix
        self.graph = Graph()
        self.symbols = Symbols(ranges)
        self.context = Context(self.graph, self.symbols)
        self.env: dict[torch.fx.Node, Any] = {}
        self.outputs: list[tuple[str, Any]] = []
        self.constant_inputs: dict[str, Any] = {}
        self._input_names = input_names
        self._user_dims = user_dims or []
        self._tied: dict[Any, str] = {}

    def run(self) -> Graph:
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        self._inputs([(n, s) for n, s in zip(placeholders, specs, strict=True) if s.kind is InputKind.USER_INPUT])
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                self.env[node] = self._weight(spec)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._node(node, self.program.graph_module)
            elif node.op == "output":
                self._results(node)
        self._remove_dead()
        self.graph.verify()
        return self.graph

    # -- inputs and weights -------------------------------------------------------------------------

    def _inputs(self, items: list[tuple[torch.fx.Node, InputSpec]]) -> None:
        tensors = []
        for node, spec in items:
            if isinstance(spec.arg, ConstantArgument):
                self.constant_inputs[spec.arg.name] = spec.arg.value
                self.env[node] = spec.arg.value
            elif isinstance(spec.arg, SymIntArgument):
                raise CompileError(
                    f"input {spec.arg.name!r} is a dynamic integer", code="arguments", hint="pass it as a tensor"
                )
            else:
                tensors.append(node)
        names = self._input_names or [n.name for n in tensors]
        dims = self._user_dims or [{} for _ in tensors]
        shapes = [n.meta["val"].shape for n in tensors]
        for shape, named in zip(shapes, dims, strict=True):
            self.symbols.declare(shape, named)
        for shape in shapes:
            self.symbols.declare_rest(shape)
        for node, name in zip(tensors, names, strict=True):
            try:
                self.env[node] = self.graph.add_input(name, self.symbols.type(node.meta["val"]))
            except CompileError as e:
                raise CompileError(f"argument {name!r}: {e.message}", code=e.code, hint=e.hint) from None

    def _weight(self, spec: InputSpec) -> Any:
        target = spec.target or ""
        name = strip_prefix(target, self.prefix)
        if spec.kind is InputKind.TOKEN:
            return None  # the order of effects, see with_effects
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CompileError(
                f"the model holds {name!r}, which is not a tensor ({spec.kind.name.lower()})",
                code="unsupported-model",
                hint="modules with packed (quantised) parameters cannot be traced; load the float model",
            )
        held = self.program.state_dict if target in self.program.state_dict else self.program.constants
        tensor = held[target]
        if not isinstance(tensor, torch.Tensor):
            raise CompileError(f"the model holds {name!r}, a {type(tensor).__name__}", code="unsupported-model")
        if spec.kind is InputKind.CONSTANT_TENSOR and tensor.numel() <= INLINE_LIMIT and not tensor.is_meta:
            return self._inline(name, tensor)
        key = _identity(tensor)
        name = self._tied.setdefault(key, name)
        try:
            data = Weight(name, TensorType.of(tensor)) if tensor.is_meta else Weight.of(name, tensor.detach())
        except CompileError as e:
            raise CompileError(f"weight {name!r}: {e.message}", code=e.code, hint=e.hint) from None
        return self.graph.add_weight(data)

    def _inline(self, name: str, tensor: torch.Tensor) -> Any:
        if tensor.dtype.is_complex:
            return Complex(self._inline(name, tensor.real), self._inline(name, tensor.imag))
        return self.context.b.const(
            tensor.detach().cpu().reshape(-1).tolist(), DType.of(tensor.dtype), tuple(tensor.shape)
        )

    # -- nodes --------------------------------------------------------------------------------------

    def _node(self, node: torch.fx.Node, module: torch.nn.Module) -> None:
        location = node_location(node.meta, self.prefix)
        try:
            self._lower(node, module, location)
        except CompileError as e:
            raise e.located(location) from None

    def _lower(self, node: torch.fx.Node, module: torch.nn.Module, location: Location) -> None:
        target: Any = node.target
        value = node.meta.get("val")
        if target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]  # fx types arguments loosely
            return
        if isinstance(value, torch.SymFloat) and target in _ITEMS:
            x = self._resolve(node.args[0])
            self.env[node] = self.context.reshape(x, ())  # a number out of a tensor
            return
        if isinstance(value, _NUMBERS):
            return  # read from the metadata where used
        name = getattr(target, "_name", "") if not hasattr(target, "_schema") else op_name(target)
        if name in _DROPPED:
            return
        if name in _INLINED:
            self.env[node] = self._inline_call(node, module)
            return
        if name == "with_effects":
            raise CompileError(f"{node.args[1]} has an effect beside its result", code="unsupported-op", hint=_OP_HINT)
        if not isinstance(target, torch._ops.OpOverload):
            raise CompileError(f"no lowering for {name or target}", code="unsupported-op", hint=_OP_HINT)
        try:
            arguments = self._arguments(node, target)
        except CompileError as e:
            raise CompileError(f"{name}: {e.message}", code=e.code, hint=e.hint) from None
        c = self.context
        c.op, c.b.location, c.node = name, location, node
        if name in _COUNTS and value is not None:
            for t in value if isinstance(value, list | tuple) else [value]:
                self.symbols.introduce(t.shape)
        try:
            c.out = self._types(value)
        except CompileError as e:
            raise CompileError(f"{name}: {e.message}", code=e.code, hint=e.hint) from None
        fn = LOWERINGS.get(name)
        if involves_complex(c, name, arguments):
            result = lower_complex(c, name, arguments)
        elif fn is not None:
            result = fn(c, **{p: arguments[p] for p in PARAMETERS[name] if p in arguments})
        elif name in EXTERN:
            result = extern(c, name, arguments)
        else:
            raise unsupported(name)
        self.env[node] = self._checked(node, name, result)

    def _inline_call(self, node: torch.fx.Node, module: torch.nn.Module) -> list[Any]:
        """A region under no_grad (or autocast that is off) is an ordinary part of the program."""
        skipped = next(i for i, a in enumerate(node.args) if isinstance(a, torch.fx.Node) and a.op == "get_attr")
        attribute: Any = node.args[skipped]
        inner = getattr(module, attribute.target)
        if str(node.target) == "wrap_with_autocast" and node.args[2]:
            raise CompileError("autocast is not supported", code="unsupported-op", hint="convert the model's dtype")
        values = [self._resolve(a) for a in node.args[skipped + 1 :]]
        for parameter, v in zip((n for n in inner.graph.nodes if n.op == "placeholder"), values, strict=True):
            self.env[parameter] = v
        for n in inner.graph.nodes:
            if n.op == "call_function":
                self._node(n, inner)
            elif n.op == "output":
                return [self._resolve(a) for a in n.args[0]]
        return []

    def _arguments(self, node: torch.fx.Node, target: Any) -> dict[str, Any]:
        schema = target._schema.arguments
        result: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        for a, v in zip(schema, node.args, strict=False):
            result[a.name] = self._resolve(v)
        for k, v in node.kwargs.items():
            result[k] = self._resolve(v)
        return result

    def _resolve(self, arg: Any) -> Any:
        """FX argument → Value, Complex, int | Dim, or the constant itself."""
        if isinstance(arg, torch.fx.Node):
            if arg in self.env:
                return self.env[arg]
            value = arg.meta.get("val")
            if isinstance(value, torch.SymInt):
                return self.symbols.size(value)
            if isinstance(value, torch.SymFloat | torch.SymBool):
                raise CompileError(
                    f"a number computed from input sizes ({value}) is used as a value",
                    code="unsupported-op",
                    hint="compute it with tensor ops, or make the sizes it comes from static",
                )
            return value
        if isinstance(arg, list | tuple):
            return [self._resolve(a) for a in arg]
        return arg

    def _types(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.symbols.type(value)
        if isinstance(value, list | tuple):
            return [self._types(v) for v in value]
        return None

    def _checked(self, node: torch.fx.Node, name: str, result: Any) -> Any:
        """Our types must be torch's; the results carry the node's name as origin."""
        results = result if isinstance(result, list) else [result]
        expected = self._types(node.meta["val"])
        expected = expected if isinstance(expected, list) else [expected]
        single = len(expected) == 1
        for i, (r, want) in enumerate(zip(results, expected, strict=True)):
            if isinstance(r, Value) and want is not None:
                if r.type != want:
                    raise CompileError(
                        f"{name} became {r.type}, torch says {want}", code="lowering", hint="please report this model"
                    )
                if r.producer is not None:
                    r.producer.location = r.producer.location or self.context.b.location
                    r.origins |= {node.name if single else f"{node.name}.{i}"}
        return result

    # -- results ------------------------------------------------------------------------------------

    def _results(self, node: torch.fx.Node) -> None:
        flat = list(node.args[0])  # type: ignore[arg-type]  # fx types arguments loosely
        specs = self.program.graph_signature.output_specs
        names = result_names(self.program.call_spec.out_spec)
        for arg, spec in zip(flat, specs, strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                inputs, name = list(self.program.graph_signature.user_inputs), spec.target or ""
                if spec.kind is OutputKind.BUFFER_MUTATION:
                    what = f"buffer {strip_prefix(name, self.prefix)!r}"
                else:
                    what = f"argument {(self._input_names[inputs.index(name)] if self._input_names else name)!r}"
                raise CompileError(
                    f"the model changes its {what} in forward",
                    code="mutation",
                    location=node_location(arg.meta, self.prefix) if isinstance(arg, torch.fx.Node) else None,
                    hint="return the new value instead and pass it in again, as a KV cache does",
                )
            if spec.kind is not OutputKind.USER_OUTPUT:
                continue
            name = names[len(self.outputs)]
            result = self._resolve(arg)
            if isinstance(result, Complex):
                self.outputs.append(("complex", len(self.graph.outputs)))
                self.graph.add_output(interleaved(self.context, result), name)
            elif isinstance(result, Value):
                kind = "tensor" if isinstance(arg.meta.get("val"), torch.Tensor) else "number"
                self.outputs.append((kind, len(self.graph.outputs)))
                self.graph.add_output(result, name)
            elif isinstance(arg, torch.fx.Node) and isinstance(arg.meta.get("val"), torch.SymInt):
                self.outputs.append(("size", len(self.graph.outputs)))
                self.graph.add_output(self.context.b.dim(value=result), name)
            else:
                self.outputs.append(("constant", result))

    def _remove_dead(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if not any(r.uses or r.is_output for r in node.results):
                self.graph.erase(node)
        self.graph.prune_weights()


_OP_HINT = "write the layer with supported ops, or register a lowering with moec.frontend.lowers"


def unsupported(name: str) -> CompileError:
    near = difflib.get_close_matches(name, LOWERINGS, 2, cutoff=0.8)
    also = f" (supported is {', '.join(near)})" if near else ""
    return CompileError(f"no lowering for the op {name}{also}", code="unsupported-op", hint=_OP_HINT)


def _ops(program: torch.export.ExportedProgram) -> Iterator[Any]:
    """Every op that is lowered: those that give tensors (sizes are read from the metadata)."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            called = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
            if called and not isinstance(node.meta.get("val"), _NUMBERS):
                yield node.target


def missing_ops(program: torch.export.ExportedProgram) -> list[Any]:
    """Ops of the program that have no lowering of their own."""
    names = {op: op_name(op) for op in _ops(program)}
    return [op for op, name in names.items() if not has_lowering(name)]


def has_lowering(name: str) -> bool:
    return name in LOWERINGS or name in EXTERN or name in _DROPPED or name in COMPLEX_ONLY


def mutates(program: torch.export.ExportedProgram) -> bool:
    """Whether any op writes into its arguments, so that the program must be made functional first."""
    return any(op._schema.is_mutable and op_name(op) not in LOWERINGS for op in _ops(program))


def _identity(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
