"""Say before a run what it will take: time, disk and memory, from its settings and a probe of a minute.

    python training/plan.py --config training/configs/sdxl_pickapic.yaml
    accelerate launch --multi_gpu --num_processes 8 training/plan.py --config ...

Takes the settings of the training scripts, as they are. The run's report shows the plan beside what it really took.
"""

import sys

from spin_diffusion.command import run_command
from spin_diffusion.config import parse_config
from spin_diffusion.diffusion.run import plan


def main(argv: list[str] | None = None) -> int:
    """Parse, probe, and return the exit code."""
    return run_command(lambda arguments: plan(parse_config(arguments)), argv)


if __name__ == "__main__":
    sys.exit(main())
