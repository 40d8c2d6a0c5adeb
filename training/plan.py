"""Say before a run what it will take: time, disk and memory, from its settings and a probe of a minute.

    python training/plan.py --config training/configs/sdxl_pickapic.yaml
    accelerate launch --multi_gpu --num_processes 8 training/plan.py --config ...

Takes the settings of the training scripts as they are, those of images and those of language. The run's report shows
the plan beside what it really took.
"""

import sys

from spin_diffusion.command import run_command
from spin_diffusion.config import parse_config
from spin_diffusion.input_error import InputError
from spin_diffusion.llm.config import LanguageConfig, parse_language_config


def predict(argv: list[str]) -> None:
    """Read the settings, then probe."""
    language = None
    try:
        config = parse_config(argv)
    except InputError:
        language = language_settings(argv)
        if language is None:
            raise
    # After the settings: a misspelt flag is not answered only when all libraries are there
    if language is not None:
        from spin_diffusion.llm.run import plan

        plan(language)
    else:
        from spin_diffusion.diffusion.run import plan

        plan(config)


def language_settings(argv: list[str]) -> LanguageConfig | None:
    """Those of a language run; None where they are none."""
    try:
        return parse_language_config(argv)
    except InputError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Parse, probe, and return the exit code."""
    return run_command(predict, argv)


if __name__ == "__main__":
    sys.exit(main())
