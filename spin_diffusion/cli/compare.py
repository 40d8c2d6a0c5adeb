"""Compare methods from one base: equal steps and equal compute, each at its own best rate, several seeds, one report.

    spin-diffusion compare --config compare_toy --jobs 2
    spin-diffusion compare --config CONFIG.yaml --only_methods spin,space --only_worlds sloppy --budget steps

Worlds, methods and their training settings stand in the file. The same command again goes on where it stopped.
"""

from importlib import import_module

from spin_diffusion.comparing.settings import parse_settings


def compare(argv: list[str]) -> None:
    """Read the settings, then train, draw, score and report."""
    settings = parse_settings(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    import_module("spin_diffusion.comparing.compare").compare_methods(settings)
