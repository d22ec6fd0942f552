"""Mistakes made on purpose, each to be found by random graphs: after how many, and by which law.

make fuzz-mutants
python bench/fuzz_mutants.py --graphs 400 --seed 0 sub_commutes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from judge_fuzz import examine

from moec.backends.onnxruntime import backend as onnxruntime
from moec.ir import DType, graph, lookup, printer
from moec.ir.ops import elementwise
from moec.passes.clean import canonicalise, cleanup
from moec.passes.fuse import fuse_mlp, fuse_norm

Mutant = Callable[[], Any]


def _lowering(op: str, change: Callable[[Any], Any]) -> Mutant:
    """ONNX Runtime lowers `op` as if `change` had been made to its attributes."""
    right = onnxruntime.lowerings[op]

    def wrong(e: Any, node: Any) -> Any:
        attrs = node.attrs
        node.attrs = {**attrs, **change(attrs)}
        try:
            return right(e, node)
        finally:
            node.attrs = attrs

    return lambda: patch.dict(onnxruntime.lowerings, {op: wrong})


def _rounded_folds() -> Any:
    right = cleanup.evaluate_node

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return tuple(t * 1.001 if t.is_floating_point() else t for t in right(*args, **kwargs))

    return patch.object(cleanup, "evaluate_node", wrong)


def _short_floats() -> Any:
    right = printer.print_attr
    return patch.object(printer, "print_attr", lambda v: f"{v:.6g}" if isinstance(v, float) else right(v))


def _first_shape() -> Any:
    return patch.object(elementwise, "broadcast", lambda *shapes: max(map(tuple, shapes), key=len))


def _sub_commutes() -> Any:
    return patch.dict(vars(lookup("math.sub")), commutative=True)  # it is frozen


def _remainder_of_c() -> Any:
    cls = lookup("math.mod").cls
    return patch.object(cls, "reference", lambda self: torch.fmod(self.a, self.b))


def _swapped_swiglu() -> Any:
    return patch.object(fuse_mlp.FuseSwiGLU, "replace", lambda self, b, m: b.swiglu(m.up, m.gate))


def _other_eps() -> Any:
    return patch.object(fuse_norm.RMSNormCore, "replace", lambda self, b, m: b.rms(m.x, eps=1e-6))


def _lost_origins() -> Any:
    right = graph.copy_node

    def wrong(node: Any, into: Any, mapping: Any, before: Any = None) -> Any:
        new = right(node, into, mapping, before)
        for r in new.results:
            r.origins = frozenset()
        return new

    return patch.object(graph, "copy_node", wrong)


def _transposes_compose_backwards() -> Any:
    def wrong(self: Any, b: Any, m: Any) -> Any:
        return b.transpose(m.x, perm=tuple(m.outer[i] for i in m.inner))

    return patch.object(canonicalise.TransposeOfTranspose, "replace", wrong)


def _off_by_one() -> Any:
    right = lookup("math.cast").cls.reference

    def wrong(self: Any) -> Any:
        return right(self) + (1 if self.dtype is DType.I32 and self.x.is_floating_point() else 0)

    return patch.object(lookup("math.cast").cls, "reference", wrong)


MUTANTS: dict[str, Mutant] = {
    "fold_of_constants_rounds": _rounded_folds,
    "printer_loses_digits": _short_floats,
    "broadcast_takes_the_longest_shape": _first_shape,
    "sub_commutes": _sub_commutes,
    "reference_of_mod_has_the_sign_of_a": _remainder_of_c,
    "swiglu_swaps_gate_and_up": _swapped_swiglu,
    "rms_forgets_eps": _other_eps,
    "clone_loses_origins": _lost_origins,
    "transposes_compose_backwards": _transposes_compose_backwards,
    "cast_to_i32_is_off_by_one": _off_by_one,
    "slice_ignores_step": _lowering("tensor.slice", lambda a: {"step": 1}),
    "clamp_ignores_high": _lowering("math.clamp", lambda a: {"high": None} if a["low"] is not None else {}),
    "sort_ignores_descending": _lowering("math.sort", lambda a: {"descending": False}),
    "route_ignores_scale": _lowering("moe.route", lambda a: {"scale": 1.0}),
    "experts_ignore_interleaved": _lowering("moe.experts", lambda a: {"interleaved": False}),
    "gelu_is_always_tanh": _lowering("math.gelu", lambda a: {"approximate": "tanh"}),
}


def found(seed: int, graphs: int) -> tuple[int, str] | None:
    """The number of the first graph that shows it, and how."""
    for number in range(graphs):
        if number % 20 == 0:
            continue  # those go through Triton too, which is slow and no mutant is in
        result = examine(seed, number)
        if result.error:
            return number, f"not made: {result.error.strip().splitlines()[-1][:100]}"
        for judge, outcome in result.outcomes.items():
            if outcome.broken is not None:
                return number, f"{judge}, {outcome.broken.law}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", default=list(MUTANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for name in args.names:
        with MUTANTS[name]():
            seen = found(args.seed, args.graphs)
        missed += seen is None
        shown = f"not found in {args.graphs} graphs" if seen is None else f"graph {seen[0]}: {seen[1]}"
        print(f"{name}: {shown}", flush=True)
    print(f"{len(args.names) - missed} of {len(args.names)} found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
