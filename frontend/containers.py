"""Result and argument classes of transformers, known to pytree."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

from torch.utils import _pytree as pytree

# modules whose import registers ModelOutput subclasses; nothing else of a saved signature is ever imported
CLASS_MODULES = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)")


def register_caches() -> None:
    """Let transformers register DynamicCache, where transformers is in use (it does so on request only)."""
    if "transformers.cache_utils" in sys.modules:
        importlib.import_module("transformers.integrations.executorch").register_dynamic_cache_export_support()


def import_classes(spec: Any) -> None:
    """Import the transformers classes that a serialised TreeSpec names, where transformers is installed."""
    for name in type_names(spec):
        module = name.rpartition(".")[0]
        if CLASS_MODULES.fullmatch(module):
            try:
                importlib.import_module(module)
            except ImportError:
                continue
    register_caches()


def type_names(spec: Any) -> set[str]:
    """The classes that a serialised TreeSpec names; empty where it is malformed."""
    names = set()
    left = [spec]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            if isinstance(node.get("type"), str):
                names.add(node["type"])
            left += node.values()
        elif isinstance(node, list):
            left += node
    return names


_DEEPEST = 64  # containers in containers; pytree is recursive
_FACTORIES = ("list", "dict", "set", "tuple", "int", "float", "str", "bool")


def check_spec(spec: Any) -> None:
    """Raise ValueError where torch's reader of TreeSpecs would run code that a file names (it imports the modules of
    enumerations and of a defaultdict's factory), or where a container does not fit its contents."""
    if not (isinstance(spec, list) and len(spec) == 2 and type(spec[0]) is int):
        raise ValueError("not a pair of version and structure")
    left = [(spec[1], 0)]
    while left:
        node, depth = left.pop()
        if depth > _DEEPEST:
            raise ValueError(f"containers are nested more than {_DEEPEST} deep")
        if not isinstance(node, dict) or node.keys() != {"type", "context", "children_spec"}:
            raise ValueError("a node is not type, context and children_spec")
        kind, context, children = node["type"], node["context"], node["children_spec"]
        if not isinstance(children, list):
            raise ValueError("children_spec is no list")
        if kind is None:
            if context is not None or children:
                raise ValueError("a leaf has contents")
        elif not isinstance(kind, str) or kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise ValueError(f"containers of type {kind!r} are not known")
        elif kind == "collections.defaultdict":
            _check_factory(context)
            _check_context(kind, context["dict_context"], len(children))
        elif isinstance(context, str):
            _check_context(kind, json.loads(context, object_hook=_no_enum), len(children))
        elif "__enum__" in repr(context):
            raise ValueError("an enumeration")
        left += [(child, depth + 1) for child in children]


def _check_factory(context: Any) -> None:
    fields = {"default_factory_module", "default_factory_name", "dict_context"}
    if not isinstance(context, dict) or context.keys() != fields:
        raise ValueError(f"a defaultdict has {sorted(fields)}")
    module, name = context["default_factory_module"], context["default_factory_name"]
    if module != "builtins" or name not in _FACTORIES:
        raise ValueError(f"a defaultdict of {module}.{name}, known are {', '.join(_FACTORIES)}")


def _check_context(kind: str, context: Any, children: int) -> None:
    """That a container of Python's has contents of the right number."""
    if kind in ("builtins.tuple", "builtins.list") and context is not None:
        raise ValueError(f"{kind} with keys")
    if kind in ("builtins.dict", "collections.OrderedDict", "collections.defaultdict"):
        keys = context if isinstance(context, list) else []
        if len({repr(k) for k in keys}) != children or any(isinstance(k, list | dict) for k in keys):
            raise ValueError(f"{kind} has {children} values and the keys {str(context)[:80]}")
    if kind == "collections.deque" and not (context is None or (type(context) is int and context >= children)):
        raise ValueError(f"a deque of {children} values with maxlen {context!r}")


def _no_enum(fields: dict[str, Any]) -> dict[str, Any]:
    if "__enum__" in fields:
        raise ValueError("an enumeration among the keys")
    return fields
