"""What a comparison compares: a backend's program here or in a process of its own, the model itself, saved outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from moec.backends import BACKENDS
from moec.backends.reference.backend import ReferenceBackend
from moec.comparing import execute, transport
from moec.comparing.fitting import Fit
from moec.comparing.nodes import NodeResult
from moec.comparing.routing import Pinned, RoutingFlip
from moec.comparing.store import Store, Values, ordered
from moec.compiled import CompiledModel
from moec.difference import Difference
from moec.frontend.torch_export import evaluating
from moec.ir import ArgumentValueError, Graph, Node, Value
from moec.program import Settings, finish, legalise, lower
from moec.tolerance import Tolerance

Step = Callable[[str], None]
ONNX = ".onnx"  # how the name of a model from a file ends


class Contender(ABC):
    """One side of a comparison. `settings`: of its backend, None where there is none; `legal`: the graph whose values
    it can show, None where it only has outputs. `source`: the name of the model that it is of."""

    name: str
    source: str = ""
    folder: str = ""  # its name as that of a folder
    settings: Settings | None = None
    graph: Graph | None = None  # what `legal` was made of
    legal: Graph | None = None
    fallbacks: int = 0
    peak_bytes: int = 0

    @abstractmethod
    def run(self, inputs: Sequence[torch.Tensor], taps: Sequence[Value], folder: Path) -> Store:
        """The outputs (`output0`, …) and values of `legal` (see `Values`) in a store in `folder`."""

    def is_foreign(self, other: Contender) -> bool:
        """Whether the other's graph is of another source (one is an ONNX export of the model): values inside that have
        one name need not be one value."""
        if self.legal is None or other.legal is None:
            return False
        sides = [
            (c.source.endswith(ONNX), [v.name for v in c.legal.inputs], c.legal.output_names)
            for c in (self, other)
            if c.legal is not None
        ]
        return sides[0] != sides[1]

    @property
    def outputs(self) -> list[Value]:
        """The values of `legal` that are the model's outputs, in the model's order."""
        return [] if self.legal is None else self.legal.outputs

    def nodes(
        self, values: Values, nodes: Sequence[Node], tolerance: Tolerance, step: Step, moves: bool = False
    ) -> list[NodeResult]:
        """Nodes by themselves on this backend, fed with the reference's `values`. moves: see `isolate`."""
        assert self.settings is not None
        return execute.run_nodes(values, nodes, self.settings, tolerance, step, moves)

    @cached_property
    def untuned(self) -> Contender | None:
        """The same without the backend's tuning passes; None where they change nothing."""
        if self.settings is None or self.graph is None or not self.settings.tuning_passes:
            return None
        plain = self._without_tuning(replace(self.settings, tuning=0))
        if str(plain.legal) == str(self.legal):
            return None
        plain.name, plain.folder = f"{self.name} untuned", f"{self.folder}/untuned"
        return plain

    def _without_tuning(self, settings: Settings) -> Contender:
        raise NotImplementedError

    def tuned(self, count: int | None) -> Graph:
        """`legal` after so many of the backend's tuning passes, None: all."""
        assert self.settings is not None
        assert self.graph is not None
        assert self.legal is not None
        return self.legal if count is None else legalise(self.graph, replace(self.settings, tuning=count))[0]

    def interpret(
        self, count: int | None, plain: Values, theirs: Store, folder: Path, tolerance: Tolerance
    ) -> tuple[Values, list[NodeResult]]:
        """The graph of `tuned(count)` in the reference, its values and what became of those of `plain`: see
        `execute.run_tuned`. theirs: where a run of this contender left its inputs."""
        assert self.legal is not None
        own = Values(self.legal, theirs)
        values = Values(self.tuned(count), Store(folder / "values"), self.name, count)
        inputs = [own.get(v) for v in self.legal.inputs]
        return values, self._results(execute.run_tuned(values.graph, inputs, plain, values, tolerance))

    def _results(self, found: Iterable[tuple[Node, Difference]]) -> list[NodeResult]:
        return [NodeResult(self.name, node.op, node.location.describe(), node, d) for node, d in found]


class Fresh(Contender):
    """A graph on a backend, legalised here; lowered and run here, or in a process of its own where it is `packed`."""

    def __init__(
        self, graph: Graph, source: str, settings: Settings, packed: Path | None = None, inputs: Path | None = None
    ):
        self.name, self.source, self.settings, self.graph = settings.backend.name, source, settings, graph
        self.legal, _, self._left = legalise(graph, settings)
        self.fallbacks = len(self._left)
        self._packed, self._inputs = packed, inputs

    @property
    def interprets(self) -> bool:
        """Whether it is the reference interpreter, which can go on with another's routing."""
        assert self.settings is not None
        return type(self.settings.backend) is ReferenceBackend

    def run(self, inputs: Sequence[torch.Tensor], taps: Sequence[Value], folder: Path) -> Store:
        assert self.legal is not None
        assert self.settings is not None
        store = Store(folder / "values")
        values = Values(self.legal, store)
        if self._packed is None:
            if self.interprets:
                execute.run_reference(self.legal, inputs, values)
            else:
                execute.run_program(lower(self.legal, self.settings, self._left), inputs, taps, values)
            return store
        kind = "reference" if self.interprets else "program"
        self._call(kind, folder, {"taps": [values.index[v] for v in taps]})
        return Store(folder / "values")

    def run_pinned(
        self,
        inputs: Sequence[torch.Tensor],
        folder: Path,
        name: str,
        chosen: Mapping[Value, str],
        logits: Mapping[Value, str],
        theirs: Store,
        tolerance: Callable[[Node], float],
    ) -> tuple[Store, list[RoutingFlip]]:
        """The reference with the routing of another backend wherever that differs by near ties only. chosen, logits:
        names of the other's tensors in the store `theirs` by values of `legal`. Returns the store and the
        flips."""
        assert self.legal is not None
        if self._packed is None:
            values = Values(self.legal, Store(folder / "values"))
            given = [{v: theirs.get(n) for v, n in named.items()} for named in (chosen, logits)]
            pinned = Pinned(name, given[0], given[1], lambda node, _: tolerance(node))
            execute.run_reference(self.legal, inputs, values, pinned)
            return values.store, pinned.flips
        index = {v: i for i, v in enumerate(ordered(self.legal))}
        job = {
            "other": str(theirs.folder),
            "name": name,
            "chosen": {index[v]: n for v, n in chosen.items()},
            "logits": {index[v]: n for v, n in logits.items()},
            "tolerances": {index[v]: tolerance(v.producer) for v in chosen if v.producer is not None},
        }
        rows = self._call("reference", folder, job)["flips"]
        pairs = ("reference", "other")
        flips = [RoutingFlip(**{**row, **{side: tuple(row[side]) for side in pairs}}) for row in rows]
        return Store(folder / "values"), flips

    def nodes(
        self, values: Values, nodes: Sequence[Node], tolerance: Tolerance, step: Step, moves: bool = False
    ) -> list[NodeResult]:
        assert self.settings is not None
        if self._packed is None or values.legal_for not in BACKENDS:
            return super().nodes(values, nodes, tolerance, step, moves)
        step(f"{self.name}, {len(nodes)} nodes")
        every = list(values.graph.nodes)
        place = {n: i for i, n in enumerate(every)}
        folder = values.store.folder.parent / f"nodes-{self.folder}"
        job = {
            "values": _held(values),
            "nodes": [place[n] for n in nodes],
            "tolerance": tolerance,
            "moves": moves,
        }
        rows = self._call("nodes", folder, job)["rows"]
        found = []
        for row in rows:
            node, d = every[row["node"]], Difference(**row["difference"])
            found.append(NodeResult(self.name, node.op, node.location.describe(), node, d, row["problem"]))
        return found

    def _without_tuning(self, settings: Settings) -> Fresh:
        assert self.graph is not None
        return Fresh(self.graph, self.source, settings, self._packed, self._inputs)

    def interpret(
        self, count: int | None, plain: Values, theirs: Store, folder: Path, tolerance: Tolerance
    ) -> tuple[Values, list[NodeResult]]:
        if self._packed is None or plain.legal_for not in BACKENDS:
            return super().interpret(count, plain, theirs, folder, tolerance)
        assert self.settings is not None
        every = list(plain.graph.nodes)
        settings = replace(self.settings, tuning=count)
        rows = self._call("tuned", folder, {"plain": _held(plain), "tolerance": tolerance}, settings)["rows"]
        values = Values(self.tuned(count), Store(folder / "values"), settings.backend.name, count)
        return values, self._results((every[row["node"]], Difference(**row["difference"])) for row in rows)

    def _call(
        self, kind: str, folder: Path, job: Mapping[str, Any], settings: Settings | None = None
    ) -> dict[str, Any]:
        assert self._packed is not None
        assert self.settings is not None
        common = {
            "settings": transport.describe(settings or self.settings),
            "inputs": str(self._inputs),
            "store": str(folder / "values"),
        }
        result = transport.call(kind, self._packed, {**common, **job}, folder)
        self.peak_bytes = max(self.peak_bytes, result["peak_bytes"])
        return result


class Compiled(Contender):
    """A model that is compiled or loaded already; it runs here."""

    def __init__(self, name: str, compiled: CompiledModel, fit: Fit):
        self.name, self.source = name, compiled.name
        self.settings = replace(compiled.settings, cache=None)  # for what a comparison makes beside the model
        self.program = program = compiled.program
        self.graph, self.legal = program.graph, program.legal
        self.fallbacks = len(program.fallbacks)
        self._fit = fit

    def _without_tuning(self, settings: Settings) -> Compiled:
        program = finish(self.program.graph, settings)
        return Compiled(self.name, CompiledModel(self.source, settings, program, None), self._fit)

    @property
    def outputs(self) -> list[Value]:
        return [self.program.legal.outputs[i] for i in self._fit.outputs]

    def run(self, inputs: Sequence[torch.Tensor], taps: Sequence[Value], folder: Path) -> Store:
        store = Store(folder / "values")
        own = [inputs[i] for i in self._fit.inputs]
        execute.run_program(
            self.program.executable, own, taps, Values(self.program.legal, store), order=self._fit.outputs
        )
        return store


def _held(values: Values) -> dict[str, Any]:
    """Where values are, for another process."""
    return {"store": str(values.store.folder), "for": values.legal_for, "tuning": values.tuning}


class Eager(Contender):
    """The model itself, in PyTorch."""

    def __init__(self, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any]):
        self.name = "eager"
        self._call, self._leaves = (model, args, kwargs), leaves

    def run(self, inputs: Sequence[torch.Tensor], taps: Sequence[Value], folder: Path) -> Store:
        model, args, kwargs = self._call
        with evaluating(model), torch.no_grad():
            flat = pytree.tree_leaves(model(*args, **kwargs))
        store = Store(folder / "values")
        for (kind, i), value in zip(self._leaves, flat, strict=True):
            if kind == "complex":
                store.put(f"output{i}", torch.view_as_real(value.resolve_conj()))
            elif kind != "constant":
                store.put(f"output{i}", value if kind == "tensor" else torch.tensor(value))
        return store


class Saved(Contender):
    """Outputs from a `.safetensors` or `.npz` file, by the names of the graph's outputs (a file of one tensor is the
    only output whatever its name)."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.name = short_name(path)
        found = read_tensors(path)
        self.renamed = next(iter(found)) if len(found) == len(names) == 1 and found.keys() != set(names) else ""
        self._tensors = list(found.values()) if self.renamed else in_order(found, path, names)

    def run(self, inputs: Sequence[torch.Tensor], taps: Sequence[Value], folder: Path) -> Store:
        store = Store(folder / "values")
        for i, tensor in enumerate(self._tensors):
            store.put(f"output{i}", tensor)
        return store


def short_name(path: Path) -> str:
    """A file and the folder it is in: files of outputs often share their own name."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.npz` file (nothing in it is unpickled). Raises ArgumentValueError."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        return load_file(path)
    except (OSError, SafetensorError, ValueError, TypeError, EOFError) as e:
        raise ArgumentValueError(f"cannot read tensors from {path}: {e}", code="arguments") from None


def in_order(found: Mapping[str, torch.Tensor], path: Path, names: Sequence[str]) -> list[torch.Tensor]:
    """The tensors of a file in the order of `names`. Raises ArgumentValueError that lists what is missing."""
    missing = [n for n in names if n not in found]
    if missing:
        raise ArgumentValueError(
            f"{path} has no outputs {', '.join(missing)}; it holds {', '.join(sorted(found)) or 'nothing'}",
            code="arguments",
        )
    return [found[n] for n in names]
