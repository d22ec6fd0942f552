"""Laws of the engine on random graphs: the meaning stays, a second run changes nothing, the input is untouched."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.ir import Builder, Dim, Graph, TensorType
from moec.passes import Pipeline, Rewrite, RuleSet, default_pipeline
from moec.passes.rewrite import limited
from moec.testing import check_pass

UNARY = ("silu", "sigmoid", "neg", "relu", "square", "exp_small", "rms", "softmax", "norm_by_hand")
BINARY = ("add", "mul", "sub", "same_add")
SHAPE = ("transpose_twice", "reshape_twice", "cast_twice", "split_concat", "slice", "add_zero", "mul_one", "neg_neg")


@st.composite
def graphs(draw):
    """A graph over x, y: f32[B, 4] of up to 25 steps, each on one or two values before it, with 1 to 3 outputs."""
    graph = Graph()
    type = TensorType("f32", (Dim("B"), 4))
    values = [graph.add_input("x", type), graph.add_input("y", type)]
    b = Builder(graph)
    for kind in draw(st.lists(st.sampled_from(UNARY + BINARY + SHAPE), min_size=1, max_size=25)):
        # mostly recent values, so that patterns arise
        i, j = (draw(st.integers(max(0, len(values) - 4), len(values) - 1)) for _ in range(2))
        values.append(step(b, kind, values[i], values[j]))
    for i in draw(st.lists(st.integers(2, len(values) - 1), min_size=1, max_size=3, unique=True)):
        graph.add_output(values[i])
    return graph


def step(b, kind, x, y):
    n, half = x.shape[0], 2
    match kind:
        case "silu" | "sigmoid" | "neg" | "relu" | "rms" | "softmax":
            return getattr(b, kind)(x)
        case "square":
            return b.mul(b.tanh(x), b.tanh(x))
        case "exp_small":
            return b.exp(b.tanh(x))
        case "norm_by_hand":
            return b.mul(x, b.rsqrt(b.add(b.mean(b.mul(x, x), axes=(-1,), keepdim=True), 1e-5)))
        case "same_add":
            return b.add(x, x)
        case "add" | "sub":
            return getattr(b, kind)(x, y)
        case "mul":
            return b.mul(b.tanh(x), y)
        case "transpose_twice":
            return b.transpose(b.transpose(x, perm=(1, 0)), perm=(1, 0))
        case "reshape_twice":
            return b.reshape(b.reshape(x, shape=(n, half, half)), shape=(n, 4))
        case "cast_twice":
            return b.cast(b.cast(x, dtype="f64"), dtype="f32")
        case "split_concat":
            parts = b.split(x, axis=-1, sizes=(half, half))
            return b.concat(parts[1], parts[0], axis=-1)
        case "slice":
            return b.slice(b.concat(x, y, axis=-1), axis=-1, start=0, end=4)
        case "add_zero":
            return b.add(x, 0.0)
        case "mul_one":
            return b.mul(x, 1.0)
    return b.neg(b.neg(x))


def rules(pipeline):
    return [p for p in pipeline.passes if isinstance(p, Rewrite | RuleSet)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_every_pass_keeps_the_meaning(graph):
    for p in default_pipeline().passes:
        graph = check_pass(p, graph)


@settings(max_examples=40, deadline=None)
@given(graphs(), st.integers(0, 6))
def test_applications_come_in_the_same_order(graph, n):
    """A run that stops after n applications is the beginning of the run that does not."""
    pipeline = Pipeline(tuple(rules(default_pipeline())))
    with limited() as everything:
        full, _ = pipeline.run(graph)
    with limited(n) as some:
        pipeline.run(graph)
    wanted = [(a.name, a.location, a.root) for a in everything.applications[:n]]
    assert [(a.name, a.location, a.root) for a in some.applications] == wanted
    with limited(len(everything.applications)):
        assert pipeline.run(graph)[0] == full
