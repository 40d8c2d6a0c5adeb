"""From an exception to what a user reads: one line and exit code 2, or a traceback with --debug."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from spin_diffusion.input_error import InputError

# Read by transformers when it is imported, which happens after this module: its notes about image processors that are
# not used here would be the first thing that a user sees.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `command(argv)` and return the exit code: 0, or 2 for what the user or the machine caused.

    Anything else is a defect of this program and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command(argv)
        return 0
    except (InputError, FloatingPointError) as error:
        raised, message = error, str(error)
    except Exception as error:
        # torch and safetensors report a full disk as errors of their own, with the system's words in them
        reasons = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        reason = next((os.strerror(n) for n in reasons if getattr(error, "errno", None) == n), None)
        reason = reason or next((os.strerror(n) for n in reasons if os.strerror(n) in str(error)), None)
        if reason is None:
            raise
        raised = error
        where = f" ({error.filename})" if getattr(error, "filename", None) else ""
        message = f"{reason}{where}: make room or give another --output_dir, then run the same command again"
    if "--debug" in argv or "--debug=true" in argv:
        traceback.print_exception(raised)
    rank = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    return 2
