"""Every op on every backend: a lowering, a decomposition, or a stated refusal; and the right result."""

from __future__ import annotations

import pytest
import torch

from moec.backends import get_backend
from moec.ir import OpDef, all_ops, run
from moec.ir.sampling import Sampler, cases

from .lowering_cases import SIZES, assert_same, coarse, inputs_of, legal, single, tolerance

BACKENDS = ["onnxruntime", "triton"]
# compile options that change what is emitted
VARIANTS = {"onnxruntime": [{}, {"portable": True}], "triton": [{}]}
# interpreted kernels are slow, and backends/triton/test_codegen.py runs every elementwise op in few of them
OPS = [(name, o) for name in BACKENDS for o in all_ops() if name != "triton" or not o.elementwise]


@pytest.mark.parametrize(("name", "opdef"), OPS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_op_agrees_with_reference(name: str, opdef: OpDef):
    """Samples at sizes with 0 and 1, their operands once as inputs and once as constants."""
    backend = get_backend(name)
    for size in SIZES:
        for i, (operands, attrs) in enumerate(cases(opdef, Sampler(*size))):
            for constant in (False, True) if len(operands) > 1 and name != "triton" else (False,):
                graph = single(opdef, operands, attrs, constant)
                reason = legal(graph, backend)
                if reason is not None:
                    assert opdef.name in backend.unsupported, f"{opdef.name}: {reason}"
                    continue
                inputs = inputs_of(graph, operands)
                want = run(graph, inputs)
                for options in VARIANTS[name][: 1 if constant else None]:
                    got = backend.compile(graph, threads=1, options=options).run(inputs)
                    for g, w in zip(got, want, strict=True):
                        try:
                            assert_same(g, w, tolerance(graph) + coarse(graph, backend))
                        except AssertionError as error:
                            error.add_note(f"{opdef.name} sizes {size} sample {i} {constant=} {options} {attrs}")
                            raise


@pytest.mark.parametrize("name", BACKENDS)
def test_every_op_is_decided(name: str):
    backend = get_backend(name)
    undecided = [
        o.name
        for o in all_ops()
        if o.name not in backend.lowerings and o.name not in backend.unsupported and o.decompose is None
    ]
    assert not undecided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_percent_is_noticed(dtype: torch.dtype):
    """The comparison of these tests is not blind."""
    graph = single(next(o for o in all_ops() if o.name == "math.neg"), [torch.ones(3, 5, dtype=dtype)], {})
    x = torch.linspace(1, 2, 15).to(dtype)
    assert_same(x, x.clone(), tolerance(graph))
    if dtype != torch.bfloat16:  # whose rounding is 0.4%
        with pytest.raises(AssertionError):
            assert_same(x * 1.01, x, tolerance(graph))
    with pytest.raises(AssertionError):
        assert_same(torch.where(x > 1.5, torch.nan, x), x, tolerance(graph))
    with pytest.raises(AssertionError):
        assert_same(x, torch.where(x > 1.5, torch.inf, x), tolerance(graph))
