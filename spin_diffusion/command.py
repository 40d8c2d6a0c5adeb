"""From an exception to what a user reads: one line and exit code 2, or a traceback with --debug."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from spin_diffusion.input_error import InputError


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `command(argv)` and return the exit code: 0, or 2 for what the user or the machine caused.

    Anything else is a defect of this program and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command(argv)
        return 0
    except (InputError, FloatingPointError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{where}: make room or give another --output_dir, then run the same command again"
    if "--debug" in argv or "--debug=true" in argv:
        traceback.print_exc()
    rank = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    return 2
