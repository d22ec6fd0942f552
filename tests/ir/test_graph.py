"""Graph surgery, the verifier, functions, inputs."""

import itertools

import pytest
import torch

from moec.ir import (
    ArgumentTypeError,
    ArgumentValueError,
    Builder,
    CompileError,
    Dim,
    Graph,
    TensorType,
    Weight,
    op,
    parse,
    run,
)
from moec.ir.opdef import Operand, lookup


def chain(n=3):
    graph = Graph()
    x = graph.add_input("x", TensorType("f32", (Dim("B"), 4)))
    b = Builder(graph)
    for _ in range(n):
        x = b.silu(x)
    graph.add_output(x)
    return graph


def test_clone_is_equal_and_independent():
    graph = chain()
    copy = graph.clone()
    assert copy == graph
    first = next(iter(copy.nodes))
    copy.replace_value(first.result, copy.inputs[0])
    copy.erase(first)
    assert len(graph) == 3
    assert copy != graph
    graph.verify()
    copy.verify()


def test_order_numbers_survive_many_insertions():
    graph = chain(2)
    last = list(graph.nodes)[-1]
    b = Builder(graph, before=last)
    for _ in range(200):
        b.neg(graph.inputs[0])
    nodes = list(graph.nodes)
    assert all(a.precedes(c) for a, c in itertools.pairwise(nodes))
    assert nodes[-1] is last


def test_verifier_finds_broken_graphs():
    graph = chain()
    nodes = list(graph.nodes)
    graph.move_before(nodes[2], nodes[1])
    with pytest.raises(CompileError, match="not defined before it"):
        graph.verify()
    graph = chain()
    node = next(iter(graph.nodes))
    node.results[0].type = TensorType("bf16", (Dim("B"), 4))
    with pytest.raises(CompileError, match="its rule gives"):
        graph.verify()
    graph = chain()
    del graph.inputs[0].uses[(next(iter(graph.nodes)), 0)]
    with pytest.raises(CompileError, match="use record"):
        graph.verify()


def test_erasing_a_used_node_is_refused():
    graph = chain()
    with pytest.raises(CompileError, match="a result is used"):
        graph.erase(next(iter(graph.nodes)))


def test_functions_are_called_found_and_checked():
    text = """graph(%x: f32[N, 4]) -> (%y: f32[N, 4]) {
  %0: f32[N, 4] = call.graph(%x) {callee="block", dims=[["T", N]]}
  %1: f32[N, 4] = call.graph(%0) {callee="block", dims=[["T", N]]}
  return %1
}

function @block(%h: f32[T, 4]) -> (%out: f32[T, 4]) {
  %0: f32[T, 4] = math.silu(%h)
  return %0
}
"""
    graph = parse(text)
    assert str(graph) == text
    assert len(graph.find("silu")) == 2
    assert len(graph.find("math.silu", unique=True)) == 1
    assert graph.find("no_such_op") == []
    x = torch.randn(3, 4)
    silu = torch.nn.functional.silu
    torch.testing.assert_close(run(graph, [x])[0], silu(silu(x)))
    with pytest.raises(CompileError, match="recursive call: block -> block"):
        parse(text.replace("math.silu(%h)", 'call.graph(%h) {callee="block", dims=[["T", T]]}'))
    with pytest.raises(CompileError, match="no function 'blok'"):
        parse(text.replace('callee="block"', 'callee="blok"', 1))


def test_inputs_are_checked_by_name():
    graph = Graph()
    a = graph.add_input("a", TensorType("f32", (Dim("B"), 4)))
    c = graph.add_input("c", TensorType("f32", (2 * Dim("B"), 4)))
    graph.add_output(Builder(graph).neg(a))
    graph.add_output(c, "second")
    run(graph, [torch.ones(3, 4), torch.ones(6, 4)])
    for inputs, error, message in [
        ([torch.ones(3, 4)], ArgumentTypeError, r"expected 2 tensor inputs \(a, c\), got 1"),
        ([torch.ones(3, 4), torch.ones(6, 4).double()], ArgumentTypeError, "'c' has dtype f64, expected f32"),
        ([torch.ones(3, 4), None], ArgumentTypeError, "'c' must be a torch.Tensor"),
        ([torch.ones(3, 4), torch.ones(6)], ArgumentValueError, "'c' has rank 1"),
        ([torch.ones(3, 4), torch.ones(5, 4)], ArgumentValueError, r"'c' axis 0 has size 5, expected 6 \(2\*B"),
        ([torch.ones(3, 5), torch.ones(6, 4)], ArgumentValueError, "'a' axis 1 has size 5, expected 4"),
    ]:
        with pytest.raises(error, match=message):
            run(graph, inputs)


def test_sizes_are_solved_from_expressions():
    graph = Graph()
    x = graph.add_input("x", TensorType("f32", (Dim("P") + Dim("S"),)))
    graph.add_input("s", TensorType("f32", (Dim("S"),)))
    graph.add_output(Builder(graph).arange(end=Dim("P")))
    graph.add_output(x)
    assert run(graph, [torch.ones(7), torch.ones(2)])[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ArgumentValueError, match="no value of P"):
        run(graph, [torch.ones(1), torch.ones(2)])


def test_weights_are_lazy_and_typed():
    graph = Graph()
    graph.add_output(graph.add_weight(Weight("w", TensorType("f32", (2,)))))
    with pytest.raises(CompileError, match="'w' has no data"):
        run(graph, [])
    with pytest.raises(CompileError, match=r"'w': declared f32\[2\], got f32\[3\]; no weight 'v'"):
        graph.bind_weights({"w": torch.ones(3), "v": torch.ones(1)})
    graph.bind_weights({"w": torch.ones(2)})
    assert run(graph, [])[0].tolist() == [1, 1]


def test_custom_ops_are_one_class():
    @op("test.twice")
    class Twice:
        """2x"""

        x: Operand

        def infer(self):
            return self.x

        def reference(self):
            return self.x * 2

    graph = chain(0)
    graph.set_output(0, Builder(graph).twice(graph.inputs[0]))
    assert run(graph, [torch.ones(1, 4)])[0].tolist() == [[2, 2, 2, 2]]
    assert lookup("twice").name == "test.twice"


def test_networkx_view():
    graph = chain(2)
    g = graph.to_networkx()
    assert sorted(d["kind"] for _, d in g.nodes(data=True)) == ["input", "node", "node", "output"]
    assert g.number_of_edges() == 3
