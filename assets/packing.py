"""How the wheel and the sdist get the presets, prompt sets and small worlds that the commands find from any directory.

setuptools carries as a package's data only what lies in its folder; these lie beside it, where people look for them.
"""

from pathlib import Path

from setuptools.command.build_py import build_py

SHIPPED = ("training/configs", "training/accelerate", "evaluation/configs", "evaluation/prompts", "assets")
"""Folders, with all that is in them."""


class BuildPy(build_py):
    """The package, and what is shipped with it under spin_diffusion/shipped (spin_diffusion/store/shipped.py)."""

    def run(self) -> None:
        """Build into the folder that becomes the wheel; an editable install finds the files where they lie."""
        super().run()
        for file in [] if self.editable_mode else _files():
            target = Path(self.build_lib, "spin_diffusion", "shipped", file)
            self.mkpath(str(target.parent))
            self.copy_file(file, str(target))

    def get_source_files(self) -> list[str]:
        """What the sdist holds."""
        return [*super().get_source_files(), *_files()]


def _files() -> list[str]:
    paths = [path for folder in SHIPPED for path in sorted(Path(folder).rglob("*"))]
    return [str(path) for path in paths if path.is_file() and "__pycache__" not in path.parts]
