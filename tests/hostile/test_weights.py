"""Hostile weights: NaN and infinity, zeros, subnormals, damaged scales, odd sizes, strange memory, missing experts.

Either all backends compute what the reference means, or there is one error that names weight, expert and block.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec
from moec.ir import CompileError, Dim, DType, Graph, Quantization, TensorType, parse, run
from moec.ir.fp8 import E4M3FN, codes_of, quantize_exactly
from moec.passes import FoldNormWeight, FoldScales
from moec.passes.pipeline import run_pass
from moec.passes.quantize import QuantizeWeights

from .limits import limited
from .setups import SETUPS, compiled, graph_of, no_worker_left, same, weight

INF, NAN = math.inf, math.nan
every_setup = pytest.mark.parametrize("setup", SETUPS)
BACKENDS = ("reference", "onnxruntime", "triton")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MODES = (None, "fp8", "fp8-weight-only")

E, K, D, H = 5, 2, 40, 24


class Layer(nn.Module):
    """linear → router → stacked experts. x [T, D] → [T, D]."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        r = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=r) / shape[-1] ** 0.5).to(dtype))

        self.proj, self.gate = parameter(D, D), parameter(E, D)
        self.gate_up, self.down = parameter(E, 2 * H, D), parameter(E, D, H)

    def forward(self, x):
        x = F.linear(x, self.proj)
        weights, experts = torch.topk(F.softmax(F.linear(x, self.gate).float(), -1), K)
        combine = weights.new_zeros(x.shape[0], E).scatter(1, experts, weights)
        gate, up = torch.matmul(x, self.gate_up.transpose(1, 2)).chunk(2, -1)
        y = torch.matmul(F.silu(gate) * up, self.down.transpose(1, 2))
        return (y * combine.t().unsqueeze(-1).to(y.dtype)).sum(0)


def tokens(n: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(9)).to(dtype)


def compile_layer(model: nn.Module, backend: str, quantize: Any = None, **options: Any) -> moec.CompiledModel:
    example = (torch.zeros(4, D, dtype=next(model.parameters()).dtype),)
    return moec.compile(model.eval(), example, backend=backend, quantize=quantize, threads=1, **options)


@pytest.mark.parametrize("quantize", MODES[1:])
@every_backend
@limited()
def test_nan_and_infinity_cannot_be_quantised(backend, quantize, tmp_path):
    """One error, which names the weight and where in it, when the weight is read; nothing is written."""
    with no_worker_left():
        for name, at, value, place in (
            ("proj", (3, 7), NAN, "row 3, column 7, block [0, 0]"),
            ("gate_up", (4, 47, 39), INF, "expert 4, row 47, column 39, block [0, 0]"),
            ("down", (2, 39, 23), -INF, "expert 2, row 39, column 23, block [0, 0]"),
        ):
            model = Layer()
            with torch.no_grad():
                getattr(model, name)[at] = value
            folder = tmp_path / f"{backend}-{name}"
            with pytest.raises(CompileError) as caught:
                compile_and_save(model, backend, quantize, folder)
            said = str(caught.value)
            assert f"weight '{name}' has 1 NaN or infinite element: {value} in {place}" in said, said
            assert caught.value.code == "weight"
            assert not folder.exists()
            with pytest.raises(CompileError, match="has 1 NaN or infinite element"):
                compile_layer(model, backend, quantize)(tokens())


def compile_and_save(model: nn.Module, backend: str, quantize: str, folder: Path) -> None:
    compile_layer(model, backend, quantize).save(folder)


@limited()
def test_the_block_of_a_bad_element_is_named():
    w = torch.zeros(300, 500)
    w[260, 130] = NAN
    w[299, 499] = INF
    g = graph_of({"x": TensorType(DType.F32, (Dim("T"), 500))}, lambda b, x: b.linear(x, weight(b, "w", w)))
    q = QuantizeWeights(Quantization()).run(g)
    with pytest.raises(CompileError, match=r"2 NaN or infinite elements: nan in row 260, column 130, block \[2, 1\]"):
        run(q, [torch.zeros(1, 500)])


@every_backend
@limited()
def test_nan_and_infinity_without_quantisation_stay_in_their_place(backend):
    """They reach the results that use them, and no others: an expert's, those of the tokens that chose it."""
    with no_worker_left():
        model, x = Layer(), tokens(12)
        with torch.no_grad():
            clean = model(x)
            model.gate_up[1, 3] = NAN
            model.down[2, 5, 5] = INF
            want = model(x)
        c = compile_layer(model, "reference", dynamic_shapes=({0: torch.export.Dim.AUTO},))
        experts = [n for n in c.graph.nodes if n.op == "moe.route"]
        assert experts
        seen: dict[Any, torch.Tensor] = {}
        run(c.graph, [x], tap=lambda v, t: seen.update({v: t}))
        chosen = seen[experts[0].results[1]]
        got = compile_layer(model, backend, dynamic_shapes=({0: torch.export.Dim.AUTO},))(x)
        hit = ((chosen == 1) | (chosen == 2)).any(1)
        assert 0 < int(hit.sum()) < len(x)
        same(got[~hit], clean[~hit], 1e-4)
        assert (~got[hit].isfinite()).any(1).all()
        # eager runs every expert on every token, and 0 · NaN is NaN
        assert want.isnan().any()


FILLS = {
    "zero": lambda w: w * 0,
    "one zero block": lambda w: torch.cat([w[..., :32] * 0, w[..., 32:]], -1),
    "subnormal": lambda w: w * 1e-39,
    "tiny": lambda w: w * 1e-30,
    "huge": lambda w: w * 1e37,
    "one element": lambda w: F.pad(w[:1, :1], (0, w.shape[1] - 1, 0, w.shape[0] - 1)),
    "negative zero": lambda w: w * -0.0,
}


@pytest.mark.parametrize("quantize", MODES[1:])
@every_setup
@limited(seconds=60)
def test_extreme_blocks(setup, quantize):
    """Zeros have scale 1 and no NaN; subnormal and huge blocks compute on exactly the codes of the oracle."""
    q = Quantization(block=(32, 32), group=32, activations="f8e4m3fn" if quantize == "fp8" else None)
    r = torch.Generator().manual_seed(1)
    x = torch.randn(3, 48, generator=r)
    with no_worker_left():
        for name, fill in FILLS.items():
            w = fill(torch.randn(40, 48, generator=r))
            g = graph_of({"x": TensorType(DType.F32, (Dim("T"), 48))}, lambda b, x, w=w: b.linear(x, weight(b, "w", w)))
            g = QuantizeWeights(q).run(g)
            codes, scale = quantize_exactly(w, q.block)
            assert torch.equal(codes_of(g.weights["w.codes"].weight.load()), codes), name
            assert torch.equal(g.weights["w.scale"].weight.load(), scale), name
            assert scale.isfinite().all()
            assert (scale > 0).all()
            rows = x.double()
            if q.activations:
                rounded, xs = quantize_exactly(x, (1, 32))
                rows = E4M3FN.decode(rounded) * xs.double().repeat_interleave(32, 1)[:, :48]
            wide = scale.double().repeat_interleave(32, 0).repeat_interleave(32, 1)[:40, :48]
            want = rows @ (E4M3FN.decode(codes) * wide).T
            same(compiled(setup, g).run([x])[0], want, 1e-5, name)


SIZES = [(1, 1), (127, 129), (128, 128), (129, 255), (576, 130)]


@pytest.mark.parametrize("quantize", MODES[1:])
@every_setup
@limited(seconds=60)
def test_ragged_edges(setup, quantize):
    """Sizes that 128 does not divide, as DeepSeek stores them: the last blocks are smaller."""
    q = Quantization(activations="f8e4m3fn" if quantize == "fp8" else None)
    r = torch.Generator().manual_seed(2)
    with no_worker_left():
        for n, k in SIZES:
            w, x = torch.randn(n, k, generator=r), torch.randn(3, k, generator=r)
            w[-1] *= 50  # the edge blocks' own scales matter
            g = graph_of({"x": TensorType(DType.F32, (Dim("T"), k))}, lambda b, x, w=w: b.linear(x, weight(b, "w", w)))
            g = QuantizeWeights(q).run(g)
            codes, scale = quantize_exactly(w, (128, 128))
            assert g.weights["w.scale"].shape == (-(-n // 128), -(-k // 128))
            rows = x.double()
            if q.activations:
                rounded, xs = quantize_exactly(x, (1, 128))
                rows = E4M3FN.decode(rounded) * xs.double().repeat_interleave(128, 1)[:, :k]
            wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
            same(compiled(setup, g).run([x])[0], rows @ (E4M3FN.decode(codes) * wide).T, 1e-5, f"{n} × {k}")


def prequantised(scale: torch.Tensor) -> Graph:
    """linear and experts on codes that came with their scales."""
    r = torch.Generator().manual_seed(3)
    codes = E4M3FN.encode(torch.randn(3, 16, 16, generator=r) * 50, saturate=True).view(torch.float8_e4m3fn)
    down = E4M3FN.encode(torch.randn(3, 16, 8, generator=r) * 50, saturate=True).view(torch.float8_e4m3fn)

    def build(b: Any, x: Any, w: Any, i: Any) -> Any:
        c, s = b.quantize(x, block=(1, 8))
        y = b.scaled_linear(c, s, weight(b, "proj", codes[0]), weight(b, "proj.scale", scale[0]), block=(8, 8), group=8)
        stored = [weight(b, "gu", codes), weight(b, "gu.scale", scale)]
        stored += [weight(b, "dn", down), weight(b, "dn.scale", scale[:, :, :1].contiguous())]
        return y, b.scaled_experts(x, w, i, *stored, block=(8, 8), group=None, activation="relu")

    types = {
        "x": TensorType(DType.F32, (Dim("T"), 16)),
        "w": TensorType(DType.F32, (Dim("T"), 2)),
        "i": TensorType(DType.I64, (Dim("T"), 2)),
    }
    return graph_of(types, build)


def routed(n: int = 4) -> list[torch.Tensor]:
    r = torch.Generator().manual_seed(4)
    return [torch.randn(n, 16, generator=r), torch.rand(n, 2, generator=r), torch.randint(0, 3, (n, 2), generator=r)]


@every_setup
@limited(seconds=60)
def test_scales_zero_and_negative_compute_and_others_are_refused(setup):
    with no_worker_left():
        for value in (0.0, -0.5, 2.0**-149, 1e14):
            scale = torch.full((3, 2, 2), 0.25)
            scale[1, 0, 1] = scale[0, 1, 0] = value
            graph = prequantised(scale)
            for got, want in zip(compiled(setup, graph).run(routed()), run(graph, routed()), strict=True):
                assert want.isfinite().all()
                same(got, want, 1e-4, f"scale {value}")
        for value in (NAN, INF, -INF):
            scale = torch.full((3, 2, 2), 0.25)
            scale[1, 0, 1] = value
            with pytest.raises(CompileError) as caught:
                compiled(setup, prequantised(scale)).run(routed())
            said = str(caught.value)
            assert f"weight 'gu.scale' has 1 NaN or infinite scale: {value} in expert 1, block [0, 1]" in said, said


@limited()
def test_a_scale_of_the_wrong_shape_is_refused():
    """Scales of rank 1, transposed, rounded down instead of up, or per element: expected and got are named."""
    text = """graph(%x: f32[T, 200]) -> (%y: f32[T, 300]) {{
  weight @w: f8e4m3fn[300, 200]
  weight @w.scale_inv: {scale}
  %0: f8e4m3fn[T, 200], %1: f32[T, 2] = quant.quantize(%x) {{block=[1, 128]}}
  %2: f32[T, 300] = quant.scaled_linear(%0, %1, @w, @w.scale_inv, _) {{block=[128, 128]}}
  return %2
}}
"""
    parse(text.format(scale="f32[3, 2]")).verify()
    for wrong in ("f32[2, 1]", "f32[2, 3]", "f32[6]", "f32[300, 200]", "f32[]", "bf16[3, 2]", "f32[3, 2, 1]"):
        with pytest.raises(CompileError) as caught:
            moec.compile(parse(text.format(scale=wrong)), backend="reference")
        assert f"weight_scale {wrong}, expected f32[3, 2]" in str(caught.value)
    graph = parse(text.format(scale="f32[3, 2]"))
    codes = torch.zeros(300, 200, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(CompileError, match=r"scale_inv.*f32\[3, 2\].*f32\[2, 3\]"):
        graph.bind_weights({"w": codes, "w.scale_inv": torch.ones(2, 3)})


class Looped(nn.Module):
    """One MLP per expert, run one after the other over the experts listed in `used`."""

    def __init__(self, used: tuple[int, ...]):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E, bias=False)
        self.up = nn.ModuleList(nn.Linear(D, H, bias=False) for _ in range(E))
        self.gates = nn.ModuleList(nn.Linear(D, H, bias=False) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(H, D, bias=False) for _ in range(E))
        self.used = used

    def forward(self, x):
        weights, experts = torch.topk(F.softmax(self.gate(x), -1), K)
        y = torch.zeros_like(x)
        for e in self.used:
            mlp = self.down[e](F.silu(self.gates[e](x)) * self.up[e](x))
            y = y + mlp * (weights * (experts == e)).sum(-1, keepdim=True)
        return y


@every_backend
@limited(seconds=60)
def test_missing_repeated_and_exchanged_experts(backend):
    """A loop that leaves an expert out, runs one twice or in another order means what it says on every backend."""
    with no_worker_left():
        x = tokens(16)
        for used in (tuple(range(E)), (0, 1, 2, 3), (1, 2, 3, 4), (0, 1, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2,)):
            model = Looped(used).eval()
            with torch.no_grad():
                want = model(x)
            c = moec.compile(model, (x,), backend=backend, threads=1)
            same(c(x), want, 1e-4, f"{used}")


@every_setup
@limited()
def test_fewer_experts_than_the_router_chooses_from(setup):
    """Ids of experts that have no weights are an error, never left out silently."""
    r = torch.Generator().manual_seed(5)
    gu, dn = torch.randn(3, 8, 6, generator=r), torch.randn(3, 6, 4, generator=r)

    def build(b: Any, x: Any, logits: Any) -> Any:
        w, i = b.route(logits, k=1)
        return b.experts(x, w, i, weight(b, "gu", gu), weight(b, "dn", dn))

    graph = graph_of({"x": TensorType(DType.F32, (Dim("T"), 6)), "l": TensorType(DType.F32, (Dim("T"), 4))}, build)
    with no_worker_left():
        exe = compiled(setup, graph)
        x, logits = torch.randn(2, 6, generator=r), torch.eye(4)[[0, 2]]
        same(exe.run([x, logits])[0], run(graph, [x, logits])[0], 1e-5)
        with pytest.raises(CompileError, match=r"there are 3 experts|expert ids must be in 0 … 2"):
            exe.run([x, torch.eye(4)[[0, 3]]])


@every_setup
@limited()
def test_a_replica_table_that_names_no_expert(setup):
    r = torch.Generator().manual_seed(6)
    gu, dn = torch.randn(3, 8, 6, generator=r), torch.randn(3, 6, 4, generator=r)
    for table, good in (([[0], [2]], True), ([[0], [3]], False), ([[0], [-1]], False)):

        def build(b: Any, x: Any, logits: Any, table: Any = table) -> Any:
            w, i = b.route(logits, k=1)
            slots = b.remap(i, weight(b, "table", torch.tensor(table)), weight(b, "count", torch.ones(2).long()))
            return b.experts(x, w, slots, weight(b, "gu", gu), weight(b, "dn", dn))

        graph = graph_of({"x": TensorType(DType.F32, (Dim("T"), 6)), "l": TensorType(DType.F32, (Dim("T"), 2))}, build)
        with no_worker_left():
            exe = compiled(setup, graph)
            given = [torch.randn(2, 6, generator=r), torch.eye(2)]
            if good:
                same(exe.run(given)[0], run(graph, given)[0], 1e-5)
            else:
                with pytest.raises(CompileError, match=r"there are 3 experts|expert ids must be in 0 … 2"):
                    exe.run(given)


def strange(kind: str, model: nn.Module) -> nn.Module:
    """The same numbers in another place of memory."""
    for name, p in list(model.named_parameters()):
        data = p.detach()
        match kind:
            case "transposed":
                data = data.transpose(-1, -2).contiguous().transpose(-1, -2)
            case "slice of a larger tensor":
                whole = torch.full((*data.shape[:-1], 1000), NAN)
                whole[..., 500 : 500 + data.shape[-1]] = data
                data = whole[..., 500 : 500 + data.shape[-1]]
            case "every other element":
                data = torch.stack([data, torch.full_like(data, NAN)], -1)[..., 0]
            case "subclass":
                data = data.as_subclass(Marked)
        setattr(model, name, nn.Parameter(data, requires_grad=kind != "frozen"))
    return model


class Marked(torch.Tensor):
    """A subclass that adds nothing."""


@pytest.mark.parametrize("quantize", MODES)
@every_backend
@limited(seconds=60)
def test_weights_wherever_they_lie(backend, quantize, tmp_path):
    """Views, slices, strides and subclasses compute, and are saved, as plain weights are, to the bit."""
    with no_worker_left():
        x = tokens()
        plain = compile_layer(Layer(), backend, quantize)
        plain.save(tmp_path / "plain")
        want = plain(x)
        size = (tmp_path / "plain" / "weights.safetensors").stat().st_size
        for kind in ("transposed", "slice of a larger tensor", "every other element", "subclass", "frozen"):
            c = compile_layer(strange(kind, Layer()), backend, quantize)
            assert torch.equal(c(x), want), kind
            assert not c(x).requires_grad
            folder = tmp_path / kind.replace(" ", "_")
            c.save(folder)
            assert (folder / "weights.safetensors").stat().st_size == size
            assert torch.equal(moec.load(folder)(x), want), kind


@pytest.mark.parametrize("quantize", MODES)
@every_backend
@limited(seconds=60)
def test_weights_of_every_float(backend, quantize):
    """f64, bf16 and f16 weights: what the reference computes, to the dtype's rounding, or a refusal by name."""
    with no_worker_left():
        for dtype, rtol in ((torch.float64, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            model, x = Layer(dtype), tokens(8, dtype)
            reference = compile_layer(model, "reference", quantize)
            (route,) = reference.graph.find("moe.route")
            pinned: dict[Any, torch.Tensor] = {}
            run(reference.graph, [x[:4]], tap=lambda v, t, seen=pinned: seen.update({v: t}))
            want = reference(x[:4])
            assert want.dtype == dtype
            if backend == "triton" and dtype == torch.float64:
                with pytest.raises(CompileError, match=r"cannot run on triton: the [\w.]+ kernel takes .*got f64"):
                    compile_layer(model, backend, quantize)
                continue
            got = compile_layer(model, backend, quantize)(x[:4])
            logits = pinned[route.operand("logits")].sort(-1).values
            clear = (logits[:, -K] - logits[:, -K - 1]) > 0.05  # the same experts whatever rounding did
            assert clear.any()
            if quantize == "fp8":  # a code may differ by one step of a sixteenth
                rtol = max(rtol, 0.1)
            same(got[clear], want[clear], rtol, f"{dtype}, {quantize}")


@pytest.mark.parametrize("quantize", MODES)
@every_backend
@limited()
def test_weights_without_data(backend, quantize, tmp_path):
    """On the meta device a model compiles as far as no byte is needed; then the weight is named."""
    with no_worker_left():
        model = Layer().to("meta")
        example = (torch.zeros(4, D, device="meta"),)
        with pytest.raises(CompileError, match=r"weight '\w+(\.\w+)*' (has no data|is a meta tensor)") as caught:
            compile_on_meta(model, example, backend, quantize, tmp_path / "saved")
        assert caught.value.code == "weight"
        assert not (tmp_path / "saved").exists()


def compile_on_meta(model: nn.Module, example: Any, backend: str, quantize: Any, folder: Path) -> None:
    c = moec.compile(model, example, backend=backend, quantize=quantize, threads=1)
    c.save(folder)


class Tied(nn.Module):
    """One parameter under two names and in two layers, and a copy with equal numbers under a third."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D, bias=False)
        self.second = nn.Linear(D, D, bias=False)
        self.second.weight = self.first.weight
        self.third = nn.Linear(D, D, bias=False)
        with torch.no_grad():
            self.third.weight.copy_(self.first.weight)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x))))) + self.first(x)


@pytest.mark.parametrize("quantize", MODES)
@every_backend
@limited(seconds=60)
def test_tied_and_equal_weights(backend, quantize, tmp_path):
    """They compute as separate copies do, and are stored once."""
    with no_worker_left():
        torch.manual_seed(0)
        tied, x = Tied().eval(), tokens()
        apart = Tied().eval()
        apart.load_state_dict(tied.state_dict())
        apart.second.weight = nn.Parameter(tied.first.weight.detach().clone())
        c = moec.compile(tied, (x,), backend=backend, quantize=quantize, threads=1)
        want = moec.compile(apart, (x,), backend=backend, quantize=quantize, threads=1)(x)
        same(c(x), want, 1e-6)
        c.save(tmp_path / "tied")
        same(moec.load(tmp_path / "tied")(x), want, 1e-6)
        stored = (tmp_path / "tied" / "weights.safetensors").stat().st_size
        assert stored < 1.5 * D * D * (4 if quantize is None else 1) + 1500


@limited()
def test_folds_that_overflow_are_an_error():
    """A product of weights that their dtype cannot hold is refused; unfused, the model computes."""
    norm, w = torch.full((8,), 1e30), torch.full((4, 8), 1e20)

    def build(b: Any, x: Any) -> Any:
        return b.linear(b.rms(x, weight(b, "norm", norm)), weight(b, "w", w))

    graph = graph_of({"x": TensorType(DType.F32, (Dim("T"), 8))}, build)
    (folded, _) = run_pass(FoldNormWeight(), graph)
    assert "w.normed" in folded.weights
    with pytest.raises(CompileError, match=r"weight 'w' times the norm's weight 'norm' overflows f32 in 32 elements"):
        run(folded, [torch.ones(1, 8)])
    graph = graph_of(
        {"x": TensorType(DType.F32, (Dim("T"), 8))}, lambda b, x: b.mul(b.linear(x, weight(b, "w", w)), 1e30)
    )
    (folded, _) = run_pass(FoldScales(), graph)
    with pytest.raises(CompileError, match=r"weight 'w' times 1e\+30 overflows f32"):
        run(folded, [torch.ones(1, 8)])
    assert run(graph, [torch.full((1, 8), 1e-30)])[0].isfinite().all()
    # what is not finite before the fold stays so, and is no overflow
    wrong = torch.full((4, 8), INF)
    graph = graph_of(
        {"x": TensorType(DType.F32, (Dim("T"), 8))}, lambda b, x: b.mul(b.linear(x, weight(b, "w", wrong)), 2.0)
    )
    (folded, _) = run_pass(FoldScales(), graph)
    assert run(folded, [torch.ones(1, 8)])[0].isinf().all()
