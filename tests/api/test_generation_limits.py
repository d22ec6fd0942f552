"""Generation keeps to the sizes that the cached program holds for."""

from __future__ import annotations

import json

import pytest
import torch

import moec
from moec.ir import ArgumentValueError, ArtifactError
from moec.manifest import manifest_digest

from .samples import TinyLM, greedy

PROMPT = torch.tensor([[3, 9, 27, 1, 4, 12]])


class Switching(TinyLM):
    """Computes something else for more than 12 tokens."""

    def forward(self, input_ids, attention_mask=None, past=None):
        result = super().forward(input_ids, attention_mask, past)
        length = input_ids.shape[1] + (0 if past is None else past["k"].shape[1])
        if length <= 12:
            return result
        return (-result[0], result[1]) if past is not None else -result


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Switching().eval()


def check(compiled, model):
    got = compiled.generate(PROMPT, max_new_tokens=7)  # the last step is the twelfth token's
    assert got[0, 6:].tolist() == greedy(model, PROMPT[0], 7)
    told = []
    with pytest.raises(ArgumentValueError, match=r"P \+ S <= 12, got P = 12, S = 1"):
        compiled.generate(PROMPT, max_new_tokens=8, on_token=told.append)
    assert not told  # before the first step
    with pytest.raises(ArgumentValueError, match="dimension S is 13; the program holds for at most 12"):
        compiled.generate(torch.arange(13)[None], max_new_tokens=1)


def test_a_step_past_a_branch_is_refused(model, tmp_path):
    compiled = moec.compile(model, backend="onnxruntime", threads=1)
    check(compiled, model)
    compiled.save(tmp_path / "saved")
    check(moec.load(tmp_path / "saved"), model)
    path = tmp_path / "saved" / "manifest.json"
    data = json.loads(path.read_text())
    data["programs"]["cached"]["limits"]["conditions"] = ["P + S <"]
    data["sha256"] = manifest_digest(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"programs.cached.limits: field .conditions. is missing or malformed"):
        moec.load(tmp_path / "saved")
