"""ATen ops as extern ops, and what they are in ops of our families."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.ir import Builder, CompileError, Graph, TensorType, parse, run
from moec.ir.opdef import lookup
from moec.ir.ops.extern_aten import FORMS, NAMES, call, op_of, overload

Call = tuple[list[Any], dict[str, Any]]


def grid(low: float = -20.0, high: float = 20.0, *more: float) -> torch.Tensor:
    return torch.cat([torch.linspace(low, high, 211), torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, *more])])


def square(*batch: int, n: int = 4) -> torch.Tensor:
    return torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(n))


def definite(*batch: int) -> torch.Tensor:
    a = square(*batch)
    return a @ a.mT + torch.eye(4)


A, B, X = square(2), torch.randn(2, 4, 3), torch.randn(2, 3, 6, 7)
LU, PIVOTS = torch.linalg.lu_factor(A)
PACKED, TAU = torch.geqrf(B)
LOWER = torch.linalg.cholesky(definite(2))
INF = math.inf
UNARY = {name: grid(-20, 20, INF, -INF) for name in FORMS if name.startswith(("special_i", "special_bessel"))} | {
    "lgamma": grid(-20, 20, INF), "digamma": grid(-20, 20), "erfinv": grid(-1, 1), "erfc": grid(-9, 9, INF, -INF),
    "special_ndtri": grid(0, 1, 1e-30), "special_erfcx": grid(-5, 50, INF), "special_log_ndtr": grid(-30, 9),
    "i0": grid(-9, 9), "special_i1": grid(-9, 9), "special_modified_bessel_i0": grid(-9, 9),
    "special_modified_bessel_i1": grid(-9, 9), "special_modified_bessel_k0": grid(-1, 20),
    "special_modified_bessel_k1": grid(-1, 20), "special_scaled_modified_bessel_k0": grid(-1, 20),
    "special_scaled_modified_bessel_k1": grid(-1, 20), "special_spherical_bessel_j0": grid(-20, 20, INF),
}  # fmt: skip
DEGREES = torch.arange(-2.0, 10.0)[:, None]
CASES: dict[str, list[Call]] = {name: [([x], {})] for name, x in UNARY.items()} | {
    f"special_{shift}chebyshev_polynomial_{kind}": [([torch.linspace(-2, 2, 33), DEGREES], {})]
    for shift in ("", "shifted_") for kind in "tuvw"
} | {
    "polygamma": [([grid(-6.97, 20)], {"n": n}) for n in (0, 2, 3)] + [([torch.linspace(0.1, 9, 50)], {"n": 1})],
    "special_zeta": [([torch.tensor([[1.5], [3.0], [4.0], [1.0], [0.5]]), grid(-5.97, 9)], {})],
    "linalg_solve_triangular": [([LOWER, B], {"upper": False}), ([LOWER.mT, B.mT], {"upper": True, "left": False}),
                                ([A, B], {"upper": True, "unitriangular": True})],
    "triangular_solve": [([B, LOWER], {"upper": False, "transpose": t}) for t in (False, True)],
    "linalg_cholesky": [([definite(2)], {"upper": u}) for u in (False, True)],
    "cholesky": [([definite()], {"upper": True})],
    "linalg_cholesky_ex": [([definite(3)], {})],
    "cholesky_solve": [([B, LOWER], {}), ([B, LOWER.mT.contiguous()], {"upper": True})],
    "cholesky_inverse": [([LOWER], {})],
    "linalg_lu_factor": [([A], {}), ([B], {}), ([B.mT.contiguous()], {})],
    "linalg_lu_factor_ex": [([A], {}), ([torch.zeros(3, 3)], {})],
    "linalg_lu": [([A], {}), ([B], {}), ([B.mT.contiguous()], {})],
    "lu_unpack": [([LU, PIVOTS], {})],
    "linalg_lu_solve": [([LU, PIVOTS, B], {"adjoint": t}) for t in (False, True)]
                       + [([LU, PIVOTS, B.mT.contiguous()], {"left": False})],
    "linalg_inv": [([A], {}), ([square(0)], {})], "linalg_inv_ex": [([A], {})],
    "linalg_solve": [([A, B], {}), ([A, B.mT.contiguous()], {"left": False}), ([A[0], B[0, :, 0]], {})],
    "linalg_solve_ex": [([A, B], {})], "linalg_tensorinv": [([square(n=6).reshape(6, 3, 2)], {"ind": 1})],
    "linalg_det": [([A], {}), ([square(0)], {})], "linalg_slogdet": [([A], {})],
    "geqrf": [([B], {}), ([B.mT.contiguous()], {})],
    "linalg_qr": [([B], {"mode": m}) for m in ("reduced", "complete", "r")] + [([B.mT.contiguous()], {})],
    "linalg_householder_product": [([PACKED, TAU], {})],
    "ormqr": [([PACKED, TAU, square(2)], {"left": left, "transpose": t}) for left in (True, False)
              for t in (True, False)],
    "linalg_matrix_exp": [([A], {}), ([A * 20], {}), ([torch.zeros(2, 2)], {})],
    "_cdist_forward": [([B, B + 1], {"p": p, "compute_mode": None}) for p in (0.0, 1.0, 2.0, 3.5, INF)],
    "_pdist_forward": [([B[0]], {"p": p}) for p in (0.0, 1.0, 2.0, INF)] + [([B[0, :1]], {"p": 2.0})],
    "_adaptive_avg_pool2d": [([X], {"output_size": (4, 3)})],
    "_adaptive_avg_pool3d": [([X], {"output_size": (2, 4, 7)})],
    "avg_pool2d": [([X], {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 1), "ceil_mode": True,
                          "count_include_pad": include}) for include in (False, True)]
                  + [([X], {"kernel_size": (2,), "divisor_override": 3})],
    "avg_pool3d": [([X], {"kernel_size": (2,), "padding": (1,)})],
}  # fmt: skip


def test_every_form_has_a_case():
    assert set(CASES) == set(FORMS) <= set(NAMES)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_every_op_is_decided(backend: str):
    """A lowering (which may say no to a node), a form, or a refusal; the family of ONNX's operators does not count."""
    chosen = get_backend(backend)
    for name in NAMES:
        op = op_of(name)
        assert chosen.lowering(op) or chosen.refusal(op) or lookup(op).decompose, name
        assert chosen.lowering(op) is not chosen.lowering("extern.Conv") or chosen.lowering(op) is None, name


def node_of(graph: Graph, name: str, operands: list[Any], attrs: dict[str, Any]) -> Any:
    values = [graph.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(operands)]
    opdef = lookup(op_of(name))
    full = opdef.complete_attrs(attrs | {"types": ()})
    named = opdef.named_operands(operands) | {k: v for k, v in full.items() if k not in ("types", "complex")}
    want = call(overload(name), named)
    node = graph.create(opdef, values, attrs | {"types": tuple(map(TensorType.of, want))})
    return node, want


def decomposed(name: str, operands: list[Any], attrs: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    graph = Graph("form")
    node, want = node_of(graph, name, operands, attrs)
    new = node.opdef.instance(node.operands, node.attrs).decompose(Builder(graph))
    for v in new if isinstance(new, tuple) else (new,):
        graph.add_output(v)
    graph.erase(node)
    graph.verify()
    assert not any(n.op.startswith("extern.") for n in graph.nodes)
    return run(graph, operands), want


@pytest.mark.parametrize("name", CASES)
def test_form_is_what_torch_says(name: str):
    for operands, attrs in CASES[name]:
        got, want = decomposed(name, operands, attrs)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape)
            torch.testing.assert_close(g, w, rtol=3e-5, atol=3e-5, equal_nan=True)


def test_cholesky_says_which_minor_is_not_positive():
    a = torch.stack([torch.diag(torch.tensor([2.0, 1.0, d, 1.0])) for d in (1.0, 0.0, -1.0)])
    got, want = decomposed("linalg_cholesky_ex", [a], {})
    assert got[1].tolist() == want[1].tolist() == [0, 3, 3]


def test_matrices_beyond_the_limit_stay_whole():
    with pytest.raises(CompileError, match="unrolled"):
        decomposed("linalg_inv", [torch.randn(17, 17)], {})


def test_extern_op_keeps_its_text_and_runs_as_torch():
    graph = Graph("whole")
    node, want = node_of(graph, "linalg_svd", [B], {"full_matrices": False})
    for r in node.results:
        graph.add_output(r)
    graph.verify()
    again = parse(str(graph))
    assert again == graph
    for g, w in zip(run(again, [B]), want, strict=True):
        assert torch.equal(g, w)


def test_a_form_that_is_its_operand_is_a_form():
    """Of a matrix of size 0, at the end of the graph: nothing is left to lower."""

    class Empty(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.cholesky(x)

    x = torch.ones(2, 0, 0)
    assert torch.equal(moec.compile(Empty(), (x,), backend="onnxruntime")(x), x)


class Divided(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3), torch.linalg.svdvals(x)


def test_what_onnx_runtime_lacks_runs_in_the_reference_where_allowed():
    """torch's ONNX form of avg_pool2d ignores the divisor: it is decomposed instead; singular values are refused."""
    with pytest.raises(CompileError, match="linalg_svdvals"):
        moec.compile(Divided(), (X,), backend="onnxruntime")
    compiled = moec.compile(Divided(), (X,), backend="onnxruntime", fallback="reference")
    for g, w in zip(compiled(X), Divided()(X), strict=True):
        torch.testing.assert_close(g, w)


def test_complex_results_come_back_complex(tmp_path):
    class Spectrum(torch.nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x), torch.fft.ifft(torch.fft.fft(x)).real

    x = torch.randn(3, 10)
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(Spectrum(), (x,), backend=backend)
        compiled.save(tmp_path / backend)
        for program in (compiled, moec.load(tmp_path / backend)):
            for g, w in zip(program(x), Spectrum()(x), strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
