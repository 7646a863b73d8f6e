"""The package as a whole: its names, its weight, its metadata, what it must not import."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import one2345pp


tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "one2345pp").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light(fresh_python):
    """The top-level import, the command line's parser and the checkpoint's path pull in nothing heavy and take no time."""
    code = """
import json, sys, time
start = time.process_time()
import one2345pp, one2345pp.cli, one2345pp.checkpoints, one2345pp.commands, one2345pp.outputs
one2345pp.cli.build_parser()
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    seconds, modules = json.loads(fresh_python(code))
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "trimesh", "scipy", "huggingface_hub"}
    assert not heavy & set(modules)
    assert seconds < 0.5


@pytest.mark.parametrize("name", one2345pp.__all__)
def test_every_public_name_resolves(name):
    """Each name of `__all__` is what its module calls so, and `dir` shows it."""
    value = getattr(one2345pp, name)
    assert name in dir(one2345pp)
    if isinstance(value, type):
        assert value.__name__ == name
        assert value.__module__ == f"one2345pp.{one2345pp.MODULE_OF[name]}"


def test_unknown_name_is_an_attribute_error():
    """So that hasattr, pickle and the import statement behave."""
    with pytest.raises(AttributeError, match="Nothing"):
        one2345pp.Nothing  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "one2345pp")))
def test_module_keeps_the_house_rules(path):
    """A docstring at the head, no torchvision, no print, no environment variables, no imports against the architecture."""
    source = path.read_text()
    if not source.strip():
        return
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no docstring at the head"
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", "print belongs to nobody here"
    assert not any("torchvision" in name for name in imported)
    assert "os.environ" not in source and "getenv" not in source
    room = path.relative_to(ROOT / "src" / "one2345pp").parts[0]
    forbidden = {
        "geometry": ("pipelines", "models", "schedulers", "training", "data", "evaluation"),
        "models": ("pipelines", "training", "data", "evaluation"),
        "schedulers": ("pipelines", "models", "training", "data", "geometry"),
        "pipelines": ("training", "data", "evaluation"),
        "evaluation": ("pipelines", "models", "training"),
        "data": ("pipelines", "models", "training", "evaluation"),
    }.get(room, ())
    for name in imported:
        parts = re.split(r"\.+", name)
        own = name.startswith("..") or name.startswith("one2345pp")
        assert not (own and set(parts) & {*forbidden, "cli"}), f"{room} must not import {name}"


@pytest.mark.parametrize(
    "name", [name for name, module in one2345pp.MODULE_OF.items() if module.startswith(("models", "sched"))]
)
def test_component_module_shows_diffusers_its_base_class(name):
    """diffusers looks for ModelMixin or SchedulerMixin in the module that model_index.json names; without it, nothing loads."""
    import diffusers

    component = getattr(one2345pp, name)
    bases = [base for base in ("ModelMixin", "SchedulerMixin") if issubclass(component, getattr(diffusers, base))]
    module = importlib.import_module(component.__module__)
    for base in bases:
        assert getattr(module, base) is getattr(diffusers, base)


def test_version_has_one_source():
    """The distribution takes its version from the package."""
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", one2345pp.__version__)


def test_dependencies_cover_what_is_imported():
    """Every third-party top-level import outside a function is a core dependency."""
    names = {"mcubes": "pymcubes", "pil": "pillow", "fast_simplification": "fast-simplification"}
    declared = {re.split(r"[<>=\[]", line)[0].lower() for line in PROJECT["dependencies"]}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0].lower() for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                tops = {node.module.split(".")[0].lower()}
            else:
                continue
            for top in tops - {"one2345pp"}:
                assert top in {m.lower() for m in sys.stdlib_module_names} or names.get(top, top) in declared, (
                    path,
                    top,
                )


def test_default_checkpoint_is_in_the_package():
    """It is where the package data of pyproject.toml takes it from, and every kind of file in it is package data."""
    folder = one2345pp.default_checkpoint()
    assert folder == ROOT / "src" / "one2345pp" / "checkpoint"
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".py", ".md"}
