"""What this machine can do, and what will not work on it, each with the remedy: in lines of 80 columns."""

import importlib.metadata
import os
import shutil
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec

import psutil

from spin_diffusion.store.input_error import InputError

EXTRAS = {
    "bitsandbytes": ("bitsandbytes", "8-bit AdamW"),
    "open_clip": ("open_clip_torch", "More scorers"),
    "vllm": ("vllm", "Faster answers of language models"),
    "lm_eval": ("lm-eval", "Benchmarks of language models"),
    "wandb": ("wandb", "The tracker wandb"),
    "trackio": ("trackio", "The tracker trackio"),
}
"""Module of an optional extra -> what installs it, and what it is for."""
HUB_LIMIT_S = 2.0
GB = 1e9


def doctor(argv: list[str]) -> None:
    """Print what there is, and below it what will not work."""
    if argv in (["-h"], ["--help"]):
        print("usage: spin-diffusion doctor\n\nSays what this machine can do, and what to do about the rest.")
        return
    if argv:
        raise InputError("doctor takes no settings")
    there, remedies = [], []
    for line, remedy in (*_libraries(), *_devices(), *_memory(), *_hub(), *_extras()):
        if line:
            there.append(line)
        if remedy:
            remedies.append(f"- {remedy}")
    heading = "What will not work, and what to do:" if remedies else "Nothing is missing."
    print("\n".join(textwrap.fill(line, 80) for line in (*there, "", heading, *remedies)))


_Lines = Iterator[tuple[str | None, str | None]]
"""What there is, and what does not work with its remedy."""


def _libraries() -> _Lines:
    from packaging.requirements import Requirement

    unfit = []
    for one in map(Requirement, importlib.metadata.requires("spin-diffusion") or ()):
        there, is_needed = _version(one.name), one.marker is None or one.marker.evaluate({"extra": ""})
        if is_needed and (there is None or not one.specifier.contains(there, prereleases=True)):
            unfit.append(str(one))
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("torch", "diffusers", "transformers"))
    remedy = f"Too old or missing: pip install {' '.join(map(repr, unfit))}" if unfit else None
    yield _row("libraries", f"Python {sys.version.split()[0]}, {shown}"), remedy


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> _Lines:
    try:
        import torch
    except ImportError:
        yield _row("GPU", "not known without torch"), None
        return
    if not torch.cuda.is_available():
        reason = (
            "no driver answers (nvidia-smi)" if torch.version.cuda or torch.version.hip else "this torch is for CPUs"
        )
        yield _row("GPU", f"none; {os.cpu_count()} CPU cores"), f"All but the demo takes a GPU: {reason}"
        yield _row("precision", "fp32 (on CPU cores)"), None
        yield _row("attention", "PyTorch's own"), None
        return
    count = torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info()
    yield (
        _row("GPU", f"{count} x {torch.cuda.get_device_name()}, {free / GB:.0f} of {total / GB:.0f} GB free"),
        None if free > 0.8 * total else "GPU memory is in use by another program: end it (nvidia-smi names it)",
    )
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield _row("precision", "bf16, fp16, fp32"), None
    else:
        yield _row("precision", "fp16, fp32"), "--mixed_precision bf16: this GPU has none, give fp16"
    flash = torch.cuda.get_device_capability() >= (8, 0) and torch.backends.cuda.is_flash_attention_available()
    yield _row("attention", "PyTorch's, with " + ("flash" if flash else "memory-efficient") + " kernels"), None


def _memory() -> _Lines:
    free, disk = psutil.virtual_memory().available, shutil.disk_usage(".").free
    yield (
        _row("free", f"{free / GB:.0f} GB of memory, {disk / GB:.0f} GB of disk in this folder"),
        "Disk: less than 20 GB here; give an --output_dir elsewhere" if disk < 20 * GB else None,
    )


def _extras() -> _Lines:
    there = [module for module in EXTRAS if find_spec(module) is not None]
    yield _row("extras", ", ".join(there) or "none"), None
    for module, (packages, purpose) in EXTRAS.items():
        if module not in there:
            yield None, f"{purpose}: pip install {packages}"


def _hub() -> _Lines:
    from huggingface_hub import constants

    address = constants.ENDPOINT
    if constants.is_offline_mode():
        yield (
            _row("hub", "switched off by HF_HUB_OFFLINE"),
            "Models by name: unset HF_HUB_OFFLINE, or give local folders",
        )
        return
    reached = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_LIMIT_S).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError):
            return
        reached.set()

    # The limit of the request does not hold for the search of the address
    threading.Thread(target=ask, daemon=True).start()
    is_there = reached.wait(HUB_LIMIT_S)
    yield (
        _row("hub", f"{address} " + ("answers" if is_there else f"does not answer within {HUB_LIMIT_S:.0f} s")),
        None if is_there else "Models and data by their names on the hub: give local folders and files",
    )


def _row(name: str, what: str) -> str:
    return f"{name:<10} {what}"
