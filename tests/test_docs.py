"""The documentation: links lead somewhere, commands would be understood, generated pages are current."""

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spin_diffusion.cli.__main__ import COMMANDS
from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.comparing.settings import parse_settings as parse_comparison
from spin_diffusion.diffusion.config import Config, parse_config
from spin_diffusion.llm.config import LanguageConfig, parse_language_config
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.runs.evaluate_settings import parse_settings as parse_evaluation
from spin_diffusion.store.named import load_module
from spin_diffusion.store.parsing import types_of
from spin_diffusion.store.shipped import LAUNCHERS, PRESETS, shipped, shipped_names

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("assets", "benchmarks", "evaluation", "evaluation/prompts", "training")
"""Those with a page of their own; others, such as a test's cache and runs, may lie beside them."""
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in FOLDERS]
PARSERS: dict[str, Any] = {
    "demo": parse_config,
    "train sdxl": parse_config,
    "train sd": parse_config,
    "train llm": parse_language_config,
    "plan": parse_config,
    "evaluate": parse_evaluation,
    "compare": parse_comparison,
}
"""Commands whose words are settings."""
FOREIGN = {
    *("--help", "--config", "--print_config"),  # of every command
    *("--config_file", "--cpu", "--multi_gpu", "--num_processes", "--nproc_per_node"),  # accelerate's and torchrun's
    *("--enable-lora", "--max-lora-rank", "--lora-modules", "--no-deps", "--strict"),  # vLLM's, pip's, mkdocs's
    "--beta_dpo",  # of diffusers' script
}
"""Flags that the pages speak of, and that no command here declares."""


OURS = re.compile(r"(training|evaluation|benchmarks(?!/results)|assets|tests)/")
"""How the paths of the repository begin."""


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """What GitHub and mkdocs make of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command in the blocks of shell code of a page, or of a part of one."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors_of(target), f"{link}: no such heading"
        # The pages are read on the hub as they are, and built as a site that has nothing else
        assert page.parent != ROOT / "docs" or target.parent == ROOT / "docs", f"{link} leads out of docs/"


def test_the_front_page_is_short_and_begins_with_a_command():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 150
    assert lines.index("```bash") < 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_would_be_understood(page, monkeypatch, tmp_path):
    """In a copy of the repository that has the files which the page has its reader write."""
    for child in ROOT.iterdir():
        (tmp_path / child.name).symlink_to(child)
    for block in re.findall(r"^```python\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE):
        if named := re.match(r'"""(\w+\.py):', block):
            (tmp_path / named[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    for words in commands_of(text_of(page)):
        if words[0] == "make":
            assert all(f"\n{word}:" in text_of(ROOT / "Makefile") for word in words[1:] if "=" not in word), words
        for before, word in zip(words, words[1:], strict=False):
            if before == "--config_file":
                assert Path(shipped(word, LAUNCHERS)).exists(), word
            elif OURS.match(word):
                assert Path(word).exists(), word
        name, given = called(words)
        if name in PARSERS:
            if given:
                PARSERS[name]([word for word in given if word != "--plateau"])
        elif name:
            assert name in COMMANDS or Path(name).exists(), name
            unknown = {word for word in given if word.startswith("--")} - declared(name)
            assert not unknown, f"{name} has no {unknown}"


def called(words: list[str]) -> tuple[str, list[str]]:
    """The name of our command, or the path of a script that is none, and what it is given; "" for others' commands."""
    script = next((word for word in words if word.endswith(".py") and "=" not in word), None)
    if words[0] == "spin-diffusion":
        rest = words[1:]
    elif "spin_diffusion.cli" in words:
        rest = words[words.index("spin_diffusion.cli") + 1 :]
    elif script and words[0] == "python":
        rest = words[words.index(script) :]
    else:
        return "", []
    name, given = (" ".join(rest[:2]), rest[2:]) if rest[0] == "train" else (rest[0], rest[1:])
    if "..." in given:  # the rest is the reader's
        given = given[: given.index("...")]
        given = given[:-1] if given and given[-1].startswith("--") else given
    return name, given


@cache
def declared(name: str) -> set[str]:
    """The flags that a command or script declares by their names."""
    path = ROOT / name if name.endswith(".py") else ROOT / f"spin_diffusion/cli/{name}.py"
    return set(re.findall(r"\"(--?[a-z][\w-]*)\"", path.read_text(encoding="utf-8")))


def test_every_flag_and_preset_that_is_spoken_of_is_there():
    known = set(FOREIGN)
    for kind in (Config, LanguageConfig, EvaluateSettings, CompareSettings):
        known |= {f"--{name}" for name in types_of(kind)}
    for folder in ("training", "evaluation", "benchmarks", "assets", "spin_diffusion/cli"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= declared(str(path.relative_to(ROOT)))
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
            if (preset := re.fullmatch(r"(\w+)\.yaml", code)) and code != "config.yaml":
                assert preset[1] in shipped_names((*PRESETS, *LAUNCHERS)), f"{page.relative_to(ROOT)}: {code}"
            unknown = {f"--{name}" for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code)} - known
            assert not unknown, f"{page.relative_to(ROOT)}: {code}"


def test_the_page_of_settings_is_current():
    settings = load_module("settings_page", str(ROOT / "docs/settings.py"))
    assert settings.page() == text_of(settings.PAGE), "run: python docs/settings.py"


def test_the_functions_that_people_import_are_there():
    rows = re.findall(r"^\| `([\w.]+)\.(\w+)\(([\w, ]*)\)`", text_of(ROOT / "docs/api.md"), re.MULTILINE)
    assert len(rows) > 10
    for module, name, parameters in rows:
        found = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        shown = parameters.split(", ")
        assert list(found)[: len(shown)] == shown, f"{module}.{name}{tuple(found)}"


def test_every_message_that_is_explained_is_one_that_is_said():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "spin_diffusion").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = "\n".join(node.value for node in nodes if isinstance(node.value, str))
    for page in (ROOT / "README.md", ROOT / "docs/troubleshooting.md"):
        for table in re.findall(r"^\| message \|.*?\n\n", text_of(page), re.DOTALL | re.MULTILINE):
            for message in re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.strip().splitlines())):
                for part in re.split(r"\.\.\.|\(\)", message):
                    assert part.strip(" (),;") in said, f"{page.name}: {message}"
