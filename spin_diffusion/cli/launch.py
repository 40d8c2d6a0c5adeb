"""`accelerate launch` whose report of a process that ended is that process's own last line, with its exit code.

    python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 -m spin_diffusion.cli train sdxl --config ...
    python -m spin_diffusion.cli.launch --config_file fsdp2 --num_processes 8 -m spin_diffusion.cli train llm ...

accelerate and torchrun answer an exit code with their own traceback, which buries the line that says what to do. One
process needs no launcher. --config_file takes the name of a shipped file of settings too.
"""

import logging
import signal
import subprocess
import sys

from spin_diffusion.store.progress import fitted
from spin_diffusion.store.shipped import LAUNCHERS, shipped

STOPPED = 128 + signal.SIGTERM
"""Exit code of a process of ours that was told to stop."""


def launch(argv: list[str]) -> int:
    """Start a program as `accelerate launch` with these arguments does, and return the exit code of the process that
    failed, or 128 + N where signal N ended it."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    given = launch_command_parser().parse_args(argv)
    if given.config_file:
        given.config_file = shipped(given.config_file, LAUNCHERS)
    # Ctrl-C reaches the program too, which says what is kept; what a function handles is not ignored by children
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        launch_command(given)
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        # The others were sent SIGTERM for the one that failed, and may have said so after its line
        by_cause = sorted(error.failures.values(), key=lambda failure: failure.exitcode in (STOPPED, -signal.SIGTERM))
        code, told = by_cause[0].exitcode, by_cause[0].message
        if isinstance(told, dict) and told["message"].startswith("error: "):
            print(fitted(told["message"], sys.stderr), file=sys.stderr)
    except SignalException as error:
        code = -error.sigval
    else:
        return 0
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
