"""The families: traced, fused, run on reference and ONNX Runtime, and compared with eager at other shapes."""

import pytest
import torch

import moec
from moec import models
from moec.ir import run

SHAPES = [(1, 1), (1, 17), (3, 40), (5, 100)]
COUNTED_OUT = {"tensor.reshape", "tensor.transpose", "tensor.slice", "tensor.split", "tensor.constant"}


def randomise(model):
    """Weights of about unit gain: with the default 0.02 an error in a layer is lost in the residual."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and "inv_freq" not in name:
                scale = t.shape[-1] ** -0.5 if t.dim() > 1 else 0.3
                t.copy_(torch.randn(t.shape, generator=generator) * scale + (t.dim() == 1 and "norm" in name))
    return model.eval()


def mixtral(layers=2):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    return randomise(transformers.MixtralForCausalLM(config))


def deepseek_v3(layers=2):
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12,
        qk_nope_head_dim=8, n_shared_experts=1, use_cache=False,
    )  # fmt: skip
    return randomise(transformers.DeepseekV3ForCausalLM(config))


FAMILIES = {
    "transformers-mixtral": mixtral,
    "transformers-deepseek-v3": deepseek_v3,
    **{name: (lambda name=name: models.build(name).eval()) for name in models.CONFIGS if name.endswith("-mini")},
}


def ids(shape, seed=0):
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = FAMILIES[request.param]()
    graph = moec.trace(model, (ids((2, 24)),), dynamic_shapes="auto")
    return request.param, model, graph


@pytest.fixture(scope="module")
def compiled(family):
    return moec.compile(family[2], backend="onnxruntime", threads=1)


def logits(output):
    return getattr(output, "logits", output)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_eager_at_shapes_not_traced(family, compiled, shape):
    _, model, graph = family
    x = ids(shape, seed=sum(shape))
    with torch.no_grad():
        want = logits(model(x))
    assert want.std() > 0.1  # logits that say something
    torch.testing.assert_close(run(graph, [x])[0], want, rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled(x)[0], want, rtol=0, atol=1e-4)


def test_text_and_verifier(family, compiled):
    for graph in (family[2], compiled.graph):
        graph.verify()
        assert moec.parse(str(graph)) == graph


def test_experts_are_raised_and_layers_are_small(family, compiled):
    name, _, _ = family
    graph = compiled.graph
    moe_layers = len(graph.find("moe.route"))
    assert moe_layers == len(graph.find("moe.experts")) > 0
    for node in graph.find("moe.experts"):
        assert node.operand("gate_up").weight is not None  # stacked, not unrolled
    prefix = next(p for p in ("model.layers", "layers") if any(n.location.under(p) for n in graph.nodes))
    limit = 15 if "mixtral" in name else 17 if "qwen" in name else 25  # Qwen3 normalises queries and keys
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in COUNTED_OUT or not node.location.under(prefix):
            continue
        layer = node.location.frames[0].module.removeprefix(prefix + ".").split(".")[0]
        counts[layer] = counts.get(layer, 0) + 1
    assert counts
    assert max(counts.values()) <= limit, counts


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_static_shapes_fuse_alike(shape):
    model = models.build("deepseek-v3-mini").eval()
    c = moec.compile(model, (ids(shape),), backend="onnxruntime", threads=1)
    ops = c.graph.count_ops()
    assert ops["moe.route"] == ops["moe.experts"] == 2
    assert ops["rope.apply"] == 6
    with torch.no_grad():
        torch.testing.assert_close(c(ids(shape)), model(ids(shape)), rtol=0, atol=1e-4)


def test_fp8_stores_experts_in_fp8(family):
    _, _, graph = family
    c = moec.compile(graph, backend="reference", quantize=moec.Quantization(block=(16, 16), group=16))
    assert len(c.graph.find("quant.scaled_experts")) == len(c.graph.find("moe.route"))
    moec.parse(str(c.graph))
