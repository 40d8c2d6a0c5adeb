"""Write settings.md from the dataclasses of settings.

python docs/settings.py
"""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.diffusion.config import Config
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.store.parsing import as_word, placeholder, sections_of
from spin_diffusion.store.settings import help_texts, rules_of

PAGE = Path(__file__).with_name("settings.md")
OPENING = """# Settings

Names and defaults follow diffusers' scripts. `--help` of each command shows the same, `--print_config` what a command
line amounts to. A value that may change by round takes a list, one value per round; the last repeats. Settings with
keys are given as `--health "{saturation: 0.5}"`; their keys stand below them. A begun run or evaluation refuses another
value, but for the settings with a star (*); a comparison runs anew what changed.

<!-- python docs/settings.py writes this page from the dataclasses -->
"""
COMMANDS = {
    "Training on pictures": Config,
    "Training a language model": LanguageConfig,
    "Evaluation": EvaluateSettings,
    "Comparison of methods": CompareSettings,
}


def page() -> str:
    """The page. A setting that an earlier command has, and that means the same there, is not said again."""
    parts, said = [OPENING], set[str]()
    for title, kind in COMMANDS.items():
        parts.append(f"\n## {title}\n")
        for section in sections_of(kind).values():
            rows = [row for row in _rows(section) if row not in said]
            said |= set(rows)
            if rows:
                about = " ".join((section.__doc__ or "").split())
                parts += [f"\n{about}\n\n", "| setting | values | default | meaning |\n|---|---|---|---|\n", *rows]
        if kind is LanguageConfig:
            parts.append("\nAll other settings are those of pictures: of rounds, training, adapters and output.\n")
    return "".join(parts)


def _rows(section: type, keys_of: str = "") -> Iterator[str]:
    texts, rules = help_texts(section), rules_of(section)
    for one in fields(section):
        name = f"{keys_of}{one.name}" if keys_of else f"--{one.name}{'*' if rules[one.name].harmless else ''}"
        words = (*rules[one.name].choices, *["FILE.py"] * rules[one.name].or_file)
        values = " \\| ".join(words or placeholder(one.type).split("|"))
        text = texts.get(one.name, "").replace("|", "\\|")
        yield f"| `{name}` | {values} | {_default(one)} | {text} |\n"
        if is_dataclass(one.type):
            yield from _rows(one.type, keys_of=f"{one.name}: ")


def _default(one: Field[Any]) -> str:
    return "" if one.default is None or is_dataclass(one.default) else as_word(one.default)


if __name__ == "__main__":
    PAGE.write_text(page())
