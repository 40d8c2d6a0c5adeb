"""Self-play, all rounds in one command; the same command again goes on where it stopped.

One device needs no launcher. Several:

    python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 -m spin_diffusion.cli train sdxl --config ...
"""

import os

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.store.progress import tell
from spin_diffusion.store.shipped import shipped_name

DEMO = "toy_sdxl"


def train_sdxl(argv: list[str]) -> None:
    """Fine-tune SDXL."""
    _train_images(argv, "sdxl")


def train_sd(argv: list[str]) -> None:
    """Fine-tune Stable Diffusion 1.x or 2.x."""
    _train_images(argv, "sd")


def train_llm(argv: list[str]) -> None:
    """Fine-tune a language model."""
    config = parse_language_config(argv)
    _begin(config.run.output_dir, config.model.model_name_or_path)
    from spin_diffusion.runs.language_run import run_language

    run_language(config)


def demo(argv: list[str]) -> None:
    """Play three rounds in the small world that is shipped; any setting can be given, --output_dir say."""
    train_sdxl(["--config", DEMO, *argv])


def _begin(output_dir: str, base: str | None) -> None:
    """Say at once what goes on: the libraries take longer to be imported than a user waits in doubt."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"Run        {output_dir}: loading the libraries and {shipped_name(str(base))}")


def _train_images(argv: list[str], family_name: str) -> None:
    config = parse_config(argv)
    _begin(config.run.output_dir, config.model.pretrained_model_name_or_path)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.runs.image_run import run

    run(config, family_name=family_name)
