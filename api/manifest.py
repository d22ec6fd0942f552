"""The manifest of a saved model: which files there are, and how its fields are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.files import Folder
from moec.ir import ArtifactError
from moec.ir.strict_json import strict_json

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"

MANIFEST_LIMIT = 16 << 20  # bytes; a manifest is text about files and structure


@dataclass(frozen=True)
class Manifest:
    """A manifest's JSON with typed access; every complaint names file and field."""

    path: Path
    data: dict[str, Any]

    def value(self, *keys: str) -> Any:
        """The value at a path of keys. Raises ArtifactError where it is missing."""
        at: Any = self.data
        for i, key in enumerate(keys):
            if not isinstance(at, dict):
                raise self.bad(".".join(keys[:i]), "an object", at)
            if key not in at:
                raise ArtifactError(f"{self.path}: field {'.'.join(keys[: i + 1])!r} is missing", code="artifact")
            at = at[key]
        return at

    def mapping(self, *keys: str) -> dict[str, Any]:
        return self._typed(dict, "an object", *keys)

    def text(self, *keys: str) -> str:
        return self._typed(str, "a string", *keys)

    def integer(self, *keys: str) -> int:
        return self._typed(int, "an integer", *keys)

    def _typed(self, kind: type, what: str, *keys: str) -> Any:
        value = self.value(*keys)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.bad(".".join(keys), what, value)
        return value

    def bad(self, field: str, expected: str, got: Any) -> ArtifactError:
        shown = repr(got)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return ArtifactError(f"{self.path}: field {field!r}: expected {expected}, got {shown}", code="artifact")


def read_manifest(folder: Folder, name: str) -> Manifest:
    """Read and check the head of a manifest. Raises ArtifactError."""
    path = folder.path / name
    try:
        data = strict_json(folder.read(name, MANIFEST_LIMIT))
    except ValueError as e:
        if isinstance(e, ArtifactError):
            raise
        raise ArtifactError(f"{path} is no JSON: {e}", code="artifact") from None
    if not isinstance(data, dict) or data.get("kind") != "moec":
        raise ArtifactError(f"{path} is not the manifest of a saved model: field 'kind' is not 'moec'", code="artifact")
    manifest = Manifest(path, data)
    if manifest.integer("format") != FORMAT:
        raise manifest.bad("format", f"{FORMAT}", data["format"])
    if manifest.text("sha256") != manifest_digest(data):
        raise manifest.bad("sha256", f"{manifest_digest(data)}, that of the other fields", data["sha256"])
    return manifest


def manifest_digest(data: dict[str, Any]) -> str:
    """SHA-256 over the fields of a manifest but `sha256`, however they are written."""
    fields = {k: v for k, v in data.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
