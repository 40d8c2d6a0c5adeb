"""Every configuration that is shipped is one that its program reads, with the values that its head promises."""

from pathlib import Path

import pytest

from spin_diffusion.comparing import settings as comparing
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.runs import evaluate_settings
from spin_diffusion.store.input_error import InputError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
OF_LANGUAGE = {"space_mistral_7b", "space_peft", "space_zephyr_7b", "spin_zephyr_7b", "toy_llm"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_configuration_is_read_by_its_program(path):
    parse = parse_language_config if path.stem in OF_LANGUAGE else parse_config
    config = parse(["--config", str(path), "--dataset_name", "mine"])
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
    assert (
        (comparing if compares else evaluate_settings)
        .parse_settings(["--config", str(path)])
        .output_dir.startswith("runs/")
    )


NEEDED = ["--pretrained_model_name_or_path", "base", "--dataset_name", "data"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "1000000000000"], "--rounds 1000000000000 must be between 1 and 10,000"),
        (["--beta", "1e300"], "--beta 1e+300 must be above 0 and at most 1e+30"),
        (["--resolution", "80000000"], "--resolution 80000000 must be a multiple of 8, and at most 10,000"),
        (["--keep_rounds", "0"], "--keep_rounds 0 must be at least 1"),
        (["--keep_rounds", "2", "--opponent", "pool"], "--opponent pool draws from all earlier selves"),
        (["--ema_decay", "1.5"], "--ema_decay 1.5 must be above 0 and below 1"),
        (["--lr_scheduler", "cosin"], "did you mean 'cosine'?"),
        (["--lr_warmup_steps", "1.5"], "--lr_warmup_steps 1.5 must be a whole number of steps, or a share below 1"),
        (["--lr_warmup_steps", "[5, -0.1]"], "--lr_warmup_steps -0.1 must be at least 0"),
        (["--max_validation_prompts", "0"], "--max_validation_prompts 0 must be at least 1"),
        (["--validation_guidance_scales", "[1, -1]"], "--validation_guidance_scales -1.0 must be at least 0"),
    ],
)
def test_what_a_library_would_refuse_later_is_refused_by_its_flag(flags, message):
    with pytest.raises(InputError) as refused:
        parse_config([*NEEDED, *flags])
    assert message in str(refused.value)
