"""Models whose layers pass a state on: traced once, right at every length; and what stands in while they are traced."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch

import moec
from moec.frontend import recurrences, stand_ins, trace
from moec.ir import Builder, CompileError, run

from .. import model_matrix

# Mamba, Mamba-2, gated delta rule, lightning attention, short convolutions; then others of these kinds
FAMILIES = ["jamba", "mamba2", "qwen3_next", "minimax", "lfm2_moe"]
FAMILIES += [
    pytest.param(family, marks=pytest.mark.large)
    for family in ("mamba", "granitemoehybrid_mamba", "nemotron_h_mamba", "bamba", "qwen3_5_moe")
]
SHAPES = [(1, 1), (1, 13), (3, 67), (2, 131)]  # none of them traced


def build(family, dtype="f32"):
    """The model with weights of about unit gain, so that every layer matters."""
    known = model_matrix.FAMILIES[family]
    experts = "grouped_mm" if known.experts else None
    model = model_matrix.build(model_matrix.Entry(family, known.attention[0], experts, dtype=dtype))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def ids(*shape):
    return torch.randint(3, 29, shape)


DYNAMIC = {"input_ids": {0: "B", 1: "S"}}


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, use_cache=False, **kwargs).logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    model = build(request.param)
    kwargs = {"input_ids": ids(2, 12), "use_cache": False}
    return request.param, model, trace(model, (), kwargs, dynamic_shapes=DYNAMIC)


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


def test_agrees_with_eager_at_every_length(family, well_formed):
    name, model, traced = family
    well_formed(traced)
    compiled = moec.compile(traced.graph, backend="onnxruntime", threads=1)
    for shape in SHAPES:
        x = ids(*shape)
        want = logits(model, x)
        (plain,) = run(traced.graph, [x])
        (fast,) = compiled(x)
        assert error(plain, want) < 1e-4, (name, shape)
        assert error(fast, want) < 1e-4, (name, shape)


def test_every_layer_with_a_state_matters(family):
    """The comparison above is not blind: 1% on an operand of these layers is more than it allows."""
    _, _, traced = family
    x = ids(2, 9)
    (want,) = run(traced.graph, [x])
    for op, at in (("attention.linear_attention", 0), ("attention.linear_attention", 2), ("linear.conv", 0)):
        for i in range(len(traced.graph.find(op))):
            changed = traced.graph.clone()
            node = changed.find(op)[i]
            b, given = Builder(changed, before=node), node.operands[at]
            # a norm may follow, to which the scale is nothing: change negative numbers otherwise than positive ones
            changed.replace_operand(node, at, b.add(given, b.mul(b.abs(given), 0.01)))
            assert error(run(changed, [x])[0], want) > 1e-4, (op, at)


def test_padding_in_front():
    """A mask of padding says what it says to the model, of a single token too."""
    model = build("qwen3_next")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    shapes = DYNAMIC | {"attention_mask": {0: "B", 1: "S"}}
    traced = trace(model, (), {"input_ids": ids(2, 12), "attention_mask": mask, "use_cache": False},
                   dynamic_shapes=shapes)  # fmt: skip
    for batch, length, padded in ((1, 1, 1), (2, 7, 3), (2, 70, 65)):
        x, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.int64)
        mask[0, :padded] = 0
        (got,) = run(traced.graph, [x, mask])
        want = logits(model, x, attention_mask=mask)
        assert error(got[mask.bool() | (length == 1)], want[mask.bool() | (length == 1)]) < 1e-4


def test_bfloat16():
    model = build("jamba", "bf16")
    traced = trace(model, (), {"input_ids": ids(2, 12), "use_cache": False}, dynamic_shapes=DYNAMIC)
    for shape in ((1, 1), (2, 40)):
        x = ids(*shape)
        assert error(run(traced.graph, [x])[0].float(), logits(model, x).float()) < 5e-2


# -- states that are given and returned -----------------------------------------------------------------

NEXT = "transformers.models.qwen3_next.modeling_qwen3_next"
MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
JAMBA = "transformers.models.jamba.modeling_jamba"


class Layer(torch.nn.Module):
    """Calls a function of a module of transformers, in which it says it is defined."""

    def __init__(self, module, call):
        super().__init__()
        self.functions, self.call = importlib.import_module(module), call
        self.__class__ = type("Layer", (Layer,), {"__module__": module})

    def forward(self, *tensors):
        return self.call(self.functions, *tensors)


def delta(m, q, k, v, g, beta, state):
    return m.torch_chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def recurrent_delta(m, q, k, v, g, beta, state):
    return m.torch_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)


def delta_inputs(batch, length):
    q, k = torch.randn(batch, length, 2, 8), torch.randn(batch, length, 2, 8) / 8**0.5
    gate, beta = -torch.rand(batch, length, 4), torch.rand(batch, length, 4)
    return q, k, torch.randn(batch, length, 4, 6), gate, beta, torch.randn(batch, 4, 8, 6)


def mamba2(m, x, dt, A, B, C, D, bias, state):
    return m.mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=16, D=D, dt_bias=bias, dt_softplus=True, initial_states=state,
        return_final_states=True, dt_limit=(0.01, 0.9),
    )  # fmt: skip


def mamba2_inputs(batch, length):
    x, dt = torch.randn(batch, length, 4, 5), torch.randn(batch, length, 4)
    B, C = torch.randn(batch, length, 2, 8), torch.randn(batch, length, 2, 8)
    return x, dt, -torch.rand(4), B, C, torch.randn(4), torch.randn(4), torch.randn(batch, 4, 5, 8)


def mamba(m, u, dt, A, B, C, D, z, bias):
    return m.mamba_selective_scan(u, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True,
                                  return_last_state=True)  # fmt: skip


def mamba_inputs(batch, length):
    u, dt, z = (torch.randn(batch, 6, length) for _ in range(3))
    B, C = torch.randn(batch, 4, length), torch.randn(batch, 4, length)
    return u, dt, -torch.rand(6, 4), B, C, torch.randn(6), z, torch.randn(6)


LAYERS = {
    "chunk_gated_delta_rule": (NEXT, delta, delta_inputs),
    "fused_recurrent_gated_delta_rule": (NEXT, recurrent_delta, delta_inputs),
    "mamba_chunk_scan_combined": (MAMBA2, mamba2, mamba2_inputs),
    "selective_scan_fn": (JAMBA, mamba, mamba_inputs),
}


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_taken_and_returned(name):
    module, call, inputs = LAYERS[name]
    layer, example = Layer(module, call), inputs(2, 20)
    longer = inputs(2, 21)
    dynamic = tuple(
        {0: "B"} | {i: "S" for i in (1, 2) if a.dim() > i and a.shape[i] != b.shape[i]} if a.shape[0] == 2 else {}
        for a, b in zip(example, longer, strict=True)
    )
    traced = trace(layer, example, dynamic_shapes={"tensors": dynamic})
    assert [n.op for n in traced.graph.nodes].count("attention.linear_attention") == 1
    compiled = moec.compile(traced.graph, backend="onnxruntime", threads=1)
    for batch, length in ((1, 1), (3, 7), (2, 64), (1, 131)):
        tensors = inputs(batch, length)
        want = layer(*tensors)
        for got in (run(traced.graph, list(tensors)), compiled(*tensors)):
            for g, w in zip(got, want, strict=True):
                assert (g.shape, g.dtype) == (w.shape, w.dtype)
                assert error(g, w) < 1e-5, (name, batch, length)


# -- what stands in is not trusted, and leaves nothing behind ------------------------------------------


def off_by_one_percent(*args, **kwargs):
    out, state = recurrences.gated_delta_rule(*args, **kwargs)
    return out * 1.01, state


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_wrong_stand_in_is_refused(monkeypatch, dynamic):
    monkeypatch.setitem(recurrences.CONTRACTS, "chunk_gated_delta_rule", off_by_one_percent)
    layer, example = Layer(NEXT, delta), delta_inputs(2, 9)
    shapes = {"tensors": tuple({0: "B"} for _ in example)} if dynamic else None
    with pytest.raises(CompileError, match=r"does not hold for .*an op of ours stood in for chunk_gated_delta"):
        trace(layer, example, dynamic_shapes=shapes)


def selective_scan_fn(u, delta, A, B, C):
    """Called as the kernel, and something else."""
    return u * delta


class Misnamed(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return selective_scan_fn(u, delta, A, B, C)


def test_a_function_of_the_same_name_is_refused():
    with pytest.raises(CompileError, match="an op of ours stood in for selective_scan_fn"):
        trace(Misnamed(), mamba_inputs(2, 5)[:5])


def held():
    names = {NEXT: "torch_chunk_gated_delta_rule", MAMBA2: "mamba2_chunk_scan", JAMBA: "mamba_selective_scan"}
    return [getattr(importlib.import_module(m), n) for m, n in names.items()]


class Failing(Layer):
    def forward(self, *tensors):
        super().forward(*tensors)
        raise RuntimeError("in the middle")


def test_everything_is_as_it_was(family):
    _, model, _ = family
    before = held()
    assert not any(isinstance(f, stand_ins._Dispatch) for f in before)
    failing = Failing(NEXT, delta)
    failing.__class__ = type("Failing", (Failing,), {"__module__": NEXT})
    with pytest.raises(CompileError, match="in the middle"):
        trace(failing, delta_inputs(2, 4))
    assert held() == before
    assert not any("forward" in vars(m) for m in model.modules())
    assert stand_ins._used.get() is None


def test_other_threads_call_what_they_always_do():
    """While one thread traces, another runs the model as it is, and a third, that traces too, takes its turn."""
    before = held()
    inside, checked = threading.Event(), threading.Event()
    found = {}

    def slow(m, *tensors):
        result = delta(m, *tensors)
        inside.set()
        checked.wait(60)
        return result

    def traced(name, call):
        found[name] = trace(Layer(NEXT, call), example, check=False)

    example = delta_inputs(2, 7)
    threads = [threading.Thread(target=traced, args=given) for given in (("first", slow), ("second", delta))]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    dispatch = held()[0]
    assert isinstance(dispatch, stand_ins._Dispatch)
    dispatch.replacement = None  # not called here
    out, _ = Layer(NEXT, delta)(*example)
    checked.set()
    for t in threads:
        t.join(60)
    assert held() == before
    for name in ("first", "second"):
        assert found[name].graph.find("attention.linear_attention")
        assert error(run(found[name].graph, list(example))[0], out) < 1e-5
