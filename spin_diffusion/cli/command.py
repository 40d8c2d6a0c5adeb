"""From an exception to what a user reads: one line and exit code 2, or a traceback with --debug."""

import io
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spin_diffusion.store.input_error import InputError, broken_character, printable
from spin_diffusion.store.progress import end_bars, fitted
from spin_diffusion.store.run_dir import in_words, trouble_of

# Read by transformers when it is imported, which happens after this module: its notes about image processors that are
# not used here would be the first thing that a user sees.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def run_command(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `command(argv)` and return the exit code: the command's own (none = 0), 2 for what the user or the machine
    caused, 130 after Ctrl-C, 141 where nobody reads any further, as after `| head`.

    Anything else is a defect of this program and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    raised: Exception
    try:
        with _last_words():
            code = command(argv) or 0
            sys.stdout.flush()
            return code
    except (InputError, FloatingPointError) as error:
        raised, message = error, str(error)
    except UnicodeEncodeError as error:
        if broken_character(str(error.object)) is None:
            raise
        raised = error
        name = printable(error.object)[:300]
        message = f"{name} is not UTF-8, and a library that it is given to takes nothing else: rename it"
    except KeyboardInterrupt:
        heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses it twice is told all the same
        end_bars()
        print(f"\n{_who()}told to stop (Ctrl-C). {_KEPT}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, heeded)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        number = trouble_of(error)
        if number is None and not _lost_another(error):
            raise
        raised = error
        if number is not None:
            message = in_words(number, error)
        else:
            seen = str(error).splitlines()[0][:120]
            message = f"another process of this job ended, or does not answer (seen as: {seen}). {_KEPT}"
    end_bars()
    if "--debug" in argv or "--debug=true" in argv:
        traceback.print_exception(raised)
    print(fitted(f"{_who()}error: {message}", sys.stderr), file=sys.stderr)
    _tell_torchrun(f"error: {message}")
    return 2


def _reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more; what is still to be written to it then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    is_gone = bool(output.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone


def exit_code(failing: Sequence[str]) -> int:
    """0 where nothing failed that `--fail_on` asks for, otherwise 3, and what it was in a line."""
    if failing:
        print(f"--fail_on: {'; '.join(failing)}", file=sys.stderr)
    return 3 if failing else 0


_KEPT = "What is finished is kept; the same command goes on from there."


def _lost_another(error: Exception) -> bool:
    """Whether the error is what torch's exchange between processes says when one of them is gone or hangs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    said = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")
    return of_torch or any(words in str(error) for words in said)


def _tell_torchrun(line: str) -> None:
    """Give torchrun, where it started this process, the line with which its report of the failure then ends."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        shown = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": shown}}))


def _who() -> str:
    return f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


@contextmanager
def _last_words() -> Iterator[None]:
    """Say what to do when the process is told to end: by a launcher, as another process died, or by a scheduler.

    A handler in Python would wait until the main thread is back from whatever it does in the device's libraries, for
    ever if that is an exchange with a dead process. The byte that Python writes when a signal comes wakes a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait() -> None:
        while number := reader.recv(1):
            if number == bytes([signal.SIGTERM]):
                print(f"\n{_who()}told to stop (SIGTERM). {_KEPT}", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        # A library's writer raises it again in the main thread, which says it
        if args.exc_value is None or trouble_of(args.exc_value) is None:
            threading.__excepthook__(args)

    hooked, threading.excepthook = threading.excepthook, of_thread
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        threading.excepthook = hooked
        writer.close()
