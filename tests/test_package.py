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
    """A docstring at the head, at most 400 lines, no torchvision, no print, no environment variables."""
    source = path.read_text()
    if not source.strip():
        return
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no docstring at the head"
    assert len(source.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any("torchvision" in alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert "torchvision" not in (node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", "print belongs to nobody here"
    assert "os.environ" not in source and "getenv" not in source


# --- rooms --------------------------------------------------------------------------------------------------------------

# The rooms of docs/architecture.md, from the ground up. A module imports what is below it, or beside it in its own room.
FLOORS = [
    ["errors", "names"],
    ["files", "checkpoints"],
    ["geometry"],
    ["schedulers", "models", "data", "evaluation"],
    [f"pipelines.{name}" for name in ("hub", "checks", "callbacks", "roles", "stages")],
    ["pipelines.picture"],
    ["pipelines.pipeline_output"],
    ["pipelines.multiview", "pipelines.volume", "pipelines.texture"],
    [f"pipelines.pipeline_{name}" for name in ("multiview_tile", "sparse_volume", "texture_refinement")],
    ["pipelines.chain"],
    ["pipelines.pipeline_one2345plusplus"],
    ["training", "conversion"],
    ["outputs", "loading"],
    ["commands"],
    ["cli"],
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src" / "one2345pp").with_suffix("").parts)


def room_of(module: str) -> tuple[int, str]:
    """Floor and name of the room that a module is in."""
    found = [
        (floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if f"{module}.".startswith(f"{room}.")
    ]
    assert len(found) == 1, f"{module} is in {len(found)} rooms: give it one in FLOORS and in docs/architecture.md"
    return found[0]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that one imports, inside functions and for type checkers, too."""
    modules, here = {module_of(other) for other in SOURCES}, module_of(path).split(".")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("one2345pp.")):
            base = here[: len(here) - node.level] if node.level else []
            base = base + (node.module or "").removeprefix("one2345pp.").split(".") if node.module else base
            names |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("one2345pp.") for alias in node.names}
    return names & modules


GRAPH = {
    module_of(path): imports_of(path)
    for path in SOURCES
    if path.name != "__init__.py" and "checkpoint" not in path.parts
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    """So that one picture enters each room once on its way: the rooms of the chain lie on the floors in the order of its steps."""
    floor, room = room_of(module)
    for other in GRAPH[module] - {"__init__"}:
        below, name = room_of(other)
        assert below < floor or name == room, f"{module} is on floor {floor} and imports {other}, on floor {below}"


def test_no_modules_import_each_other():
    """No circle anywhere, of any length."""
    left = {module: set(others) & set(GRAPH) for module, others in GRAPH.items()}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left


def test_one_picture_walks_through_the_rooms_once(tiny_chain, monkeypatch):
    """The way of a picture through a call, as docs/architecture.md draws it: cut out, drawn, reconstructed, painted, and no step
    entered again."""
    from PIL import Image

    from one2345pp.pipelines import pipeline_one2345plusplus as chain

    way = []
    steps = {
        "cut out": (chain, "isolate_object"),
        "draw": (chain.MultiViewTilePipeline, "draw"),
        "reconstruct": (chain.SparseVolumeDiffusionPipeline, "reconstruct"),
        "paint": (chain.TextureRefinementPipeline, "paint"),
    }
    for name, (owner, attribute) in steps.items():
        original = getattr(owner, attribute)

        def watched(*args, name=name, original=original, **kwargs):
            way.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, watched)
    picture = Image.new("RGBA", (32, 32))
    picture.paste((200, 30, 30, 255), (8, 8, 24, 24))
    tiny_chain(picture)
    assert way == list(steps)
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("## The way of one picture")[1].split("```")[1]
    assert [name for name in re.findall("|".join(steps), drawing)] == list(steps)


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
