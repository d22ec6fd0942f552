"""Graphs that are wrong on purpose: each ends in one clear error, and nothing is run, written or left open."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.ir import Dim, Graph, TensorType, Weight, parse
from moec.ir.interpreter import run
from moec.ir.verify import DEEPEST_CALLS
from moec.passes import build_pipeline

from .effects import refused
from .limits import limited
from .texts import SILU, function, text

TYPE = TensorType("f32", (Dim("T"), 4))


# -- cycles ---------------------------------------------------------------------------------------


def cyclic(length: int) -> Graph:
    """A chain whose first node takes the last one's result."""
    graph = Graph()
    value = graph.add_input("x", TYPE)
    nodes = []
    for _ in range(length):
        nodes.append(graph.create("math.silu", [value]))
        value = nodes[-1].result
    graph.add_output(value, "y")
    graph.replace_operand(nodes[0], 0, value)
    return graph


USES = {
    "verify": lambda g: g.verify(),
    "compile": lambda g: moec.compile(g, backend="onnxruntime"),
    "reference": lambda g: moec.compile(g, backend="reference"),
    "compare": lambda g: moec.compare(g, (torch.ones(2, 4),)),
    "bisect": lambda g: moec.bisect(g, (torch.ones(2, 4),)),
    "pass": lambda g: build_pipeline(()).passes[0].run(g),
    "pipeline": lambda g: build_pipeline(()).run(g),
    "run": lambda g: run(g, [torch.ones(2, 4)]),
    "clone": lambda g: g.clone(),
    "networkx": lambda g: g.to_networkx(),
    "text": lambda g: parse(str(g)),
}


@limited()
@pytest.mark.parametrize("length", [1, 2, 300])
@pytest.mark.parametrize("use", USES)
def test_a_cycle_through_replace_operand(use, length):
    graph = cyclic(length)
    with refused("not defined before|used before it is defined"):
        USES[use](graph)


@limited()
@pytest.mark.parametrize("use", USES)
def test_an_operand_of_another_graph(use):
    other, graph = parse(text(SILU)), parse(text(SILU))
    graph.replace_operand(next(graph.nodes), 0, other.inputs[0])
    with refused("not defined before|used before it is defined|%\\?"):
        USES[use](graph)


@limited()
def test_cycles_in_text():
    for rows in (
        ["%0: f32[T, 4] = math.silu(%0)"],
        ["%0: f32[T, 4] = math.silu(%1)", "%1: f32[T, 4] = math.silu(%0)"],
    ):
        with refused(r"line 2, column \d+: %\d is used before it is defined"):
            parse(text(*rows))


def calling(callee: str, operand: str = "%x") -> str:
    return f'%0: f32[T, 4] = call.graph({operand}) {{callee="{callee}", dims=[["T", T]]}}'


@limited()
@pytest.mark.parametrize(
    "names", [["f"], ["f", "g"], ["f", "g", "h"], [f"f{i}" for i in range(2000)]], ids=["self", "two", "three", "2000"]
)
def test_recursive_functions(names):
    functions = [function(n, calling(names[(i + 1) % len(names)])) for i, n in enumerate(names)]
    with refused(r"recursive call: f0? -> "):
        parse(text(calling(names[0])) + "".join(functions))
    # and where only the functions call each other
    with refused("recursive call"):
        parse(text(calling(names[0])) + "".join(functions) + function("lone", SILU))


@limited()
def test_a_function_that_calls_itself_through_replaced_attributes():
    graph = parse(text(calling("f")) + function("f", SILU) + function("g", calling("f")))
    next(graph.functions["f"].nodes)  # silu
    node = graph.functions["f"].create("call.graph", [graph.functions["f"].inputs[0]], {"callee": "g"}, types=[TYPE])
    graph.functions["f"].set_output(0, node.result)
    with refused("recursive call: f -> g -> f"):
        moec.compile(graph, backend="reference")


@limited()
def test_missing_functions():
    with refused("no function 'nowhere'"):
        parse(text(calling("nowhere")))
    graph = parse(text(calling("f")) + function("f", SILU))
    del graph.functions["f"]
    with refused("no function 'f'"):
        moec.compile(graph, backend="onnxruntime")


@limited()
def test_functions_under_other_names_and_inside_functions():
    graph = parse(text(calling("f")) + function("f", SILU))
    graph.functions["g"] = graph.functions["f"]
    with refused("function 'f' is stored under the name 'g'"):
        graph.verify()
    del graph.functions["g"]
    graph.functions["f"].functions["f"] = graph.functions["f"]
    with refused("holds functions of its own"):
        moec.compile(graph, backend="reference")


def nest(depth: int, calls: int) -> str:
    """Functions that call the next one `calls` times each."""
    result = text(calling("f0"))
    for i in range(depth):
        rows = [
            calling(f"f{i + 1}", f"%{k - 1}" if k else "%x").replace("%0:", f"%{k}:") for k in range(calls)
        ] if i < depth - 1 else [SILU]  # fmt: skip
        last = len(rows) - 1
        result += function(f"f{i}", *rows).replace("return %0", f"return %{last}")
    return result


@limited()
def test_calls_that_nest_deeply():
    graph = parse(nest(DEEPEST_CALLS, 1))
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(graph, backend=backend, threads=1)
        assert torch.allclose(compiled(torch.ones(2, 4))[0], torch.nn.functional.silu(torch.ones(2, 4)))
    for depth in (DEEPEST_CALLS + 1, 3000):
        with refused(f"calls nest more than {DEEPEST_CALLS} deep"):
            parse(nest(depth, 1))


@limited()
def test_calls_that_multiply():
    """Forty functions that call the next one twice are 2⁴⁰ nodes."""
    with refused("more than 2,000,000 nodes with its calls written out"):
        parse(nest(40, 2))
    with refused("more than 2,000,000 nodes"):
        moec.compile(parse(nest(25, 2), verify=False), backend="onnxruntime")
    assert len(parse(nest(10, 2)).find("math.silu")) == 2**9


@limited()
def test_wrong_calls():
    good = text(calling("f")) + function("f", SILU)
    for old, new, said in (
        ('dims=[["T", T]]', 'dims=[["T"]]', "dims"),
        ('dims=[["T", T]]', 'dims=["T"]', "dims"),
        ('dims=[["T", T]]', 'dims=[["T", "os"]]', "dims"),
        ('dims=[["T", T]]', 'dims=[[1, T]]', "dims"),
        ('dims=[["T", T]]', 'dims=[["T", T], ["T", 3]]', "dims"),
        ('dims=[["T", T]]', 'dims=[["T", T + 1]]', r"input 'x' of 'f' is f32\[T \+ 1, 4\], got f32\[T, 4\]"),
        ('dims=[["T", T]]', "dims=[]", "dims"),
        ('callee="f"', "callee=3", "must be str"),
        ("call.graph(%x)", "call.graph()", "takes 1 values, got 0"),
        ("call.graph(%x)", "call.graph(%x, %x)", "takes 1 values, got 2"),
        ("call.graph(%x)", "call.graph(_)", "missing"),
        ("function @f(%x: f32[T, 4])", "function @f(%x: f32[T, 5])", "input 'x' of 'f'|its rule gives"),
        ("%0: f32[T, 4] = call", "%0: f32[T, 4], %1: f32[T, 4] = call", "its rule gives"),
    ):  # fmt: skip
        assert old in good
        with refused(said):
            parse(good.replace(old, new, 1))


# -- names ----------------------------------------------------------------------------------------


@limited()
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (text(SILU, SILU), "%0 is defined twice"),
        (text("%x: f32[T, 4] = math.silu(%x)", result="%x"), "%x is defined twice"),
        (text(SILU, inputs="%x: f32[T, 4], %x: f32[T, 4]"), "duplicate input name 'x'"),
        (text(SILU, outputs="%y: f32[T, 4], %y: f32[T, 4]", result="%0, %0"), "duplicate output name 'y'"),
        (text("weight @w: f32[4]", "weight @w: f32[4]", SILU), "'w' is declared twice"),
        (text(SILU) + function("f", SILU) * 2, "@f is defined twice"),
        (text("%0: f32[T, 4] = math.silu(%z)"), "%z is used before it is defined"),
        (text("%0: f32[T, 4] = math.add(%x, @w)"), "@w is not declared"),
        (text(SILU, result="%1"), "%1 is used before it is defined"),
        (text(SILU, result=""), "returns 0 values, declares 1"),
        (text(SILU, result="%0, %0"), "returns 2 values, declares 1"),
        (text(SILU, result="_"), "returned is _"),
        (text("%0: f32[T, 4], %0: f32[T, 4] = math.silu(%x)"), "%0 is defined twice"),
        (text("%0: f32[T, 4] = math.slu(%x)"), "unknown op 'math.slu'"),
        (text("%0: f32[T, 4] = os.system(%x)"), "unknown op 'os.system'"),
        (text("%0: f32[T, 4] = __import__(%x)"), "unknown op"),
        (text("%0: f32[T, 4] = norm.rms(%x) {epsilon=1e-6}"), "no attribute 'epsilon'"),
        (text("%0: f32[T, 4] = norm.rms(%x) {__class__=1}"), "no attribute '__class__'"),
        (text("%0: f32[T, 4] = norm.rms(%x) {eps=1e-6, eps=1}"), "'eps' is given twice"),
        (text('%0: f32[T, 4] = norm.rms(%x) {eps="small"}'), "'eps' must be float, got str"),
        (text("%0: f32[T, 4] = norm.rms(%x) {eps=none}"), "'eps' must be float"),
        (text("%0: f32[T, 4] = norm.rms(%x) {eps=[1.0]}"), "'eps' must be float, got tuple"),
        (text("%0: f32[T, 4] = norm.rms(%x) {eps=T}"), "'eps' must be float, got Dim"),
        (text("%0: f32[4, T] = tensor.transpose(%x) {perm=[1, none]}"), "'perm' must hold int, got NoneType"),
        (text("%0: f32[4, T] = tensor.transpose(%x) {perm=[1, true]}"), "'perm' must hold int, got bool"),
        (text("%0: f32[4, T] = tensor.transpose(%x)"), "'perm' is required"),
        (text('%0: f32[T, 4] = tensor.reshape(%x) {shape=["T", 4]}'), "'shape' must hold int or Dim, got str"),
        (text("%0: f32[T, 4] = tensor.reshape(%x) {shape=[[1], 1000000000]}"), "'shape' must hold int or Dim"),
        (text("%0: f32[T, 4] = math.silu()"), "takes 1 operands, got 0"),
        (text("%0: f32[T, 4] = math.silu(%x, %x)"), "takes 1 operands, got 2"),
        (text("%0: f32[T, 4] = math.silu(_)"), "'x' is missing"),
    ],
)
def test_wrong_names_and_attributes(bad, said):
    with refused(said):
        parse(bad)


@limited()
def test_wrong_names_through_the_api():
    graph = Graph()
    x = graph.add_input("x", TYPE)
    with refused("duplicate input name 'x'"):
        graph.add_input("x", TYPE)
    graph.add_output(x, "y")
    with refused("duplicate output name 'y'"):
        graph.add_output(x, "y")
    graph.add_weight(Weight("w", TYPE.with_shape([4])))
    with refused("weight 'w' exists as"):
        graph.add_weight(Weight("w", TYPE.with_shape([5])))
    graph.add_output(x, "z")
    graph.output_names[1] = "y"
    with refused("duplicate output names"):
        graph.verify()
    graph.output_names[1] = "\ud800"
    with refused("no Unicode text"):
        moec.compile(graph, backend="reference")
    graph.output_names[1] = "z"
    graph.weights["v"] = graph.weights.pop("w")
    with refused("under the name 'v' is the weight 'w'"):
        graph.verify()
    with refused("has 1 operands, none at 7"):
        graph.replace_operand(graph.create("math.silu", [x]), 7, x)


@limited()
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_names_that_look_like_something_else(backend, tmp_path):
    """A name is a name: paths, keywords, text of other formats and line breaks do nothing."""
    names = ["../../etc/passwd", "a\nb", 'q"uo\\te', "%0", "@w", "", " ", "return", "}", "a\0b", "ü", "\u2028", "C:\\x"]
    graph = Graph()
    inputs = [graph.add_input(n, TYPE) for n in names]
    weights = [graph.add_weight(Weight.of(n, torch.full((4,), float(i)))) for i, n in enumerate(names)]
    for x, w, n in zip(inputs, weights, names, strict=True):
        graph.add_output(graph.create("math.add", [x, w]).result, n)
    assert parse(str(graph)) == graph
    compiled = moec.compile(graph, backend=backend, threads=1)
    compiled.save(tmp_path / "saved")
    given = [torch.randn(2, 4) for _ in names]
    for model in (compiled, moec.load(tmp_path / "saved")):
        for i, (y, x) in enumerate(zip(model(*given), given, strict=True)):
            assert torch.equal(y, x + i)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


# -- types and sizes ------------------------------------------------------------------------------


@limited()
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (text("%0: f32[T, 5] = math.silu(%x)", outputs="%y: f32[T, 5]"), r"type \(f32\[T, 5\]\), its rule gives"),
        (text("%0: f16[T, 4] = math.silu(%x)", outputs="%y: f16[T, 4]"), "its rule gives"),
        (text("%0: f32[4] = math.silu(%x)", outputs="%y: f32[4]"), "its rule gives"),
        (text(SILU, outputs="%y: f32[T, 5]"), r"declared f32\[T, 5\], returned is f32\[T, 4\]"),
        (text(SILU, outputs="%y: i32[T, 4]"), r"declared i32"),
        (text("weight @w: f32[5]", "%0: f32[T, 4] = math.add(%x, @w)"), "broadcast"),
        (text("weight @w: f16[4]", "%0: f32[T, 4] = math.add(%x, @w)"), "dtype"),
        (text("weight @w: f32[T]", SILU), "'w' has a symbolic shape"),
        (text("%0: f32[T, 4] = tensor.full() {shape=[U, 4], value=1.0, dtype=f32}"), r"dimensions \['U'\]|its rule"),
        (text("%0: f32[U, 4] = tensor.full() {shape=[U, 4], value=1.0, dtype=f32}", outputs="%y: f32[U, 4]"),
         r"uses dimensions \['U'\] that no input of the graph has"),
        (text(SILU, inputs="%x: f32[-1, 4]"), "bad size -1"),
        (text(SILU, inputs="%x: f32[none, 4]", outputs="%y: f32[none, 4]"), "none"),
        (text("%0: f32[nan, 4] = math.silu(%x)", inputs="%x: f32[nan, 4]", outputs="%y: f32[nan, 4]"), "reserved"),
        (text(SILU, inputs="%x: f32[T//0, 4]"), "no size"),
        (text(SILU, inputs="%x: f32[1.5, 4]"), "1.5"),
        (text(SILU, inputs="%x: f32[f32[4], 4]"), "bad dimension"),
        (text(SILU, inputs="%x: q7[T, 4]"), "unknown dtype 'q7'"),
    ],
)  # fmt: skip
def test_wrong_types(bad, said):
    with refused(said):
        parse(bad)


@limited()
def test_a_changed_type_is_seen():
    graph = parse(text(SILU))
    next(graph.nodes).results[0].type = TensorType("f32", (Dim("T"), 5))
    with refused(r"math.silu has type \(f32\[T, 5\]\), its rule gives \(f32\[T, 4\]\)"):
        moec.compile(graph, backend="onnxruntime")


SOLVED = [
    # declared shapes, given shapes, what is said (None: it runs)
    (["T", "T"], [[3], [4]], "'b' axis 0 has size 4, expected 3"),
    (["T", "T + 1"], [[3], [3]], "expected 4"),
    (["T - 5"], [[3]], None),
    (["5 - T"], [[9]], "no value of"),
    (["2*T"], [[3]], "no value of"),
    (["2*T + 1"], [[4]], "no value of"),
    (["T*U"], [[6]], "no value of"),
    (["T + U", "T - U"], [[6], [2]], "no value of"),
    (["T*T + 1"], [[3]], "no value of"),
    (["T**4 + T**3"], [[24]], None),
    (["T**16 + T**3"], [[2]], "no value of"),
    (["floor(T/2)"], [[2]], "no value of"),
    (["Max(T, 3)"], [[3]], "no value of"),
    (["Mod(T, 7)"], [[3]], "no value of"),
    (["floor(T/2)", "T"], [[2], [5]], None),
    (["Max(T, 3) + Min(U, Mod(T, 2), 5)", "T", "U"], [[6], [5], [1]], None),
    (["T/2", "T"], [[2], [5]], "no size|expected"),
    (["1/T", "T"], [[1], [0]], "no size|expected"),
    (["T", "T // U", "U"], [[1], [1], [0]], "no size|expected"),
    (["T", "T % U", "U"], [[1], [1], [0]], "no size|expected"),
    (["T", "U - T", "T - U"], [[2], [1], [1]], "expected|no value of"),
    (["T**8"], [[2**8]], None),
    (["0*T + 3"], [[4]], "expected 3"),
]


@limited()
@pytest.mark.parametrize(("declared", "given", "said"), SOLVED, ids=[" ".join(case[0]) for case in SOLVED])
def test_dimensions_that_contradict_or_have_no_solution(declared, given, said):
    names = "abc"[: len(declared)]
    inputs = ", ".join(f"%{n}: f32[{d}]" for n, d in zip(names, declared, strict=True))
    graph = parse(text(f"%0: f32[{declared[0]}] = math.silu(%a)", inputs=inputs, outputs=f"%y: f32[{declared[0]}]"))
    tensors = [torch.ones(shape) for shape in given]
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(graph, backend=backend, threads=1)
        if said is None:
            assert torch.equal(compiled(*tensors)[0], torch.nn.functional.silu(tensors[0]))
        else:
            with refused(said):
                compiled(*tensors)


@limited(seconds=60)
@pytest.mark.parametrize(
    "dim",
    [
        "((a+b+c+d)**16)**16", "*".join(f"(a{i}+1)" for i in range(40)), "a" + "//2" * 150, "-" * 900 + "a" + "//0",
        "Max(" + ",".join(f"a{i}" for i in range(200)) + ")", "Max(" * 60 + "a" + "".join(f",b{i})" for i in range(60)),
        "+".join(f"floor(a{i}/b{i})" for i in range(60)), "%".join(f"(a{i}+b{i})" for i in range(80)),
        "(" * 400 + "a" + ")" * 400, "9" * 5000, "a*" + "9" * 300, "a" * 2000, "2**16**16", "a**99", "a**(-1)", "a\0",
        "Max()", "floor()", "floor(a, b, c)", "Max(*a)", "True", "None", "a if a else b", "[a]", "a.real", "a;b",
        "lambda: 3", "(x:=3)", "f'{a}'", "__import__('os').system('true')", "print(a)", "a@b", "a<<62", "1_0.0", "1j",
        "Max(a, key=b)", "T//0", "T%0", "0**0//0", "oo", "zoo*0//0",
    ],
    ids=lambda d: d[:20].replace("\0", "NUL"),
)  # fmt: skip
def test_dimensions_that_are_no_sizes(dim):
    """Also those that sympy would work at for hours; `oo` is a name like another."""
    source = text(f"%0: f32[{dim}] = math.silu(%x)", inputs=f"%x: f32[{dim}]", outputs=f"%y: f32[{dim}]")
    if dim == "oo":
        assert parse(source).symbols == {"oo"}
        return
    with refused(r"line 1, column \d+: "):
        parse(source)


@limited()
def test_dimensions_that_grow_without_end():
    """A product or nest of sizes that gets longer at each node is refused where it is more than sizes are."""
    graph = Graph()
    value = graph.add_input("x", TensorType("f32", (Dim("T"),)))
    with refused("factor beyond 64 bits"):
        for _ in range(100):
            value = graph.create("tensor.concat", [value, value], {"axis": 0}).result
    for factor, words in ((1, "factor beyond 64 bits"), (2, "functions|levels")):  # the first stays one division
        graph = Graph()
        value = graph.add_input("x", TensorType("f32", (Dim("T"),)))
        with refused(words):
            for _ in range(1000):
                end = (factor * value.shape[0] + 1) // 3
                value = graph.create("tensor.slice", [value], {"axis": 0, "end": end}).result
