"""com.microsoft's MoE, QMoE and MatMulNBits, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

import moec
from moec.frontend.onnx import import_onnx
from moec.ir import CompileError

from .builders import agrees, helper, model, session, value

RNG = np.random.default_rng(0)
E, D, F = 4, 32, 16
BACKENDS = ("reference", "onnxruntime")


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def one(op: str, operands: dict[str, np.ndarray | None], **attrs: Any) -> onnx.ModelProto:
    """x [T, d] and logits [T, E] are inputs, the operands behind them weights (None: absent)."""
    names = [n if a is not None else "" for n, a in operands.items()]
    node = helper.make_node(op, ["x", "logits", *names], ["y"], domain="com.microsoft", **attrs)
    weights = {n: a for n, a in operands.items() if a is not None}
    ins = [value("x", ["T", D]), value("logits", ["T", E])]
    return model([node], ins, [value("y", ["T", D])], weights, domains=["com.microsoft"])


def feeds(tokens: int = 7) -> dict[str, np.ndarray]:
    return {"x": floats(tokens, D), "logits": floats(tokens, E)}


MOE = {
    "interleaved": {"k": 2, "normalize_routing_weights": 1},
    "not normalised": {"k": 3},
    "clamped": {"k": 2, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.5},
    "alpha": {"k": 1, "activation_alpha": 1.5, "activation_beta": 0.5},
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", MOE)
def test_moe(name, biased):
    operands = {
        "fc1": floats(E, 2 * F, D) * 0.3,
        "bias1": floats(E, 2 * F) if biased else None,
        "fc2": floats(E, D, F) * 0.3,
        "bias2": floats(E, D) if biased else None,
    }
    if not biased:
        operands.popitem()
    proto = one("MoE", operands, activation_type="swiglu", swiglu_fusion=1, **MOE[name])
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        assert compiled.graph.count_ops()["moe.experts"] == 1
        for tokens in (7, 1):
            agrees(compiled, proto, feeds(tokens), 1e-4)


def test_gate_and_up_apart():
    """Kernels for GPUs only take fc3: the same as the two joined."""
    fc1, fc2, fc3 = floats(E, F, D) * 0.3, floats(E, D, F) * 0.3, floats(E, F, D) * 0.3
    apart = one("MoE", {"fc1": fc1, "b1": None, "fc2": fc2, "b2": None, "fc3": fc3}, activation_type="silu", k=2)
    fused = np.stack([fc1, fc3], 2).reshape(E, 2 * F, D)
    together = one("MoE", {"fc1": fused, "b1": None, "fc2": fc2}, activation_type="swiglu", swiglu_fusion=1, k=2)
    given = feeds()
    got = moec.compile(apart, backend="onnxruntime")(*(torch.from_numpy(a) for a in given.values()))[0].numpy()
    np.testing.assert_allclose(got, session(together, given)[0], rtol=1e-4, atol=1e-4)


def test_experts_without_a_gate_are_refused_by_name():
    proto = one("MoE", {"fc1": floats(E, F, D), "b1": None, "fc2": floats(E, D, F)}, activation_type="relu", k=2)
    with pytest.raises(CompileError, match=r"com.microsoft.MoE: activation 'relu', swiglu_fusion 0, without fc3"):
        import_onnx(proto)


def packed(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape[:-1], shape[-1] * bits // 8), np.uint8)


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_qmoe(bits, zero, block):
    def scales(n: int, width: int) -> np.ndarray:
        shape = (E, n, width // block) if block else (E, n)
        return (RNG.random(shape).astype(np.float32) + 0.5) * 0.3 / 2**bits

    def zeros(n: int, width: int) -> np.ndarray:
        middle = RNG.integers(2 ** (bits - 2), 3 * 2 ** (bits - 2), (E, n, width // block) if block else (E, n))
        pairs = middle.astype(np.uint8)
        if bits == 8:
            return pairs
        if pairs.shape[-1] % 2:
            pairs = np.concatenate([pairs, np.zeros_like(pairs[..., :1])], -1)
        return pairs[..., 0::2] | (pairs[..., 1::2] << 4)

    operands = {"fc1": packed((E, 2 * F, D), bits), "s1": scales(2 * F, D), "b1": None,
                "fc2": packed((E, D, F), bits), "s2": scales(D, F), "b2": None}  # fmt: skip
    if zero:
        operands |= {"fc3": None, "s3": None, "b3": None, "z1": zeros(2 * F, D), "z2": zeros(D, F)}
    attrs = {"block_size": block} if block else {}
    proto = one("QMoE", operands, activation_type="swiglu", swiglu_fusion=1, k=2, normalize_routing_weights=1,
                expert_weight_bits=bits, **attrs)  # fmt: skip
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        assert compiled.graph.count_ops()["moe.experts"] == 1
        # for blocks of 8 bits ONNX Runtime has no kernel that leaves activations as they are
        agrees(compiled, proto, feeds(), 1e-2 if bits == 8 and block else 1e-4)


def test_qmoe_weighs_by_other_values():
    """DeepSeek's routers: chosen with a bias, weighed without."""
    operands = {"fc1": packed((E, 2 * F, D), 8), "s1": np.full((E, 2 * F), 0.002, np.float32), "b1": None,
                "fc2": packed((E, D, F), 8), "s2": np.full((E, D), 0.002, np.float32), "b2": None,
                **dict.fromkeys(("fc3", "s3", "b3", "z1", "z2", "z3"))}  # fmt: skip
    proto = one("QMoE", operands, activation_type="swiglu", swiglu_fusion=1, k=2, expert_weight_bits=8,
                normalize_routing_weights=1)  # fmt: skip
    proto.graph.node[0].input.append("values")
    proto.graph.input.append(value("values", ["T", E]))
    for backend in BACKENDS:
        agrees(moec.compile(proto, backend=backend), proto, {**feeds(), "values": abs(floats(7, E)) + 0.1}, 1e-4)


@pytest.mark.parametrize(("bits", "zero"), [(4, ""), (8, ""), (4, "packed"), (8, "packed"), (4, "floats")])
def test_matmul_nbits(bits, zero):
    n, k, block = 6, 40, 16
    blocks = -(-k // block)
    weights: dict[str, np.ndarray] = {
        "codes": RNG.integers(0, 256, (n, blocks, block * bits // 8), np.uint8),
        "scales": (RNG.random(n * blocks).astype(np.float32) + 0.5) / 2**bits,
    }
    if zero == "packed":
        weights["zeros"] = RNG.integers(0, 256, n * -(-blocks * bits // 8), np.uint8)
    elif zero:
        weights["zeros"] = RNG.random(n * blocks).astype(np.float32) * 2**bits
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", bits=bits, K=k, N=n,
                            block_size=block)  # fmt: skip
    proto = model([node], [value("x", ["T", 3, k])], [value("y", ["T", 3, n])], weights, domains=["com.microsoft"])
    for backend in BACKENDS:
        compiled = moec.compile(proto, backend=backend)
        assert compiled.graph.count_ops() == {"linear.linear": 1}
        agrees(compiled, proto, {"x": floats(5, 3, k)}, 1e-4)
