"""Say before a run what it will take, from its settings and a probe of a minute: `spin-diffusion plan`.

python training/plan.py --config training/configs/sdxl_full_80gb.yaml --train_data_dir MY_PICTURES
python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 training/plan.py --config ...
accelerate launch -q training/plan.py --plateau --config ...
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.plan import plan


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(plan, argv)


if __name__ == "__main__":
    sys.exit(main())
