"""The layout: who may import whom, what is packaged, and what `import moec` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"api": "moec", "ir": "moec.ir", "frontend": "moec.frontend", "passes": "moec.passes",
           "backends": "moec.backends", "models": "moec.models"}  # fmt: skip
# what each part may import of ours, besides itself; `api` may import everything
ALLOWED = {
    "ir": set(),
    "frontend": {"moec.ir"},
    "passes": {"moec.ir"},
    "backends": {"moec.ir"},
    "models": set(),
}
MODELS_MAY = {"torch", "safetensors"}  # third-party, besides the standard library


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "moec"}
    return found


def part_of(module: str) -> str | None:
    """The part of ours that a module belongs to, None for others' modules."""
    if module != "moec" and not module.startswith("moec."):
        return None
    parts = [m for m in FOLDERS.values() if m != "moec" and (module == m or module.startswith(m + "."))]
    return parts[0] if parts else "moec"


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_import_directions(folder):
    own = FOLDERS[folder]
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        for module in imports(path):
            part = part_of(module)
            if part is not None and part != own and part not in ALLOWED[folder] and module != "moec":
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_the_direction_check_sees_a_wrong_import():
    assert part_of("moec.passes.base") == "moec.passes"
    assert part_of("moec.compiler") == "moec"
    assert part_of("moecology") is None


def test_models_import_torch_only():
    wrong = []
    for path in (ROOT / "models").rglob("*.py"):
        for module in imports(path):
            top = module.split(".")[0]
            if top not in MODELS_MAY | {"moec"} and top not in sys.stdlib_module_names:
                wrong.append(f"{path.name} imports {module}")
    assert not wrong


def packages() -> dict[str, str]:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted(setup["package-dir"])
    return setup["package-dir"]


def test_every_package_is_listed():
    tree = {str(p.parent.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).rglob("__init__.py")}
    assert set(packages().values()) == tree


def test_package_names_follow_folders():
    for name, folder in packages().items():
        top, _, rest = folder.partition("/")
        assert name == ".".join([FOLDERS[top], *rest.split("/")] if rest else [FOLDERS[top]])


def test_no_python_file_outside_a_package():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_typelinks_show_the_installed_shape():
    links = ROOT / "typelinks" / "moec"
    expected = {p.name for p in (ROOT / "api").iterdir() if p.suffix == ".py" or p.name == "py.typed"}
    inner = {p.parent.name for p in (ROOT / "api").glob("*/__init__.py")}
    expected |= inner | set(FOLDERS) - {"api"}
    assert {p.name for p in links.iterdir() if not p.name.startswith("__pycache__")} == expected
    for link in links.iterdir():
        assert link.is_symlink(), link
        assert not link.readlink().is_absolute(), link
        target = ROOT / link.name if link.name in FOLDERS else ROOT / "api" / link.name
        assert link.resolve() == target.resolve()


def test_no_submodule_hides_a_public_function():
    code = "import moec, types; print([n for n in moec.__all__ if isinstance(getattr(moec, n), types.ModuleType)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['passes', 'testing']"
    names = {p.stem for p in (ROOT / "api").glob("*.py")}
    import moec

    assert names & set(moec.__all__) == {"testing"}


def test_import_is_light_and_leaves_the_environment_alone():
    code = """
import os, sys
before = dict(os.environ)
import moec
assert dict(os.environ) == before, "environment changed"
heavy = {"torch", "transformers", "onnxruntime", "onnx", "triton", "scipy"} & set(sys.modules)
assert not heavy, heavy
moec.compile, moec.Graph, moec.load
assert dict(os.environ) == before, "environment changed"
heavy = {"transformers", "onnxruntime", "triton"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_looks_up_no_source():
    """Where an op's class stands is parsed out of its file: too slow to do for all of them."""
    code = """
import inspect, torch
def refuse(cls): raise AssertionError(f"looked up at import: {cls}")
found, inspect.getsourcelines = inspect.getsourcelines, refuse
import moec
moec.compile, moec.Graph, moec.load
from moec.ir.opdef import lookup
inspect.getsourcelines = found
silu = lookup("math.silu")
assert inspect.getsourcelines(silu.cls)[1] == silu.line, (silu.file, silu.line)
assert silu.file.endswith("elementwise.py"), silu.file
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    import moec

    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        moec.compil  # noqa: B018
    assert set(moec.__all__) <= set(dir(moec))
