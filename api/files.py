"""Reading a saved folder without trusting it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moec.ir import ArtifactError

MANIFEST_LIMIT = 256 << 20  # bytes; a manifest is text about files and structure


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


def read_manifest(path: Path) -> Manifest:
    """Read and check the head of a manifest. Raises ArtifactError."""
    from moec.artifact import FORMAT

    regular_file(path.parent, path.name)
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes, more than any manifest", code="artifact")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} is no JSON: {e}", code="artifact") from None
    if not isinstance(data, dict) or data.get("kind") != "moec":
        raise ArtifactError(f"{path} is not the manifest of a saved model: field 'kind' is not 'moec'", code="artifact")
    manifest = Manifest(path, data)
    if manifest.integer("format") != FORMAT:
        raise manifest.bad("format", f"{FORMAT}", data["format"])
    return manifest


def regular_file(root: Path, name: str) -> Path:
    """A file inside `root` by its relative name. Raises ArtifactError for a path that leads out (`..`, absolute), a
    symbolic or hard link, or anything that is no regular file."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or Path(name).is_absolute():
        raise ArtifactError(f"{root}: file name {name!r} leads out of the folder", code="artifact")
    path = root
    for i, part in enumerate(parts):
        path = path / part
        try:
            info = os.lstat(path)
        except (OSError, ValueError) as e:
            raise ArtifactError(f"{path} is missing ({e})", code="artifact") from None
        wanted = stat.S_ISREG if i == len(parts) - 1 else stat.S_ISDIR
        if not wanted(info.st_mode):
            raise ArtifactError(
                f"{path} must be a {'file' if wanted is stat.S_ISREG else 'folder'}, not a link or anything else",
                code="artifact",
            )
        if wanted is stat.S_ISREG and info.st_nlink > 1:
            raise ArtifactError(f"{path} is a hard link", code="artifact")
    return path


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
