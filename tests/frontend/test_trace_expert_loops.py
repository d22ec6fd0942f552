"""Models that go through their experts in Python, by how many tokens each one got."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.frontend import expert_loops, trace
from moec.ir import CompileError, run

from .. import model_matrix


def build(family):
    """With weights of about unit gain, so that the experts matter, and biases that are none of them zero."""
    model = model_matrix.build(model_matrix.Entry(family, "eager"))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, p.shape[-1] ** -0.5)
    return model


def ids(*shape):
    return torch.randint(3, 29, shape)


def traced(model):
    kwargs = {"input_ids": ids(2, 12), "use_cache": False}
    return trace(model, (), kwargs, dynamic_shapes={"input_ids": {0: "B", 1: "S"}})


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash", "jetmoe"])
def test_agrees_with_eager_at_every_length(family, well_formed):
    model = build(family)
    found = traced(model)
    well_formed(found)
    assert found.graph.find("linear.grouped_matmul")
    compiled = moec.compile(found.graph, backend="onnxruntime", threads=1)
    for shape in ((1, 1), (1, 13), (3, 67), (2, 131)):
        x = ids(*shape)
        with torch.no_grad():
            want = model(x, use_cache=False).logits
        assert error(run(found.graph, [x])[0], want) < 1e-4, shape
        assert error(compiled(x)[0], want) < 1e-4, shape
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash", "jetmoe"])
def test_each_expert_is_the_models_own(family):
    """Experts in another order give other results, by more than the comparison above allows."""
    model = build(family)
    graph, x = traced(model).graph, ids(2, 30)
    (want,) = run(graph, [x])
    for name, w in graph.weights.items():
        if any(part in name for part in (".experts.", "input_linear", "output_linear")):
            other = graph.clone()
            tensor = w.weight.load()
            other.bind_weights({name: tensor.roll(tensor.shape[0] // 2, 0)})
            assert error(run(other, [x])[0], want) > 1e-3, name


def test_experts_that_do_nothing_are_chosen():
    """In the comparison of longcat_flash above: some tokens go to them, some do not."""
    model = build("longcat_flash")
    module = next(m for m in model.modules() if expert_loops.ExpertsWithIdentity.fits(m))
    x, experts = torch.randn(5, module.hidden_size), torch.tensor([[0, 6], [7, 6], [5, 1], [2, 7], [3, 4]])
    weights = torch.rand(5, 2)
    with torch.no_grad():
        want = module(x, experts, weights)
        torch.testing.assert_close(expert_loops.ExpertsWithIdentity(module)(x, experts, weights), want)


def test_a_wrong_loop_is_refused(monkeypatch):
    """What stands in is compared with the model, at the sizes of the trace too."""
    monkeypatch.setattr(expert_loops.ExpertsWithIdentity, "__call__", lambda self, x, experts, weights: x)
    with pytest.raises(CompileError, match="an op of ours stood in for a loop over experts"):
        trace(build("longcat_flash"), (), {"input_ids": ids(2, 12), "use_cache": False})
