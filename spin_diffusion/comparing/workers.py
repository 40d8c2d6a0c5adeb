"""Cells in several processes, each of which loads its libraries once. A process that dies costs its own cell only."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spin_diffusion.comparing.cells import Task, do, write_failure
from spin_diffusion.store.run_dir import trouble_of


def run_all(tasks: Sequence[Task], jobs: int, done: Callable[[Task], None], go_on: Callable[[], bool]) -> None:
    """Run the tasks, in their order as processes become free.

    Args:
        jobs: processes; 0 = in this one.
        done: told after every task, from one thread at a time.
        go_on: asked before a task is begun; False leaves the rest.
    """
    if jobs == 0:
        for task in tasks:
            if go_on():
                do(task)
                done(task)
        return
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock = threading.Lock()
    processes: list[_Process] = []
    failures: list[Exception] = []

    def serve() -> None:
        process = _Process()
        processes.append(process)
        try:
            while go_on() and not failures:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    break
                process.do(task)
                with lock:
                    done(task)
        except Exception as error:  # a thread's own would end with the thread
            failures.append(error)
        process.close()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        for process in processes:
            process.kill()
        raise
    if failures:
        raise failures[0]


class _Process:
    """A process that does one task after the other; it is started again when it has died."""

    def __init__(self) -> None:
        self.process: Any = None
        self.pipe: Any = None

    def do(self, task: Task) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(task)
            failure = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.process = None
            write_failure(Path(task.folder), "killed", f"its process ended with code {code}")
            return
        if failure is not None:
            raise failure

    def close(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()


def _serve(pipe: Any) -> None:
    """What the process does: a task at a time until nobody asks any more."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one process per core is faster than one thread per core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        failure = None
        try:
            do(task)
        except KeyboardInterrupt:
            return
        except Exception as error:
            number = trouble_of(error)
            if number is None:
                raise
            failure = OSError(number, os.strerror(number), task.folder)
        try:
            pipe.send(failure)
        except OSError:
            return  # the comparison is gone
