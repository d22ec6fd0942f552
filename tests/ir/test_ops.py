"""Every op: its type rule agrees with its reference at every size, and its text comes back."""

import pytest
import torch

from moec.ir import Builder, CompileError, Graph, TensorType, all_ops, parse, run
from moec.ir.arrays import copied
from moec.ir.dims import evaluate
from moec.ir.interpreter import sizes_of
from moec.ir.sampling import Sampler, cases

SIZES = [(0, 1, 5), (1, 2, 3), (5, 3, 7), (3, 1, 2)]
# ops that have no samples: a call needs a function to call (test_graph.py)
WITHOUT_SAMPLES = {"call.graph"}


def concrete(type, sizes):
    return type.with_shape([evaluate(s, sizes) for s in type.shape])


def one_op_graph(opdef, operands, attrs):
    graph = Graph()
    values = [None if t is None else graph.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(operands)]
    node = graph.create(opdef, values, attrs)
    for r in node.results:
        graph.add_output(r)
    return graph


def present(operands):
    return [t for t in operands if t is not None]


@pytest.mark.parametrize("opdef", all_ops(), ids=lambda o: o.name)
def test_inference_agrees_with_reference(opdef):
    seen = 0
    for n, m, k in SIZES:
        for operands, attrs in cases(opdef, Sampler(n, m, k)):
            graph = one_op_graph(opdef, operands, attrs)
            graph.verify()
            outputs = run(graph, present(operands))  # raises where a result lacks the inferred type
            sizes = sizes_of(graph, present(operands))
            assert [TensorType.of(t) for t in outputs] == [concrete(v.type, sizes) for v in graph.outputs]
            assert parse(str(graph)) == graph
            seen += 1
    assert seen >= len(SIZES) or opdef.name in WITHOUT_SAMPLES


@pytest.mark.parametrize("opdef", [o for o in all_ops() if o.decompose], ids=lambda o: o.name)
def test_decomposition_means_the_same(opdef):
    for n, m, k in SIZES:
        for operands, attrs in cases(opdef, Sampler(n, m, k)):
            graph = one_op_graph(opdef, operands, attrs)
            (node,) = graph.nodes
            builder = Builder(graph, before=node)
            try:
                new = opdef.decompose(opdef.instance(node.operands, node.attrs), builder)
            except CompileError:
                assert opdef.name == "quant.scaled_experts"
                assert attrs["group"] is not None
                continue
            want = run(graph, present(operands))
            for slot, value in enumerate(new if isinstance(new, tuple) else (new,)):
                graph.set_output(slot, value)
            graph.verify()
            for a, b in zip(run(graph, present(operands)), want, strict=True):
                tol = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_reference_keeps_inputs_unchanged():
    for opdef in all_ops():
        for operands, attrs in cases(opdef, Sampler(3, 2, 4)):
            before = [copied(t) for t in present(operands)]
            run(one_op_graph(opdef, operands, attrs), present(operands))
            assert all(
                torch.equal(
                    a.view(torch.uint8) if a.dtype.itemsize == 1 else a,
                    b.view(torch.uint8) if b.dtype.itemsize == 1 else b,
                )
                for a, b in zip(present(operands), before, strict=True)
            ), opdef.name


def test_declared_and_inferred_results_must_agree():
    from moec.ir.opdef import _BARE, _OPS, Operand, op

    class Halves:
        """Both halves of the last axis."""

        x: Operand

        def infer(self):
            return self.x, self.x

        def reference(self):
            return self.x, self.x

    Halves.__annotations__ = {"x": Operand}
    op("test.halves")(Halves)
    try:
        graph = Graph()
        x = graph.add_input("x", TensorType("f32", (3,)))
        with pytest.raises(
            CompileError, match=r"declared with 1 results, infer\(\) gives 2\n.*results=2\) at .*test_ops"
        ):
            Builder(graph).op("test.halves", [x])
    finally:
        _BARE.pop("halves"), _OPS.pop("test.halves")


def test_every_op_has_a_docstring():
    assert [o.name for o in all_ops() if not o.doc.strip()] == []


def test_route_breaks_ties_by_lower_index():
    graph = one_op_graph("moe.route", [torch.zeros(3, 8)], {"k": 3})
    weights, experts = run(graph, [torch.zeros(3, 8)])
    assert experts.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3))


def test_route_stays_within_the_best_groups():
    logits = torch.tensor([[9.0, -9, 1, 1, 2, 2, 0, 0]])
    attrs = {"k": 2, "scoring": "sigmoid", "n_group": 4, "topk_group": 1}
    assert run(one_op_graph("moe.route", [logits], attrs), [logits])[1].tolist() == [[4, 5]]
    attrs["group_score"] = "max"
    assert run(one_op_graph("moe.route", [logits], attrs), [logits])[1].tolist() == [[0, 1]]


def test_route_bias_selects_but_does_not_weigh():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0, 5, 0])
    attrs = {"k": 1, "scoring": "sigmoid", "normalize": False}
    weights, experts = run(one_op_graph("moe.route", [logits, bias], attrs), [logits, bias])
    assert experts.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


def test_attention_without_any_key_to_see_gives_zeros():
    q = torch.randn(1, 1, 2, 4)
    mask = torch.tensor([[[[True, True], [False, False]]]])
    (out,) = run(one_op_graph("attention.sdpa", [q, q, q, mask], {"scale": 1.0}), [q, q, q, mask])
    assert out[0, 0, 1].tolist() == [0, 0, 0, 0]
    assert out[0, 0, 0].abs().sum() > 0


def test_attention_agrees_with_torch():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    (out,) = run(one_op_graph("attention.sdpa", [q, k, v], {"scale": 0.2, "causal": True}), [q, k, v])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(out, want)


def test_quantised_codes_match_ml_dtypes_at_every_midpoint():
    import ml_dtypes
    import numpy as np

    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.sort(codes[np.isfinite(codes)])
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, [448.0]]).astype(np.float32)
    x = torch.from_numpy(points)[None]
    graph = one_op_graph("quant.quantize", [x], {"block": (1, 1 << 20)})
    got, scale = run(graph, [x])
    assert scale.item() == 1.0
    want = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(got.view(torch.uint8)[0].numpy(), want)


def test_quantise_all_zero_and_nan_blocks():
    x = torch.zeros(2, 8)
    x[1, 5] = float("nan")
    codes, scale = run(one_op_graph("quant.quantize", [x], {"block": (1, 4)}), [x])
    assert scale[0].tolist() == [1, 1]
    assert scale[1, 0] == 1
    assert scale[1, 1].isnan()
    assert codes.float()[0].tolist() == [0] * 8
    assert codes.float()[1, 4:].isnan().all()


def test_token_scales_do_not_depend_on_the_batch():
    x = torch.randn(7, 256)
    alone = run(one_op_graph("quant.quantize", [x[3:4]], {"block": (1, 128)}), [x[3:4]])
    batch = run(one_op_graph("quant.quantize", [x], {"block": (1, 128)}), [x])
    for a, b in zip(alone, batch, strict=True):
        assert torch.equal(a.view(torch.uint8), b[3:4].view(torch.uint8))


def test_experts_reject_ids_out_of_range():
    x, w, idx = torch.randn(2, 4), torch.ones(2, 1), torch.tensor([[0], [5]])
    gu, dn = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    graph = one_op_graph("moe.experts", [x, w, idx, gu, dn], {})
    with pytest.raises(CompileError, match="expert ids from 0 to 5, there are 2 experts"):
        run(graph, [x, w, idx, gu, dn])
