"""The README says what works: its commands parse, its Python runs, its links lead somewhere, and CI runs what a newcomer would."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from one2345pp.cli import build_parser


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") + blocks("bash", CONTRIBUTING) for line in block.splitlines() if line]
OURS = [
    part.strip() for line in COMMANDS for part in line.split("#")[0].split("&&") if part.strip().startswith("one2345pp")
]


def test_first_commands_install_run_and_test():
    """The first code block makes a mesh from a clean checkout, the second runs the tests; nothing comes before them."""
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first == (
        "pip install -c constraints.txt . && one2345pp generate examples/mushroom.png -o out.glb --preview out.png"
    )
    assert second == 'pip install -c constraints.txt ".[test]" && python -m pytest -n auto --dist loadfile'
    assert README.index(first) < README.index(second) < README.index("## ")


def test_ci_runs_the_readmes_commands():
    """`.ci/run` takes its commands from the README; its extraction gives exactly the first two blocks."""
    script = (ROOT / ".ci" / "run").read_text()
    extraction = re.search(r"^sed .*README\.md \| head -n 2", script, flags=re.MULTILINE).group()
    found = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [block.strip() for block in blocks("bash")[:2]]
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("command", OURS)
def test_command_parses(command):
    """Every command of ours that the texts show has arguments the parser takes; files of the project that it names exist."""
    words = shlex.split(command)
    build_parser().parse_args(words[1:])
    for word in words:
        if word.startswith(("examples/", "configs/")):
            assert (ROOT / word).is_file(), word


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def test_readme_links_every_page():
    for page in PAGES[2:]:
        assert f"]({page})" in README, page


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Pictures and files that are linked, or named in backticks with a folder, are there."""
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text) + re.findall(
        r"`((?:docs|configs|src|\.ci)/[\w./-]*)`", text
    )
    for target in targets:
        assert (ROOT / target).exists() or ((ROOT / name).parent / target).exists(), target


def test_python_runs(tiny_chain_folder, tmp_path, monkeypatch):
    """The Python blocks, in order, as one program; the default checkpoint is replaced by a tiny one to save time."""
    import one2345pp

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one2345pp, "default_checkpoint", lambda: tiny_chain_folder, raising=False)
    from conftest import build_multiview

    build_multiview().save_pretrained("zero123plus")
    program, names = "\n".join(blocks("python")).replace("sudo-ai/zero123plus-v1.2", "zero123plus"), {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["best"].vision_encoder.config.projection_dim == 12 and len(names["mesh"].faces)
    assert (tmp_path / "mug.glb").stat().st_size > 1000
    assert (tmp_path / "my-chain" / "pipeline.py").is_file()
