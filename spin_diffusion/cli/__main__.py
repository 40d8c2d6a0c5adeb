"""`spin-diffusion`, and `python -m spin_diffusion.cli`, which `accelerate launch -m` takes too: one command for all."""

import sys
from collections.abc import Callable
from importlib import import_module

from spin_diffusion import __version__
from spin_diffusion.cli.command import run_command
from spin_diffusion.store.input_error import InputError, nearest, printable

COMMANDS = {
    "demo": ("train:demo", "three rounds of self-play in the small world that is shipped; results in runs/toy"),
    "train sdxl": ("train:train_sdxl", "fine-tune SDXL by self-play"),
    "train sd": ("train:train_sd", "fine-tune Stable Diffusion 1.x or 2.x by self-play"),
    "train llm": ("train:train_llm", "fine-tune a language model by self-play"),
    "plan": ("plan:plan", "say before a run what it will take, and what will not fit"),
    "evaluate": ("evaluate:evaluate", "compare models: same prompts, same seeds, scores, a page"),
    "report": ("report:report", "build the page of a run or an evaluation again"),
    "compare": ("compare:compare", "compare methods: several seeds, equal compute, one page"),
    "export": ("export:export", "write a run's model for ComfyUI, A1111, diffusers or vLLM"),
    "doctor": ("doctor:doctor", "say what this machine can do, and what to do about the rest"),
    "completion": ("completion:completion", "print what completes these commands in bash or zsh"),
}
"""What is typed -> the module and function that do it, which are imported when they are asked for, and what it does."""


def dispatch(argv: list[str]) -> int | None:
    """Do the command that `argv` begins with, or print what commands there are; the exit code, None for 0."""
    if not argv or argv[0] in ("-h", "--help") or argv in (["train", "--help"], ["train", "-h"]):
        print("usage: spin-diffusion COMMAND ...; spin-diffusion COMMAND --help tells its settings\n")
        print("\n".join(f"  {name:<11} {about}" for name, (_, about) in COMMANDS.items()))
        return None
    if argv[0] == "--version":
        print(f"spin-diffusion {__version__}")
        return None
    words = 2 if argv[0] == "train" else 1
    name = " ".join(argv[:words])
    if argv[0] == "train" and name not in COMMANDS:
        raise InputError("give what to train: spin-diffusion train sdxl, sd or llm")
    if name not in COMMANDS:
        raise InputError(f"there is no command {printable(name)!r}{nearest(name, list(COMMANDS))}")
    sys.argv[0] = f"spin-diffusion {name}"  # what --help of the command calls it
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[list[str]], int | None] = getattr(import_module(f"spin_diffusion.cli.{module}"), function)
    return command(argv[words:])


def main(argv: list[str] | None = None) -> int:
    """Do the command and return the exit code."""
    return run_command(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
