"""The presets that people start from run as their heads say, on a folder of pictures as people have them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.diffusion.images import crop, fitting_lines
from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.runs.advice import rate_line, visits_line, visits_of_round
from spin_diffusion.store.files import read_json
from tests.cli.test_scripts import ROOT, run
from tests.llm.playing import LANGUAGE

CONFIGS = ROOT / "training" / "configs"
OF_PICTURES = ["sdxl_lora_24gb", "sdxl_lora_12gb", "sd15_lora_8gb", "sdxl_full_80gb"]
BROKEN = ("cut.jpg", "empty.png", "page.jpg")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """58 pictures of many sizes with two captions among them, also grey, transparent and turned ones; three broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(58):
        height, width = rng.integers(20, 70, 2)
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        exif = image.getexif()
        if number == 0:
            image = image.convert("L")
        elif number == 1:
            image.putalpha(100)
        elif number == 2:
            exif[0x0112] = 6
        image.save(folder / f"{number:02d}.png", exif=exif)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(60))
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    for path in [*folder.iterdir()]:
        path.with_suffix(".txt").write_text("my dog" if path.name < "30" else "my dog, asleep")
    return folder


@pytest.mark.parametrize("name", OF_PICTURES)
def test_a_preset_trains_on_a_folder_of_odd_pictures(name, pictures, sd1_dir, sdxl_dir, tmp_path, capsys):
    family, base = ("sd", sd1_dir) if name.startswith("sd15") else ("sdxl", sdxl_dir)
    small = ["--rounds", "1", "--max_train_steps", "2", "--resolution", "32", "--num_inference_steps", "1"]
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--train_data_dir", str(pictures), *small]
    argv += ["--pretrained_model_name_or_path", str(base), "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert run(f"train_spin_{family}.py", *argv) == 0
    said = capsys.readouterr().out
    assert "read 61 rows: used 58, left out 3" in said and "repeated" not in said
    assert all(f"    {broken}: " in said for broken in BROKEN), "each is named"
    for line in ("Cropped ", "Enlarged ", " visits of each sample"):
        assert line in said
    record = read_json(tmp_path / "out" / "round-1" / "round.json")
    assert record["state"] == "PROMOTED" and record["training"]["steps"] == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("58 pairs", 'alt="Previews of', "1 round, 2 steps; at the end r of real", "It is over."):
        assert part in page, f"{part}: nothing is evaluated, and there is a page"
    saved = tmp_path / "out" / ("unet" if "full" in name else "lora")
    assert any(saved.glob("*.safetensors"))


def test_the_preset_of_language_trains_on_a_file_with_damaged_lines(tmp_path, capsys):
    lines = (LANGUAGE / "data" / "train.jsonl").read_text().splitlines()[:60]
    for place in (7, 20, 41):
        lines[place] = lines[place][:-5]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    small = ["--rounds", "1", "--max_train_steps", "2", "--max_length", "48", "--max_new_tokens", "24"]
    argv = ["--config", str(CONFIGS / "space_peft.yaml"), "--dataset_name", str(tmp_path / "mine.jsonl"), *small]
    argv += ["--model_name_or_path", str(LANGUAGE / "base"), "--report_to", "none"]
    assert run("train_space_llm.py", *argv, "--output_dir", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert all(f"    mine.jsonl line {place}: not JSON" in said for place in (8, 21, 42))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", [*OF_PICTURES, "space_peft"])
def test_a_preset_names_no_data_and_fits_300_samples(name):
    parse = parse_language_config if name == "space_peft" else parse_config
    text = (CONFIGS / f"{name}.yaml").read_text()
    config = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--dataset_name", "mine"])
    flat = config.flat()
    assert "dataset_name:" not in text and not flat.get("one_image_per_prompt")
    assert f"--config training/configs/{name}.yaml" in text and "a sum and not a measurement" in text
    assert rate_line([flat["learning_rate"]], flat["use_lora"], 2_600_000_000) is None
    assert 1 < visits_of_round(config, 300, 1, 1) < 10
    if name != "space_peft":
        assert flat["max_aspect_ratio"] > 1 and flat["preview_every"]


@pytest.mark.parametrize(
    ("rate", "use_lora", "weights", "said"),
    [
        (1e-6, True, 10**9, "1e-06 is one for all weights"),
        (1e-4, False, 10**9, "0.0001 is one for an adapter"),
        (1e-5, True, 10**9, None),
        (2e-5, False, 10**9, None),
        (1e-3, False, 10**6, None),
    ],
)
def test_a_rate_of_the_other_way_of_training_is_said(rate, use_lora, weights, said):
    line = rate_line([rate], use_lora, weights)
    assert line is None if said is None else said in str(line)


def test_many_visits_of_each_sample_are_said():
    needed = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "mine"]
    config = parse_config([*needed, "--max_train_steps", "60", "--train_batch_size", "128"])
    visits = visits_of_round(config, 60, 1, 1)
    assert visits == 128 and "each real sample 128 times" in str(visits_line(visits))
    assert visits_line(5.0) is None


def test_what_was_cropped_and_enlarged_is_counted():
    frames = [crop(Image.new("RGB", size), (32, 32))[1] for size in ((32, 32), (64, 32), (128, 64), (16, 16), (8, 16))]
    cropped, enlarged = fitting_lines(np.array(frames))
    assert "3 of 5 images, by 50% of their area in the median and 50% at most" in cropped
    assert "2 of 5 images, 3 times in the median and 4 at most" in enlarged
    assert fitting_lines(np.array(frames[:1])) == []
