"""Say before a run of images what it will take: time, disk and memory, from its settings and a probe of a minute.

    python training/plan.py --config training/configs/sdxl_pickapic.yaml
    accelerate launch --multi_gpu --num_processes 8 training/plan.py --config ...

Takes the settings of train_spin_sd.py and train_spin_sdxl.py, as they are. The run's report shows the plan beside what
it really took. There is no plan of a language run: play a short round of it, whose report says what each phase took.
"""

import sys

from spin_diffusion.command import run_command
from spin_diffusion.config import parse_config
from spin_diffusion.input_error import InputError
from spin_diffusion.llm.config import parse_language_config


def predict(argv: list[str]) -> None:
    """Read the settings, then probe."""
    try:
        config = parse_config(argv)
    except InputError:
        refuse_language(argv)
        raise
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.diffusion.run import plan

    plan(config)


def refuse_language(argv: list[str]) -> None:
    """InputError where these are the settings of a language run."""
    try:
        parse_language_config(argv)
    except InputError:
        return
    raise InputError(
        "plan.py is for image models, and these are settings of a language run: play one short round of it instead "
        "(train_space_llm.py with --rounds 1 --max_train_samples 512 and another --output_dir), whose report says what "
        "time, memory and FLOPs each phase took"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, probe, and return the exit code."""
    return run_command(predict, argv)


if __name__ == "__main__":
    sys.exit(main())
