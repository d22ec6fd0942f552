"""Small models as transformers' own ONNX exporter writes them: they mean what ONNX Runtime makes of the file, router
and experts are found as they are in a traced model."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import transformers
from transformers.exporters import OnnxExporter
from transformers.exporters.configs import OnnxConfig

import moec
from moec.frontend.onnx import import_onnx

from .builders import assert_same, session

COMMON: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_hidden_layers": 1, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "n_group": 3, "topk_group": 2, "n_routed_experts": 6, "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
# the config, whether it gives its cache, fusions into ONNX Runtime's own operators
FORMS: dict[str, tuple[Any, bool, str | None]] = {
    "mixtral": (transformers.MixtralConfig(**COMMON, num_local_experts=6), False, None),
    "mixtral with a cache, fused": (transformers.MixtralConfig(**COMMON, num_local_experts=6), True, "cpu"),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(**COMMON, num_experts=6, head_dim=16, norm_topk_prob=True), False, None,
    ),
    "deepseek_v3": (transformers.DeepseekV3Config(**COMMON | LATENT), True, None),
}  # fmt: skip


def exported(config: Any, cache: bool, fusions: str | None) -> onnx_ir.Model:
    torch.manual_seed(0)
    config.use_cache = cache
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(torch.randn_like(p) * 0.15)
    ids = torch.randint(0, 29, (2, 7))
    logging.disable(logging.WARNING)  # the exporter's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return OnnxExporter().export(hf, given, config=OnnxConfig(dynamic=True, ort_fusions=fusions)).program
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", FORMS)
def test_exported_by_transformers(name, tmp_path):
    onnx_ir.save(exported(*FORMS[name]), tmp_path / "model.onnx", external_data="model.onnx.data")
    imported = import_onnx(tmp_path / "model.onnx")
    assert not imported.extern
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(tmp_path / "model.onnx", backend=backend)
        counts = compiled.graph.count_ops()
        assert (counts["moe.route"], counts["moe.experts"]) == (1, 1)
        for b, s in ((2, 7), (1, 1), (3, 12)):
            ids = np.random.default_rng(b).integers(0, 29, (b, s))
            mask = np.ones_like(ids)
            mask[0, : s // 3] = 0
            feeds = {"input_ids": ids, "attention_mask": mask}
            want = session(tmp_path / "model.onnx", feeds)
            assert_same(compiled(**{n: torch.from_numpy(a) for n, a in feeds.items()}), want, f"[{b}, {s}]", 1e-4)
