"""Every configuration that is shipped is one that its program reads, with the values that its head promises."""

from pathlib import Path

import pytest

from spin_diffusion.comparing import settings as comparing
from spin_diffusion.config import parse_config
from spin_diffusion.diffusion import evaluate
from spin_diffusion.llm.config import parse_language_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
OF_LANGUAGE = {"space_mistral_7b", "space_zephyr_7b", "spin_zephyr_7b", "toy_llm"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_configuration_is_read_by_its_program(path):
    parse = parse_language_config if path.stem in OF_LANGUAGE else parse_config
    config = parse(["--config", str(path)])
    assert config.run.output_dir.startswith("runs/")
    base = config.flat().get("model_name_or_path") or config.flat()["pretrained_model_name_or_path"]
    assert (ROOT / base).is_dir() or base.count("/") == 1


@pytest.mark.parametrize("name", ["space_mistral_7b", "space_zephyr_7b"])
def test_the_recipes_of_space_are_the_published_ones(name):
    config = parse_language_config(["--config", str(ROOT / "training" / "configs" / f"{name}.yaml")])
    # 64 pairs of all processes together; the file's command launches 8
    assert config.training.train_batch_size * config.training.gradient_accumulation_steps * 8 == 64
    assert (config.rounds.objective, config.rounds.rounds, config.rounds.num_generated) == ("space", 5, 1)
    assert config.training.optimizer == "rmsprop" and config.training.num_train_epochs == 2


@pytest.mark.parametrize("path", sorted((ROOT / "evaluation" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_evaluations_configuration_is_read_by_its_program(path):
    compares = "methods:" in path.read_text().splitlines()
    assert (comparing if compares else evaluate).parse_settings(["--config", str(path)]).output_dir.startswith("runs/")
