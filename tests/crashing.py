"""Every point at which a command can be killed: the states of its folder before each change, and what is made of them.

    python -m tests.crashing {images,lora,language,evaluation} FOLDER [all | borders]

The command runs once, and a copy of its folder is kept from before each change (an audit hook of Python sees every open
for writing, rename, mkdir, unlink and rmdir). From a copy of each state the command is started again, and what it ends
with is held against the unbroken run. States that the start of a command makes equal are tried once. What is a part
when the process dies is cut in half in every second state: native code writes parts, and no hook sees how far it got.
"""

import hashlib
import json
import os
import shutil
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}

import torch

from spin_diffusion.cli.command import run_command
from spin_diffusion.store.files import SEAL
from spin_diffusion.store.run_dir import MARKER, OLD, PART, settle
from tests import quick, tiny

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
AT_A_TIME = 2
"""Commands."""

State = dict[str, str]
"""Path below the folder -> "folder", "link" or the hash of a file's content."""

SCORER = """
import torch
def load(device):
    def score(images, prompts):
        return torch.tensor([float(image.convert("L").resize((1, 1)).getpixel((0, 0))) for image in images])
    return score
"""

VOLATILE = {"seconds", "ledger", "pairs_per_second", "resumed_from", SEAL}
"""What a run says of its times, and the hash of all that it says."""


# Commands


def _images(**more: Any) -> tuple[str, Callable[[list[str]], object], list[str]]:
    from spin_diffusion.diffusion.config import parse_config
    from spin_diffusion.runs.image_run import run

    tiny.build_sdxl(Path("base"))
    tiny.write_parquet(Path("train.parquet"))
    tiny.write_prompts(Path("prompts.jsonl"))
    settings = {
        "pretrained_model_name_or_path": "base", "dataset_name": "train.parquet", "max_train_samples": 4,
        "resolution": 32, "rounds": 2, "max_train_steps": 2, "train_batch_size": 2, "checkpointing_steps": 1,
        "learning_rate": 1e-4, "beta": 2000, "num_inference_steps": 2, "sampler": "ddim", "guidance_scale": 3,
        "samples_per_shard": 2, "validation_prompts": "prompts.jsonl", "max_validation_prompts": "2",
        "scorers": "[sharpness]", "preview_every": 0, "report_to": "none",
        "output_dir": "out",
    } | more  # fmt: skip
    return "out", lambda argv: run(parse_config(argv), family_name="sdxl"), _flags(settings)


def _lora() -> tuple[str, Callable[[list[str]], object], list[str]]:
    Path("redness.py").write_text(SCORER)
    return _images(
        use_lora=True, rank=2, rounds=1, max_train_steps=3, num_held_out=1,
        select_every=2, select_by="redness.py", preview_every=2,
        curation="{scorer: redness.py, top: 3}",
    )  # fmt: skip


def _language() -> tuple[str, Callable[[list[str]], object], list[str]]:
    from spin_diffusion.llm.config import parse_language_config
    from spin_diffusion.runs.language_run import run_language

    base = ROOT / "assets" / "toy_language"
    settings = {
        "model_name_or_path": base / "base", "dataset_name": base / "data" / "train.jsonl", "max_train_samples": 4,
        "held_out_dataset_name": base / "data" / "held_out.jsonl", "num_held_out": 2, "held_out_by": "row",
        "keep_repeated": True, "rounds": 2, "opponent": "pool", "max_train_steps": 2, "checkpointing_steps": 1,
        "num_train_epochs": "null", "train_batch_size": 2, "samples_per_shard": 4, "learning_rate": 3e-4,
        "max_length": 48, "max_new_tokens": 8, "judges": "[length]",
        "report_to": "none", "output_dir": "out",
    }  # fmt: skip
    return "out", lambda argv: run_language(parse_language_config(argv)), _flags(settings)


def _evaluation() -> tuple[str, Callable[[list[str]], object], list[str]]:
    from spin_diffusion.runs.evaluate_models import evaluate_models
    from spin_diffusion.runs.evaluate_settings import parse_settings

    tiny.build_sdxl(Path("base"))
    tiny.build_sdxl(Path("other"), seed=1)
    tiny.write_prompts(Path("prompts.jsonl"))
    argv = ["--models", "base=base", "other=other", "--prompts", "prompts.jsonl", "--max_prompts", "2"]
    settings = {
        "images_per_prompt": 1, "scorers": "sharpness", "num_inference_steps": 2, "resolution": 32,
        "guidance_scale": "[1.0,3.0]", "output_dir": "out",
    }  # fmt: skip
    return "out", lambda argv: evaluate_models(parse_settings(argv)), [*argv, *_flags(settings)]


KINDS = {"images": _images, "lora": _lora, "language": _language, "evaluation": _evaluation}


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


# States of a folder


class Store:
    """Contents of files, each kept once, and the states that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[int, int, int], str] = {}
        folder.mkdir()

    def state_of(self, root: Path) -> State | None:
        """What lies below a folder, its contents kept; None = there is none."""
        return dict(self._entries(root, root)) if root.is_dir() else None

    def _entries(self, root: Path, folder: Path) -> Iterator[tuple[str, str]]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = Path(entry.path).relative_to(root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                yield name, "folder"
                yield from self._entries(root, Path(entry.path))
            else:
                yield name, self._kept(entry)

    def _kept(self, entry: os.DirEntry[str]) -> str:
        found = entry.stat(follow_symlinks=False)
        assert stat.S_ISREG(found.st_mode), entry.path
        key = (found.st_ino, found.st_mtime_ns, found.st_size)
        if key not in self.known:
            content = Path(entry.path).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if not (self.folder / digest).exists():
                (self.folder / digest).write_bytes(content)
            self.known[key] = digest
        return self.known[key]

    def make(self, state: State | None, root: Path, torn: bool = False) -> None:
        """A folder in a state.

        Args:
            torn: what is not complete yet has half of its bytes.
        """
        shutil.rmtree(root, ignore_errors=True)
        if state is None:
            return
        root.mkdir()
        for name, content in state.items():
            if content == "folder":
                (root / name).mkdir()
                continue
            data = (self.folder / content).read_bytes()
            (root / name).write_bytes(data[: len(data) // 2] if torn and PART in name else data)

    def steady(self, state: State | None) -> State | None:
        """The state without what a run says of its times, to be compared."""
        return state and {name: self._steady(name, content) for name, content in state.items()}

    def _steady(self, name: str, content: str) -> str:
        if PART in name or OLD in name:
            return content
        if name.endswith(("report.html", "tracker_run_id")):
            return "is there"
        if name.endswith((".json", ".jsonl")):
            lines = (self.folder / content).read_text().splitlines()
            texts = lines if name.endswith(".jsonl") else ["\n".join(lines)]
            if all(texts):  # a marker is empty for a moment
                return json.dumps([_without_times(json.loads(text)) for text in texts], sort_keys=True)
        return content


def _without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in VOLATILE}
    return [_without_times(value) for value in content] if isinstance(content, list) else content


class Recorder:
    """Keeps the state of a folder from before each change. Installed once, in a process of its own."""

    def __init__(self, root: Path, store: Store) -> None:
        self.root, self.store, self.states = root.absolute(), store, [store.state_of(root)]
        self.num_changes, self.in_place, self.lock = 0, set[str](), threading.RLock()
        sys.addaudithook(self._hear)

    _CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1,
                "os.truncate": 1, "fcntl.flock": 1}  # fmt: skip
    """Events, and how many of their arguments are paths (or open files)."""

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                return
            paths = [path]
        elif event in self._CHANGES:
            paths = list(args[: self._CHANGES[event]])
            if event in ("os.rmdir", "os.remove") and args[1] >= 0:  # a name in an open folder
                paths = [f"{os.readlink(f'/proc/self/fd/{args[1]}')}/{os.fsdecode(args[0])}"]
        else:
            return
        inside = [path for path in map(self._inside, paths) if path is not None]
        if not inside:
            return
        with self.lock:
            self.num_changes += 1
            if event == "open" and PART not in inside[0]:
                self.in_place.add(inside[0])
            state = self.store.state_of(self.root)
            if state != self.states[-1]:
                self.states.append(state)

    def _inside(self, path: Any) -> str | None:
        named = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        below = os.path.relpath(os.path.abspath(named), self.root)
        return None if below.startswith("..") else below


# Trying them


def _forked(work: Callable[[], Any], log: Path) -> int:
    """A process that does the work and writes what it says into a log; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def record(kind: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """Run a command once; its states, and how to run it again."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    name, work, argv = KINDS[kind]()
    run_command(_import_all, [])

    def command(argv: list[str]) -> None:
        work(argv)

    def recorded() -> int:
        recorder = Recorder(Path(name), Store(Path("store")))
        code = run_command(command, argv)
        last = recorder.store.state_of(Path(name))
        said = {"states": [*recorder.states, last], "changes": recorder.num_changes}
        Path("states.json").write_text(json.dumps(said | {"in_place": sorted(recorder.in_place)}))
        return code

    started = time.monotonic()
    process = _forked(recorded, Path("unbroken.log"))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 0, Path("unbroken.log").read_text()[-3000:]
    return json.loads(Path("states.json").read_text()) | {"seconds": time.monotonic() - started}, (name, command, argv)


def _import_all(argv: list[str]) -> None:
    """What is imported late is in memory once, for all forks."""
    import spin_diffusion.diffusion.cost
    import spin_diffusion.runs.evaluate_models
    import spin_diffusion.runs.image_run
    import spin_diffusion.runs.language_run  # noqa: F401
    from spin_diffusion.diffusion.families import families

    families()
    # What takes time and changes no state
    quick.leave_out()
    spin_diffusion.diffusion.cost._count_unet = lambda *args: (1, 1, 1)
    spin_diffusion.diffusion.cost._count_vae = lambda *args: (1, 1)


def settled(store: Store, state: State | None, scratch: Path) -> str:
    """What the start of a command makes of a state, as one string to compare."""
    store.make(state, scratch)
    if state and MARKER in state and state[MARKER] != hashlib.sha256(b"").hexdigest():
        settle(scratch)
    return json.dumps(store.steady(store.state_of(scratch)), sort_keys=True)


def _borders(states: list[State | None], numbers: list[int]) -> list[int]:
    """Those of the states that have other folders at the top than the one before."""

    def folders(number: int) -> set[str]:
        return {name for name, content in (states[number] or {}).items() if content == "folder" and "/" not in name}

    return [here for before, here in pairwise(numbers) if folders(before) != folders(here)]


def try_all(kind: str, folder: Path, which: str = "all") -> dict[str, Any]:
    """Record, start again from each state, and say what came out otherwise.

    Args:
        which: "borders" = only where a folder at the top came, went or stepped aside.

    Returns:
        `changes` and `states` of the unbroken run, `tried` of them, `in_place`: paths that were opened for writing
        under their real names, `wrong`: what went wrong, by the number of the state.
    """
    recorded, (name, command, argv) = record(kind, folder)
    states = recorded["states"]
    store = Store.__new__(Store)
    store.folder, store.known = Path("store"), {}
    classes: dict[str, int] = {}
    for number, state in enumerate(states):  # of equal ones the last, which has most of a part
        classes[settled(store, state, Path("scratch"))] = number
    wanted = store.steady(states[-1])
    running: dict[int, tuple[int, Path]] = {}
    wrong: dict[int, str] = {}
    left = sorted(classes.values())
    left = _borders(states, left) if which == "borders" else left
    tried, started = len(left), time.monotonic()
    while left or running:
        while left and len(running) < AT_A_TIME:
            number = left.pop()
            place = Path(f"try-{number}")
            place.mkdir()
            for entry in Path().iterdir():
                if entry.name not in ("store", "scratch", name, "states.json") and not entry.name.startswith("try-"):
                    (place / entry.name).symlink_to(entry.absolute())
            store.make(states[number], place / name, torn=number % 2 == 1)

            def again(place: Path = place) -> int:
                os.chdir(place)
                return run_command(command, argv)

            running[_forked(again, place.with_suffix(".log"))] = (number, place)
        process, status = os.wait()
        number, place = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        found = store.steady(store.state_of(place / name)) or {}
        differing = sorted(path for path in {*wanted, *found} if wanted.get(path) != found.get(path))
        if code or differing:
            said = place.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            wrong[number] = f"exit code {code}, differing: {differing[:6]}, said: {' | '.join(said[-3:])[:600]}"
        else:
            shutil.rmtree(place)
    return {
        "changes": recorded["changes"], "states": len(states), "tried": tried, "in_place": recorded["in_place"],
        "wrong": wrong, "seconds": [round(recorded["seconds"], 1), round(time.monotonic() - started, 1)],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(try_all(sys.argv[1], Path(sys.argv[2]).absolute(), *sys.argv[3:])))
