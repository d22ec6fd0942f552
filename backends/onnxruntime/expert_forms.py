"""Which form grouped experts are lowered to: the cheapest by `expert_cost` of those that compute the same."""

from __future__ import annotations

from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.expert_cost import TOKENS, Layer, best, cost
from moec.backends.onnxruntime.expert_spec import Spec
from moec.backends.onnxruntime.moe_operators import unsuitable
from moec.backends.onnxruntime.options import EXPERTS

_FORMS = EXPERTS[1:]


def choose(e: Emitter, spec: Spec) -> str:
    """One of `options.EXPERTS`, and a line of the report. Raises CompileError where options ask for a form that is not
    possible.

    - "unrolled": the products of each expert on its own initialisers, rows sorted by expert.
    - "if": the same behind an If per expert, so that nothing runs for experts without rows.
    - "moe": com.microsoft.MoE, or QMoE for stored integers.
    - "loop": a Loop over the experts that have rows, their matrices taken out of a stack.
    - "dense": every expert for every token in two products.
    """
    wanted = e.options.experts
    refused = {form: why for form in _FORMS if (why := _refused(e, spec, form)) is not None}
    if wanted != "auto" and wanted in refused:
        raise e.refuse(spec.node, f"experts={wanted!r} is not possible: {refused[wanted]}")
    bits = spec.gate_up.dtype.bits if spec.nbits and not e.options.portable else None
    sizes = spec.num, int(spec.experts.shape[1]), int(spec.x.shape[1]), spec.hidden
    layer = Layer(*sizes, bits=bits, itemsize=8 if spec.dtype.bits == 64 else 4)
    tokens = spec.x.shape[0]
    counts = (max(tokens, 1),) if isinstance(tokens, int) else TOKENS
    layers, others = _graph(e)
    costs = {f: cost(f, layer, counts, layers, others) for f in _FORMS if f not in refused}
    form = best(costs) if wanted == "auto" else wanted
    e.experts.append({
        "module": spec.node.location.module or "",
        "experts": [layer.num, layer.k, layer.width, layer.hidden],
        "form": form,
        "asked": wanted != "auto",
        "costs": {f: c.to_dict() for f, c in costs.items()},
        "refused": refused,
    })  # fmt: skip
    return form


def _graph(e: Emitter) -> tuple[int, int]:
    """(layers of experts, other nodes) of the whole graph, once per call path."""
    if "layers of experts" not in e.memo:
        layers = len(e.graph.find("moe.experts")) + len(e.graph.find("quant.scaled_experts"))
        e.memo["layers of experts"] = layers, _ONNX_NODES * (sum(1 for _ in e.graph.nodes) - layers)
    return e.memo["layers of experts"]


_ONNX_NODES = 2  # of an IR node


def _refused(e: Emitter, spec: Spec, form: str) -> str | None:
    """Why a form is not possible; None where it is."""
    as_stored = spec.nbits and not e.options.portable  # products take integers as they are
    if e.options.compact and form != "if" and not (as_stored and form in ("unrolled", "moe")):
        return "all experts would be in f32 at once, memory='fp8' keeps them in 8 bits"
    if form == "moe":
        return unsuitable(e, spec)
    if as_stored and form != "unrolled" and e.options.experts == "auto":
        return "it takes weights in f32, these are stored integers"
    return None
