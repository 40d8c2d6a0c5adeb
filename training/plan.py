"""Say before a run what it will take: time, disk and memory, from its settings and a probe of a minute.

    python training/plan.py --config training/configs/sdxl_pickapic.yaml
    accelerate launch --multi_gpu --num_processes 8 training/plan.py --config ...

Takes the settings of the training scripts, as they are. The run's report shows the plan beside what it really took.
"""

import sys

from spin_diffusion.command import run_command
from spin_diffusion.config import parse_config


def predict(argv: list[str]) -> None:
    """Read the settings, then probe."""
    config = parse_config(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.diffusion.run import plan

    plan(config)


def main(argv: list[str] | None = None) -> int:
    """Parse, probe, and return the exit code."""
    return run_command(predict, argv)


if __name__ == "__main__":
    sys.exit(main())
