"""Manifests that are no JSON, are too long, were changed, or name code."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import sys

import pytest
import torch

import moec
from moec.ir import ArtifactError, CompileError
from moec.manifest import MANIFEST_LIMIT, manifest_digest

from .effects import harmless, refused
from .folders import saved, write
from .limits import limited


@limited()
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no JSON"), (b"\xff\xfe{}", "no JSON"), (b"[" * 1_000_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"null", "kind"), (b"[]", "kind"), (b"{}", "kind"),
        (b'{"kind": "moec", "kind": "moec"}', "'kind' twice"), (b'{"kind": "moec", "format": NaN}', "NaN is no number"),
        (b'{"kind": "moec", "format": -Infinity}', "no number"), (b'{"kind": "moec", "format": 1.0}', "an integer"),
        (b'{"kind": "moec", "format": true}', "an integer"),
        (b'{"kind": "moec", "format": ' + b"9" * 9999 + b"}", "no JSON"),
        (b'{"kind": "moec"}', "'format' is missing"), (b'{"kind": "moec", "format": 1}', "'sha256' is missing"),
        (b'{"kind": "moec", "format": 1, "sha256": "0"}', "sha256"), (pickle.dumps({"kind": "moec"}), "no JSON"),
        (b'{"kind": "moec"}\0', "no JSON"), (b'\xef\xbb\xbf{"kind": "moec"}', "no JSON"),
    ],
    ids=lambda v: "" if isinstance(v, str) else repr(v[:24]),
)  # fmt: skip
def test_manifests(text, said, tmp_path):
    saved(tmp_path / "saved", "reference")
    (tmp_path / "saved" / "manifest.json").write_bytes(text)
    with refused(said, ArtifactError):
        moec.load(tmp_path / "saved")


@limited()
@pytest.mark.parametrize("name", ["manifest.json", "forward.ir"])
def test_files_that_are_huge(name, tmp_path):
    """A sparse gigabyte is refused by its size, before it is read."""
    saved(tmp_path / "saved", "reference")
    with (tmp_path / "saved" / name).open("r+b") as f:
        f.truncate(1 << 30)
    if name != "manifest.json":
        data = json.loads((tmp_path / "saved" / "manifest.json").read_text())
        data["files"][name]["bytes"] = 1 << 30
        write(tmp_path / "saved", data)
    with refused("1073741824 bytes, more than", ArtifactError):
        moec.load(tmp_path / "saved")


@limited()
def test_a_manifest_as_long_as_it_may_be_stays_within_memory(tmp_path):
    saved(tmp_path / "saved", "reference")
    for filler in (b"[" + b"[]," * ((MANIFEST_LIMIT - 8) // 3) + b"[]]", b'"' + b"a" * (15 << 20) + b'"'):
        (tmp_path / "saved" / "manifest.json").write_bytes(filler[:MANIFEST_LIMIT])
        with refused("kind|no JSON", ArtifactError):
            moec.load(tmp_path / "saved")


def mutate(value: object, r: random.Random) -> object:
    """The same JSON with one thing changed somewhere."""
    strange = [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, "", "x", "../x", "\0", "\ud800", [], {}, [[]],
        {"": {}}, "forward", "os.system", [None] * 9, "9" * 99,
    ]  # fmt: skip
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(sorted(value))
        what = r.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.15:
            return {**value, r.choice(["x", "", "../x", "format"]): r.choice(strange)}
        return {**value, key: mutate(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.85:
        i = r.randrange(len(value))
        what = r.random()
        if what < 0.1:
            return value[:i] + value[i + 1 :]
        if what < 0.2:
            return [*value, value[i]]
        return [*value[:i], mutate(value[i], r), *value[i + 1 :]]
    if isinstance(value, str) and value.startswith(("{", "[")) and r.random() < 0.7:
        with contextlib.suppress(ValueError):
            return json.dumps(mutate(json.loads(value), r))
    return r.choice(strange)


class Nested(torch.nn.Module):
    """Arguments and results of every container that a signature keeps."""

    def forward(self, x, more, *, scale=2.0):
        return {"y": x * scale + more["a"][0], "rest": [more["a"][1], (x.shape[0], None)]}


@limited(seconds=100)
@pytest.mark.parametrize("signed", [True, False])
def test_manifests_with_anything_changed(signed, tmp_path):
    """Hundreds of random changes, by accident and by someone who signs them: an ArtifactError, or a model. Unsigned it
    computes the same; signed, it runs or says why not."""
    folder = tmp_path / "saved"
    x = torch.ones(2, 3)
    args, kwargs = (x, {"a": (x, x + 1)}), {"scale": 3.0}
    compiled = moec.compile(Nested(), args, kwargs, backend="reference")
    compiled.save(folder)
    want = compiled(*args, **kwargs)
    original = (folder / "manifest.json").read_text()
    r = random.Random(7)
    loads, said = 0, set()
    for _ in range(400):
        data = mutate(json.loads(original), r)
        if signed and isinstance(data, dict):
            data["sha256"] = manifest_digest(data)
        (folder / "manifest.json").write_text(json.dumps(data))
        try:
            with harmless():
                loaded = moec.load(folder)
        except ArtifactError as e:
            said.add(str(e))
            continue
        loads += 1
        if signed:
            with contextlib.suppress(CompileError):
                loaded(*args, **kwargs)
        else:
            got = loaded(*args, **kwargs)
            assert torch.equal(got["y"], want["y"])
            assert torch.equal(got["rest"][0], want["rest"][0])
            assert got["rest"][1] == want["rest"][1]
    assert loads > 3 or not signed
    assert all(str(folder) in text and len(text) < 4000 for text in said)


CANARY = """
import pathlib
pathlib.Path(__file__).with_name("executed").write_text("yes")
class Evil: pass
factory = lambda: None
"""


@limited()
def test_a_signature_cannot_name_code_to_run(tmp_path):
    """pytree's own reader imports the modules of enumerations and of a defaultdict's factory."""
    folder = tmp_path / "saved"
    saved(folder, "reference")
    (tmp_path / "canary_of_moec.py").write_text(CANARY)
    (tmp_path / "transformers").mkdir()
    sys.path.insert(0, str(tmp_path))
    leaf = {"type": None, "context": None, "children_spec": []}
    enum = json.dumps([{"__enum__": True, "fqn": "canary_of_moec:Evil", "name": "x"}])
    factory = {"default_factory_module": "canary_of_moec", "default_factory_name": "factory", "dict_context": ["a"]}
    system = {**factory, "default_factory_module": "os", "default_factory_name": "system"}
    for kind, context in (
        ("collections.defaultdict", factory), ("collections.defaultdict", system), ("builtins.dict", enum),
        ("collections.OrderedDict", enum), ("collections.deque", enum[1:-1]), ("builtins.list", enum),
        ("canary_of_moec.Evil", "null"), ("os.system", "null"), ("transformers.canary.Evil", "null"),
        ("transformers.models.canary_of_moec.modeling_x.Evil", "null"),
        ("collections.namedtuple", "canary_of_moec.Evil"),
    ):  # fmt: skip
        for spec in ("in_spec", "out_spec"):
            data = json.loads((folder / "manifest.json").read_text())
            node = {"type": kind, "context": context, "children_spec": [leaf]}
            good = data["signature"][spec]
            data["signature"][spec] = [1, {"type": "builtins.tuple", "context": "null", "children_spec": [node, leaf]}]
            write(folder, data)
            with refused("signature", ArtifactError):
                moec.load(folder)
            data["signature"][spec] = good
            write(folder, data)
    assert "canary_of_moec" not in sys.modules
    assert not (tmp_path / "executed").exists()
    moec.load(folder)
