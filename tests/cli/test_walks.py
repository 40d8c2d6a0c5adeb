"""What new users do, typed as README and the pages have it: their commands and lines of code are taken from there.

What they name (`FOLDER`, `FILE.jsonl`, the bases' hub ids) lies in the working directory, small; flags that make the
work small are added behind a command, and nothing else of it is changed.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from spin_diffusion.cli.__main__ import main
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.runs.evaluate_settings import parse_settings
from tests.llm.playing import LANGUAGE
from tests.runs.test_evaluate_command import SCORER
from tests.test_docs import ROOT, called, commands_of, text_of

DRAWN = "--num_inference_steps 1 --resolution 32"
TRAINED = f"{DRAWN} --max_train_steps 2 --gradient_accumulation_steps 1 --mixed_precision no".split()
COMPARED = f"{DRAWN} --images_per_prompt 1 --mixed_precision no".split()


@pytest.fixture(autouse=True)
def desk(sdxl_dir, sd1_dir, tiny_prompts, tmp_path, monkeypatch) -> None:
    """A working directory with what the commands name, and `redness.py`, a scorer that needs no weights."""
    bases = {
        "stabilityai/stable-diffusion-xl-base-1.0": sdxl_dir,
        "stable-diffusion-v1-5/stable-diffusion-v1-5": sd1_dir,
        "Qwen/Qwen2.5-1.5B-Instruct": LANGUAGE / "base",
        "alignment-handbook/zephyr-7b-sft-full": LANGUAGE / "base",
    }
    for name, folder in bases.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "prompts.jsonl").symlink_to(tiny_prompts)
    (tmp_path / "redness.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spin-diffusion"])


def read(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## ", text_of(ROOT / page).split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def typed(page: str, heading: str, name: str, which: int = 0) -> list[str]:
    """The words of a command of ours under a heading: its name and what it is given."""
    found = [called(words) for words in commands_of(read(page, heading))]
    given = [given for command, given in found if command == name][which]
    return [*name.split(), *given]


def evaluate(given: list[str]) -> int:
    """Run an evaluation with a small scorer and small prompts where it has any, by its words or by its preset."""
    settings = parse_settings(given[1:])
    scorers = ["--scorers", "redness.py"] if settings.scorers else []
    return main([*given, *COMPARED, *scorers, *(["--prompts", "prompts.jsonl"] if settings.prompts else [])])


def code(text: str, pattern: str) -> str:
    """The one piece of code between backticks that matches."""
    (found,) = re.findall(rf"`({pattern})`", text)
    return found


def paint(folder: str, red: int, number: int = 16) -> None:
    """Pictures of noise with this much red, and a caption of the same name beside each."""
    rng = np.random.default_rng(red)
    Path(folder).mkdir()
    for place in range(number):
        height, width = rng.integers(30, 60, 2)
        image = rng.integers(0, 60, (height, width, 3)) + np.array([red, 60, 60])
        Image.fromarray(image.astype(np.uint8)).save(f"{folder}/{place:02d}.png")
        Path(f"{folder}/{place:02d}.txt").write_text(f"picture {place}")


def latents(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32}
    return pipeline("a red fox", **size, num_inference_steps=1, generator=generator, output_type="latent").images


def test_some_hundred_pictures_become_a_lora_of_sdxl_that_diffusers_loads(capsys):
    paint("FOLDER", red=150)
    page = read("README.md", "Your pictures")
    train = typed("README.md", "Your pictures", "train sdxl")
    assert "`spin-diffusion plan` with the same flags" in page
    assert main(["plan", *train[2:], *TRAINED, "--rounds", "1"]) == 0
    assert main([*train, *TRAINED, "--rounds", "1"]) == 0
    assert Path(code(page, r"[\w/-]+/previews.png")).is_file()
    # The same command goes further with more rounds
    assert code(page, "--rounds 5")
    assert main([*train, *TRAINED, "--rounds", "2"]) == 0 and Path("runs/mine/round-2/lora").is_dir()

    assert Path(code(page, r"[\w/-]+/kohya.safetensors")).is_file()
    pipeline = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    before = latents(pipeline)
    exec(code(page, r"pipeline\.load_lora_weights\(.*?\)"), {"pipeline": pipeline})
    assert not torch.equal(latents(pipeline), before)

    capsys.readouterr()
    assert evaluate(typed("README.md", "Compare models or pictures", "evaluate")) == 0
    page = read("README.md", "Compare models or pictures")
    verdicts = re.findall(r"\*(\w+)\*", page)
    said = re.search(r"^mine at guidance \S+: (\w+)\.", capsys.readouterr().out, re.MULTILINE)
    assert said is not None and said[1] in verdicts and Path(code(page, r"[\w/-]+/report.html")).is_file()


def test_the_published_setting_of_sd_15_is_trained_and_evaluated(tiny_parquet):
    Path("data/pickapic_v2").mkdir(parents=True)
    Path("data/pickapic_v2/train-00000.parquet").symlink_to(tiny_parquet)
    train = typed("docs/images.md", "The run", "train sd")
    assert main([*train, *TRAINED, "--max_train_steps", "1"]) == 0
    assert evaluate(typed("docs/images.md", "The run", "evaluate")) == 0
    results = read_results(Path("runs/card-scores/results.json"))
    assert [(model["name"], model["kind"]) for model in results["models"]] == [
        ("base", "pipeline"),
        ("round3", "round"),
    ]
    unet = UNet2DConditionModel.from_pretrained("runs/card/unet")
    StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", unet=unet)


def test_a_file_of_conversations_becomes_a_language_model_that_transformers_loads(capsys):
    page = read("README.md", "Language models")
    line = code(page, r"\{\"messages\".*?\}\]\}")
    lines = (LANGUAGE / "data" / "train.jsonl").read_text().splitlines()[:47]
    assert json.loads(line).keys() == json.loads(lines[0]).keys()
    Path("FILE.jsonl").write_text("\n".join([line, *lines]))
    small = "--rounds 1 --max_train_steps 2 --max_length 48 --max_new_tokens 24 --mixed_precision no"
    assert main([*typed("README.md", "Language models", "train llm"), *small.split()]) == 0
    assert "read 48 rows: used 48" in capsys.readouterr().out, "README's line among them"
    assert main(typed("README.md", "Language models", "export")) == 0
    served = next(words for words in commands_of(page) if words[0] == "vllm")
    assert Path(served[-1], "model.safetensors").is_file()
    commands = [*commands_of(read("docs/language-models.md", "Use the result"))]
    (script,) = [words[2] for words in commands if words[:2] == ["python", "-c"]]
    capsys.readouterr()
    exec(script, {})
    assert "generated_text" in capsys.readouterr().out


def test_two_folders_of_pictures_are_compared(capsys):
    paint("FOLDER", red=60, number=20)
    paint("OTHER_FOLDER", red=68, number=20)
    command = typed("README.md", "Compare models or pictures", "evaluate", 1)
    assert evaluate(command) == 0
    assert "new: improved." in capsys.readouterr().out and Path("runs/folders/report.html").is_file()
    # In continuous integration, the other way round
    fail_on = code(read("README.md", "Compare models or pictures"), r"--fail_on \w+").split()
    assert evaluate([*command, *fail_on]) == 0
    assert evaluate([*command, *fail_on, "--baseline", "new", "--output_dir", "runs/turned"]) == 3


IN_ORDER = ("README.md", *(f"docs/{name}.md" for name in ("images", "evaluation", "extending", "hardware")))
IN_ORDER += ("docs/language-models.md",)
"""The pages whose commands are typed one after the other: what one makes, another shows or goes on with."""
SMALL = {
    "demo": "--max_train_samples 24 --max_train_steps 2 --num_inference_steps 1 --max_validation_prompts 4",
    "train sdxl": f"{DRAWN} --max_train_steps 1 --gradient_accumulation_steps 1 --mixed_precision no",
    "train llm": "--max_train_steps 1 --gradient_accumulation_steps 1 --max_length 48 --max_new_tokens 8 "
    "--num_held_out 4 --mixed_precision no --dataset_name FILE.jsonl --held_out_dataset_name OTHER.jsonl",
    "plan": f"{DRAWN} --max_train_steps 1 --mixed_precision no --num_held_out 20 --output_dir runs/planned",
    "compare": "--only_worlds [confused] --only_methods [sft] --seeds [0] --learning_rates [1e-4] --budget steps "
    "--total_steps 3 --num_validation_prompts 2 --num_test_prompts 100 --images_per_prompt 1 --num_inference_steps 1 "
    "--training '{max_train_samples: 24, real_parts: 1, rounds: 1, num_inference_steps: 1, train_batch_size: 4}'",
}
SMALL |= {"train sd": SMALL["train sdxl"]}
"""What makes a command's work small."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_ours_on_the_pages_runs_as_it_stands(tiny_parquet):
    """Those of make, SLURM and vLLM are not ours, and those with `...` are only begun on the page."""
    paint("FOLDER", red=60, number=100)
    paint("OTHER_FOLDER", red=68, number=100)
    Path("assets").symlink_to(ROOT / "assets")
    Path("data/pickapic_v2").mkdir(parents=True)
    Path("data/pickapic_v2/train-00000.parquet").symlink_to(tiny_parquet)
    lines = (LANGUAGE / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    Path("FILE.jsonl").write_text("".join(lines[:48]))
    Path("OTHER.jsonl").write_text("".join(lines[48:60]))
    assert main(["demo", *SMALL["demo"].split()]) == 0
    typed, failed = 0, []
    for page in IN_ORDER:
        for block in re.findall(r"^```python\n(.*?)^```$", text_of(ROOT / page), re.DOTALL | re.MULTILINE):
            if named := re.match(r'"""(\w+\.py):', block):
                Path(named[1]).write_text(block)
        for words in commands_of(text_of(ROOT / page)):
            name, given = called(words)
            if not name or "..." in words:
                continue
            print(page, name, *given, flush=True)
            command = [*name.split(), *given]
            if "runs/old" in given:
                shutil.copytree("runs/new", "runs/old")
            code = evaluate(command) if name == "evaluate" else main([*command, *shlex.split(SMALL.get(name, ""))])
            failed += [f"{page}: {' '.join(command)}"] if code != 0 else []
            typed += 1
    assert typed > 20 and not failed
