"""Models that go through their experts in Python, by how many tokens each one got."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


def test_a_wrong_loop_is_not_trusted(monkeypatch):
    """What stands in is compared with the model, at the sizes of the trace too; the model as it is follows, and where
    that cannot be traced, the error says what stood in."""
    monkeypatch.setattr(expert_loops.CountingGate, "__call__", lambda self, hidden_states: hidden_states.tolist())
    with pytest.raises(CompileError, match=r"an op of ours stood in for .*a count of tokens for each expert"):
        trace(build("jetmoe"), (), {"input_ids": ids(2, 12), "use_cache": False})
    monkeypatch.setattr(expert_loops.ExpertsWithIdentity, "__call__", lambda self, x, experts, weights: x)
    model, x = build("longcat_flash"), ids(2, 12)
    with pytest.raises(CompileError, match="an op of ours stood in for a loop over experts"):
        trace(model, (), {"input_ids": x, "use_cache": False})


class Gate(nn.Module):
    """Named as a gate that counts tokens, and another one."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.input_size, self.top_k = 4, 8, 2
        self.layer = nn.Linear(8, 4, bias=False)

    def forward(self, hidden_states):
        return self.layer(hidden_states).softmax(-1).topk(self.top_k, -1)


class Chosen(nn.Module):
    """Named as a product of sorted rows for each expert, and one of chosen weights."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.input_size, self.output_size = 4, 8, 8
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, inputs, expert_size):
        return torch.einsum("td,tkod->tko", inputs, self.weight[expert_size])


class Negated(Chosen):
    """Told as such a product is, gives as many results, and others."""

    def forward(self, inputs, expert_size):
        return -torch.cat([r @ w.T for r, w in zip(inputs.split(expert_size), self.weight, strict=True)])


def test_modules_that_only_look_like_a_structure(same):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = Gate(), Chosen()

        def forward(self, x):
            weights, chosen = self.gate(x)
            return (self.experts(x, chosen) * weights[..., None]).sum(1)

    model = Model()
    assert expert_loops.CountingGate.fits(model.gate)
    assert expert_loops.ParallelLinear.fits(model.experts)
    traced = trace(model, (torch.randn(5, 8),), dynamic_shapes={"x": {0: "T"}})
    for rows in (0, 1, 5, 20):
        same(traced, model, (torch.randn(rows, 8),))


def test_a_structure_that_gives_something_else(same):
    """The two are compared, and the module as it is can be traced at these counts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Negated()

        def forward(self, x):
            return self.experts(x, [1, 2, 3, 4])

    model = Model()
    same(trace(model, (torch.randn(10, 8),)), model, (torch.randn(10, 8),))


def test_parameters_of_other_names_are_no_structure():
    class Scores(Gate):
        def forward(self, x):
            return self.layer(x)

    class Rows(Chosen):
        def forward(self, x, chosen):
            return x

    assert not expert_loops.CountingGate.fits(Scores())
    assert not expert_loops.ParallelLinear.fits(Rows())


def test_tokens_that_any_expert_may_take():
    """The embedding of a padding id is zero, and so are the scores of its row: topk of torch breaks ties by no rule,
    ours by the index."""
    torch.manual_seed(0)
    model = build("jetmoe")
    assert model.get_input_embeddings().padding_idx == 0
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    x = torch.tensor([[0, 5, 6], [7, 0, 0]])
    found = trace(model, (), {"input_ids": x, "use_cache": False}, dynamic_shapes={"input_ids": {0: "B", 1: "S"}})
    others = ids(3, 8)
    with torch.no_grad():
        want = model(others, use_cache=False).logits
    assert error(run(found.graph, [others])[0], want) < 1e-4
