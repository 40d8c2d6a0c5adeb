"""End what a vLLM engine runs in, once the process that started it is gone.

vLLM computes in processes of its own. They end when they are told to, and the memory that they hold of a GPU is free;
but a run that is killed tells nobody, and they would hold it for good. So this runs beside them:

    python vllm_watch.py PID    (of the process that starts the engine, whose child this is)
"""

import os
import sys
import time

import psutil

_PAUSE_S = 0.5


def watch(parent: int) -> None:
    """Until process `parent` is gone, note the processes that it starts from now on, and theirs; then kill them."""
    started, began = {}, psutil.Process().create_time()
    while os.getppid() == parent:
        try:
            for process in psutil.Process(parent).children(recursive=True):
                # Python's own tracker ends by itself, after it has removed what the others shared
                if process.create_time() > began and not any("resource_tracker" in word for word in process.cmdline()):
                    started[process.pid] = process
        except psutil.NoSuchProcess:
            pass  # one of them ended while it was asked
        time.sleep(_PAUSE_S)
    for process in started.values():
        try:
            process.kill()  # psutil knows a number that was given to another process since
        except psutil.NoSuchProcess:
            pass


if __name__ == "__main__":
    watch(int(sys.argv[1]))
