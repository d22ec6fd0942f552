"""The shipped checkpoint, its held-out text, and the figures that models/README.md quotes."""

import math
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from moec import models
from moec.models import bits_per_byte, expert_load, heldout_text, mtp_accept_rate, trained
from moec.models.checkpoint import WEIGHTS, save

README = Path(models.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def model():
    return trained()


def test_it_is_what_is_promised(model):
    c = model.config
    assert (c.vocab_size, c.num_experts, c.top_k, c.num_shared_experts, c.num_mtp_layers) == (256, 16, 4, 1, 1)
    assert c.is_mla
    assert c.scoring == "sigmoid"
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) <= 12e6
    for name, tensor in model.state_dict().items():
        if not name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, tensor.bfloat16().float()), name
        else:
            assert tensor.abs().max() > 0, "balancing left no trace"


def test_heldout_text():
    literature, code = heldout_text("literature"), heldout_text("code")
    assert len(literature) >= 65536
    assert len(code) >= 65536
    both = heldout_text()
    assert both[:4096] == literature[:4096]
    assert both[4096:8192] == code[:4096]
    assert both[8192:12288] == literature[4096:8192]
    assert len(both) == len(literature) + len(code)
    with pytest.raises(ValueError, match="'literature', 'code' or None"):
        heldout_text("poetry")


def quoted(pattern: str) -> float:
    found = re.search(pattern, README.read_text("utf-8"))
    assert found, f"models/README.md does not quote {pattern}"
    return float(found[1])


@pytest.mark.parametrize("domain", ["literature", "code"])
def test_bits_per_byte_of_the_readme(model, domain):
    """The README's figure is of the whole text; here its first 16 KiB, quoted beside it, are measured again."""
    whole = quoted(rf"\| {domain} \| ([\d.]+) \|")
    assert whole <= 2.4
    part = quoted(rf"\| {domain} \| [\d.]+ \| ([\d.]+) \|")
    assert bits_per_byte(model, heldout_text(domain)[:16384]) == pytest.approx(part, abs=2e-3)


def test_expert_load_of_the_readme(model):
    """Loads sum to one, differ by domain, and their max/mean is the README's."""
    loads = {d: expert_load(model, heldout_text(d)[:16384]) for d in ("literature", "code")}
    for domain, layers in loads.items():
        assert sorted(layers) == [1, 2, 3]
        for layer, load in layers.items():
            assert float(load.sum()) == pytest.approx(1)
            text = quoted(rf"\| {layer} \| {domain} \| ([\d.]+) \|")
            assert float(load.max() / load.mean()) == pytest.approx(text, abs=0.06)
    for layer in (1, 2, 3):
        distance = 0.5 * float((loads["literature"][layer] - loads["code"][layer]).abs().sum())
        assert distance > 0.1, "routing does not differ by domain"


def test_mtp_accept_rate_of_the_readme(model):
    text = heldout_text()[:16384]
    assert mtp_accept_rate(model, text) == pytest.approx(quoted(r"MTP accept rate[^|]*\| ([\d.]+) \|"), abs=0.03)


def test_trained_beats_an_untrained_twin(model):
    text = heldout_text("code")[:2048]
    assert bits_per_byte(models.build(model.config), text) > 7 > bits_per_byte(model, text)


def test_the_readme_example_runs():
    block = re.search(r"\n\n((?:    .*\n|\n)+)", README.read_text("utf-8"))
    assert block
    names: dict[str, object] = {}
    exec(textwrap.dedent(block[1]), names)
    assert names["logits"].shape == (1, 1, 256)
    assert names["past"][0][0].shape[2] == 65


def test_save_and_load_again(model, tmp_path):
    save(model, tmp_path)
    again = trained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        trained(tmp_path)
    shutil.copytree(WEIGHTS, tmp_path / "w")
    weights = tmp_path / "w" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        trained(tmp_path / "w")
    weights.write_bytes(whole)
    config = tmp_path / "w" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"num_experts": 16', '"num_experts": 32'), "utf-8")
    with pytest.raises(ValueError, match="damaged"):
        trained(tmp_path / "w")


def test_bits_per_byte_of_known_models():
    """Uniform logits cost 8 bits, a perfect predictor costs none; each byte but a window's first counts once."""
    text = bytes(range(200)) * 5
    assert bits_per_byte(lambda ids: torch.zeros(*ids.shape, 256), text, window=64) == pytest.approx(8)

    seen = []

    def oracle(ids):
        seen.append(ids.shape)
        return torch.nn.functional.one_hot((ids + 1) % 200, 256).float() * 1000

    assert bits_per_byte(oracle, text, window=64, batch=4) == pytest.approx(0, abs=1e-6)
    assert seen == [(4, 64), (4, 64), (4, 64), (3, 64), (1, 40)]
    skewed = torch.zeros(256)
    skewed[0] = math.log(255.0)  # p(0) = 1/2
    assert bits_per_byte(lambda ids: skewed.expand(*ids.shape, 256), bytes(100)) == pytest.approx(1, abs=1e-5)
    for bad in (b"", b"a"):
        with pytest.raises(ValueError, match="need at least 2"):
            bits_per_byte(oracle, bad)
    with pytest.raises(ValueError, match="window is 1"):
        bits_per_byte(oracle, text, window=1)
    with pytest.raises(ValueError, match="fn gave logits"):
        bits_per_byte(lambda ids: torch.zeros(*ids.shape[:1], 256), text)


def test_expert_load_counts_every_token_and_leaves_no_hooks():
    model = models.build("deepseek-v3-mini")
    load = expert_load(model, bytes(range(100)), window=32)
    assert sorted(load) == [1, 2]
    assert not any(m._forward_hooks for m in model.modules())
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[torch.tensor([0, 1, 8, 9])] = 50.0
    skewed = expert_load(model, bytes(range(100)), window=32)[1]
    assert torch.equal(skewed.nonzero().flatten(), torch.tensor([0, 1, 8, 9]))
    assert float(skewed[0]) == 0.25


def test_split_is_deterministic_and_keeps_heldout_out():
    from moec.models.data import HELDOUT_BYTES, split

    texts = {f"{i}.py": bytes([65 + i % 26]) * 9000 + str(i).encode() for i in range(60)}
    train, held = split(texts)
    assert split(dict(reversed(texts.items()))) == (train, held)
    assert len(held) == HELDOUT_BYTES
    assert len(train) == 60 - math.ceil(HELDOUT_BYTES / 9003)
    for text in train:
        assert text not in held
    train, held = split({"small": b"ab", "big": b"c" * 5000}, largest=100)
    assert train == [b"c" * 5000]
    assert held == b"ab\n"
