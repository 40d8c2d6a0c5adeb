"""The rooms: imports point one way, and nothing in selfplay knows which modality it serves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spin_diffusion"
FORBIDDEN = {
    "store": {"selfplay", "diffusion", "llm", "data", "evaluation", "config", "running", "evaluating", "publishing"},
    "selfplay": {"diffusion", "llm", "data", "evaluation", "config", "running", "evaluating", "publishing"},
    "data": {"diffusion", "llm", "selfplay", "evaluation", "config", "running", "evaluating", "publishing"},
    "evaluation": {"diffusion", "llm", "config", "running", "evaluating", "publishing"},
    "diffusion": {"llm"},
    "llm": {"diffusion", "config"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("spin_diffusion.")}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not imported_rooms(path) & FORBIDDEN[room], path


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
        assert "toy" not in path.read_text().lower(), path


@pytest.mark.parametrize("module", ["config", "llm.config"])
def test_settings_are_read_without_the_libraries_that_use_them(module):
    """`--help` and the answer to a misspelt flag wait for what is imported here."""
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, spin_diffusion.{module}; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert f"spin_diffusion.{module}" in loaded
    assert not {"diffusers", "transformers", "accelerate", "peft"} & set(loaded)
