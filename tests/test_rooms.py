"""The rooms: imports point one way, and nothing in selfplay knows which modality it serves."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spin_diffusion"
BELOW = {
    "store": set(),
    "data": {"store"},
    "samples": {"store", "data"},
    "selfplay": {"store", "samples"},
    "evaluation": {"store", "data", "samples", "selfplay"},
    "llm": {"store", "data", "samples", "selfplay", "evaluation"},
    "diffusion": {"store", "data", "samples", "selfplay", "evaluation"},
    "runs": {"store", "data", "samples", "selfplay", "evaluation", "llm", "diffusion"},
    "comparing": {"store", "data", "samples", "selfplay", "evaluation", "llm", "diffusion", "runs"},
    "cli": {"store", "data", "samples", "selfplay", "evaluation", "llm", "diffusion", "runs", "comparing"},
}
"""Room -> the rooms that it may import."""
DEEPEST = 12
"""Modules in the longest chain of imports."""


@cache
def imports() -> dict[str, set[str]]:
    """Every module of the package -> the modules of the package that it imports, also inside of functions."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {one if one in paths else node.module for one in full} & set(paths)
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & set(paths)
        found[name] -= {name}
    return found


def test_every_module_is_in_a_room():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room):
    for module, imported in imports().items():
        if module.split(".")[1:2] == [room]:
            climbs = {one for one in imported if one.count(".") and one.split(".")[1] not in BELOW[room] | {room}}
            assert not climbs, f"{module} imports {sorted(climbs)}"


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that begins at `module`, which must be part of no circle."""
    return (module, *max((chain(one) for one in imports()[module]), key=len, default=()))


def test_no_circle_of_imports():
    TopologicalSorter(imports()).prepare()


def test_no_chain_of_imports_is_too_long():
    longest = max((chain(module) for module in imports()), key=len)
    assert len(longest) <= DEEPEST, " > ".join(longest)


def test_no_line_of_selfplay_names_a_modality():
    for path in (PACKAGE / "selfplay").rglob("*.py"):
        code = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(code) if isinstance(node, ast.Attribute)}
        for word in ("unet", "vae", "image", "tokenizer", "pixel", "latent", "timestep", "language", "prompt_ids"):
            assert not [name for name in names if word in name.lower()], (path, word)


def test_no_family_is_named_outside_its_room():
    for path in PACKAGE.rglob("*.py"):
        if "families" not in path.parts:
            code = ast.parse(path.read_text())
            names = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
            assert not {name for name in names if "StableDiffusion" in name}, path


def test_the_library_does_not_know_the_toy_world():
    for path in PACKAGE.rglob("*.py"):
        assert path.parent.name == "cli" or "toy" not in path.read_text().lower(), path  # `demo` plays it


SCRIPTS = sorted(path for folder in ("training", "evaluation") for path in (PACKAGE.parent / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_waits_for_none_of_the_libraries_that_do_the_work(script):
    """So the answer to a misspelt flag does not either."""
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert "usage: " in asked.stdout and "--output" in asked.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in asked.stderr.splitlines()}
    assert "spin_diffusion" in loaded
    assert not {"torch", "diffusers", "transformers", "accelerate", "peft", "pyarrow", "datasets", "numpy"} & loaded


def test_the_walks_of_the_data_are_short_and_name_files_that_are_there():
    """docs/walk.md leads from a row to an optimizer step and from a prompt to the page, in at most 12 files each."""
    walks = (PACKAGE.parent / "docs" / "walk.md").read_text().split("\n## ")[1:]
    assert len(walks) == 2
    for walk in walks:
        files = [line.split("`")[1] for line in walk.splitlines() if line.startswith("| `")]
        assert 0 < len(files) <= 12
        for file in files + [name for name in re.findall(r"`(\w+/[\w/]+\.py)`", walk)]:
            assert (PACKAGE / file).exists(), file
