"""What only looks like a fusion's pattern stays (tests/texts), and `explain` says in words why."""

from pathlib import Path

import pytest

from moec.ir import parse
from moec.passes import explain
from moec.passes.registry import find_pass
from moec.passes.spec import parse_passes
from moec.text_cases import read_cases

TEXTS = Path(__file__).parent.parent / "texts"

# file, beginning of the case's title, rule, what the explanation must say
CASES = [
    ("rms_norm", "eps outside of the root", "rms_norm_core", "expected math.rsqrt"),
    ("rms_norm", "Over the tokens", "rms_norm_core", "found    axes=[-2]"),
    ("rms_norm", "The mean of another value", "rms_norm_core", "expected the same value as 'x'"),
    ("rms_norm", "eps per token", "rms_norm_core", "expected a scalar constant"),
    ("rms_norm", "A sum divided by another", "mean_of_sum", "8 elements are added up, the factor is 7.0"),
    ("layer_norm", "The unbiased variance", "mean_of_sum", "8 elements are added up, the factor is 7.0"),
    ("layer_norm", "... with the terms exchanged", "layer_norm_core", "expected math.mean"),
    ("gated_mlp", "A sigmoid gate", "fuse_swiglu", "expected math.silu"),
    ("gated_mlp", "The gate clamped after silu", "fuse_clamped_swiglu", "expected math.silu or math.mul"),
    ("gated_mlp", "... with another constant", "gelu_tanh", "found    the constant 0.0447"),
    ("routers", "The lowest scores", "route_topk_softmax", "largest=False"),
    ("routers", "Softmax over the tokens", "route_topk_softmax", "found    axis=-2"),
    ("routers", "Divided by the sum of other weights", "route_normalize", "found    input %o"),
    (
        "routers",
        "... the maximum of other scores",
        "route_top1_softmax",
        "the math.softmax that is matched already",
    ),
    ("experts_grouped", "gate and up exchanged", "grouped_experts", "expected result 0 of tensor.split"),
    ("experts_grouped", "Offsets that count fewer", "grouped_experts", "do not count 5 experts"),
    ("experts_batched", "down of other experts", "batched_experts", "the tensor.reshape that is matched already"),
    ("experts_dense", "... with biases it is no routing", "scaled_input_experts", "found    math.add"),
    ("experts_unrolled", "One expert has another", "raise_unrolled_experts", "have different activations or layouts"),
    ("shared_experts", "On different rows", "merge_shared_experts", "expected the same value as 'x'"),
    ("shared_experts", "With a bias", "merge_shared_experts", "expected an absent operand"),
]


@pytest.mark.parametrize(("file", "title", "rule", "says"), CASES, ids=lambda v: v[:30])
def test_explain_says_why(file, title, rule, says):
    (case,) = [c for c in read_cases(TEXTS / f"{file}.ir") if c.title.startswith(title)]
    graph = parse(case.graph)
    for p in parse_passes(case.run):
        graph = p.run(graph)
    cls, options = find_pass(rule)
    text = explain(cls(**options), graph)
    assert says in text
    assert ".py:" in text
