"""Result structures (pytrees) as JSON, and back without running anything but a known library's import."""

from __future__ import annotations

import importlib
import json
from typing import Any

from torch.utils import _pytree as pytree

from moec.files import Manifest
from moec.ir import ArtifactError, CompileError

_BUILTIN = ("builtins.", "collections.")
_LIBRARIES = ("transformers.", "torch.")  # their import registers their output classes


def dump_structure(spec: pytree.TreeSpec) -> str:
    """JSON of a structure. Raises CompileError where torch cannot serialise one of its types."""
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, ValueError, TypeError) as e:
        raise CompileError(
            f"the result structure {spec} cannot be saved: {e}",
            code="structure",
            hint="return tensors in tuples, lists, dicts, or a pytree type registered with a serialised name",
        ) from None


def load_structure(text: str, manifest: Manifest) -> pytree.TreeSpec:
    """A structure from JSON. Types of transformers are imported; any other type must be registered already."""
    try:
        for name in _types(json.loads(text)[1]):
            if name.startswith(_LIBRARIES):
                importlib.import_module(name.rpartition(".")[0])
        return pytree.treespec_loads(text)
    except ImportError as e:
        raise ArtifactError(
            f"{manifest.path}: field 'signature.result' needs {e.name or e}, which is not installed", code="artifact"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, NotImplementedError, RecursionError) as e:
        raise ArtifactError(
            f"{manifest.path}: field 'signature.result' is no structure known here: {e}",
            code="artifact",
            hint="import what registers the result's types before moec.load",
        ) from None


def _types(node: Any) -> set[str]:
    names = {node["type"]} if isinstance(node["type"], str) and not node["type"].startswith(_BUILTIN) else set()
    return names.union(*(_types(child) for child in node["children_spec"]))
