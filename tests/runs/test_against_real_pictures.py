"""evaluation/evaluate.py with real pictures to compare with, and what is concluded where kinds of pictures are lost."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spin_diffusion.evaluation.records import read_results
from spin_diffusion.evaluation.verdicts import promotion
from spin_diffusion.runs.real_pictures import of_place
from tests.runs.test_evaluate_command import refused, run

PROMPTS = 120
FEATURES = """
import numpy as np, torch
def load(device):
    def embed(images):
        open(__file__ + ".calls", "a").write("x" * len(images))
        small = [np.asarray(image.resize((2, 2))).reshape(-1) / 40 for image in images]
        return torch.tensor(np.stack(small)).float()
    return embed
"""
LIKES_RED = """
import numpy as np, torch
from spin_diffusion.evaluation.scorers import About
ABOUT = About(title="Redness", scale="0 to 255", role="held-out")
def load(device):
    return lambda images, prompts: torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])
"""


class World:
    """Real pictures are red or green; the baseline draws both, and the collapsed model red ones alone, but well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.features, self.scorer = folder, folder / "seen.py", folder / "red.py"
        self.features.write_text(FEATURES)
        self.scorer.write_text(LIKES_RED)
        self.real = self.pictures("real", ["red", "green"], 12, 130, captioned=False)
        self.baseline = self.pictures("before", ["red", "green"], 15)
        self.collapsed = self.pictures("after", ["red"], 8)

    def pictures(
        self, name: str, kinds: list[str], spread: float, number: int = PROMPTS, captioned: bool = True
    ) -> Path:
        folder = self.folder / name
        folder.mkdir()
        rng = np.random.default_rng(len(name) + number)
        lines = []
        for place in range(number):
            centre = {"red": (180, 70, 60), "green": (60, 160, 80)}[kinds[place % len(kinds)]]
            pixels = np.clip(rng.normal(centre, spread, (2, 2, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(folder / f"{place:03d}.png")
            lines.append(json.dumps({"file_name": f"{place:03d}.png", "prompt": f"picture {place}"}))
        if captioned:
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    def evaluate(self, *argv: str) -> int:
        return run(
            "evaluate.py", "--models", f"before={self.baseline}", f"after={self.collapsed}", "--images_per_prompt", "1",
            "--scorers", str(self.scorer), "--distribution_features", str(self.features),
            "--reference_images", str(self.real), "--output_dir", str(self.folder / "out"), *argv,
        )  # fmt: skip

    @property
    def embedded(self) -> int:
        return len(Path(f"{self.features}.calls").read_text())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_model_that_lost_a_kind_of_pictures_is_not_called_improved(world: World, capsys) -> None:
    assert world.evaluate() == 0
    results = read_results(world.folder / "out" / "results.json")
    compared = results["distribution"]
    assert (compared["num_real"], compared["num_images"], compared["left_out"]) == (130, PROMPTS, "")
    after = {row["metric"]: row for row in compared["distances"] if row["model"] == "after"}
    assert after["precision"]["difference_low"] > 0
    assert after["recall"]["difference_high"] < 0 and after["coverage"]["difference_high"] < 0
    assert after["fd"]["better"] == "lower" and after["fd"]["difference_low"] > 0

    assert results["comparisons"][0]["verdict"] == "improved"  # redder they are
    (verdict,) = results["verdicts"]
    assert verdict["verdict"] == "suspect"
    assert verdict["reason"].startswith(
        "The model is better than the baseline by red, but its images cover less of the real ones than the baseline's: "
        "recall and coverage fell."
    )
    assert promotion(results, "improved")[0] is False
    table = (world.folder / "out" / "table.md").read_text()
    assert "| model | guidance | fd | kid | precision | recall | density | coverage |" in table
    assert "Against real pictures" in (world.folder / "out" / "report.html").read_text()
    assert "Distribution of 120 pictures against 130 real ones" in capsys.readouterr().out


def test_features_are_kept_until_a_picture_or_the_embedding_changes(world: World) -> None:
    assert world.evaluate() == 0 and world.embedded == 130 + 2 * PROMPTS
    first = read_results(world.folder / "out" / "results.json")
    assert world.evaluate() == 0 and world.embedded == 130 + 2 * PROMPTS
    assert read_results(world.folder / "out" / "results.json") == first
    Image.new("RGB", (16, 16), "red").save(world.real / "000.png")
    assert world.evaluate() == 0 and world.embedded == 2 * 130 + 2 * PROMPTS
    assert read_results(world.folder / "out" / "results.json") != first
    world.features.write_text(FEATURES.replace("/ 40", "/ 20"))
    assert world.evaluate() == 0 and world.embedded == 3 * 130 + 4 * PROMPTS


def test_too_few_pictures_are_said_in_a_line_and_not_in_numbers(world: World, capsys) -> None:
    assert world.evaluate("--max_prompts", "99") == 0
    compared = read_results(world.folder / "out" / "results.json")["distribution"]
    said = (
        "Of the distribution nothing is told: it takes 100 pictures of 20 prompts and as many real ones, and there are"
    )
    assert compared["distances"] == [] and said in capsys.readouterr().out
    assert said in (world.folder / "out" / "report.html").read_text()


def test_damaged_pictures_are_said_or_named(world: World, capsys) -> None:
    files = [path.read_bytes() for path in sorted(world.real.iterdir())][:19] + [b"broken"]
    rows = pa.table({"image": files, "text": [f"picture {place}" for place in range(20)]})
    pq.write_table(rows, world.folder / "real.parquet")
    given = of_place(str(world.features), str(world.folder / "real.parquet"), 16, world.folder / "out")
    assert (len(given.real), given.said) == (19, "real.parquet (1 damaged left out)")
    (world.real / "050.png").write_bytes(b"broken")
    refused(capsys, world.evaluate(), "number 51 of the 130 real pictures in their order (real): not a PNG")


def test_what_is_missing_is_refused_in_one_line(world: World, capsys) -> None:
    refused(capsys, world.evaluate("--reference_images", str(world.folder / "none")), "none does not exist")
    refused(capsys, world.evaluate("--distribution_features", "dino"), "did you mean dinov2?")
    code = run("evaluate.py", "--models", f"a={world.baseline}", "--scorers", "sharpness", "--reference_images",
               str(world.real), "--output_dir", str(world.folder / "other"))  # fmt: skip
    refused(capsys, code, "--distribution_features and --reference_images need each other")
