"""`accelerate launch` whose report of a process that ended is that process's own last line, with its exit code.

    python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 training/train_spin_sdxl.py --config ...

accelerate and torchrun answer an exit code with their own traceback, which buries the line that says what to do. One
process needs no launcher: python training/train_spin_sdxl.py --config ...
"""

import logging
import signal
import subprocess
import sys


def launch(argv: list[str]) -> int:
    """Start a program as `accelerate launch` with these arguments does, and return the exit code of the process that
    failed, or 128 + N where signal N ended it."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    given = launch_command_parser().parse_args(argv)
    # Ctrl-C reaches the program too, which says what is kept; what a function handles is not ignored by children
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        launch_command(given)
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = max(failure.exitcode for failure in error.failures.values())  # the others were sent SIGTERM for it
    except SignalException as error:
        code = -error.sigval
    else:
        return 0
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
