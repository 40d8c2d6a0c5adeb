"""A stored number belongs to exactly what made it: scorers, weights, pictures and prompts that change under a name."""

import json
import os
import runpy
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from tokenizers import normalizers

from spin_diffusion.diffusion.base import load_checkpoint, parts_hash
from spin_diffusion.evaluation.evaluated import first_not_run
from spin_diffusion.evaluation.judges import __name__ as JUDGES
from spin_diffusion.evaluation.prompt_sets import PromptRow, PromptSet
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.specs import part_key
from spin_diffusion.samples.sampling import REAL_SIZE, Sampling, precision_of
from tests.runs.test_evaluate_command import ROOT, evaluate, run, write_pictures

PROMPTS = [f"picture {n}" for n in range(5)]
SCORER = """
import torch
from pathlib import Path
from helper import added
def load(device, path=None):
    given = float(Path(path or {weights!r}).read_text())
    def score(images, prompts):
        open(__file__ + ".calls", "a").write("x" * len(images))
        reds = [sum(i.convert("RGB").split()[0].getdata()) / (i.width * i.height) for i in images]
        return torch.tensor(reds) + {constant} + added + given
    return score
"""


class World:
    """Two folders of pictures, and a scorer that reads a file beside it and one of weights."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.out = folder, folder / "out"
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "helper", raising=False)
        self.scorer, self.helper, self.weights = folder / "mine.py", folder / "helper.py", folder / "head.txt"
        self.write(constant=0.0)
        self.helper.write_text("added = 0.0\n")
        self.weights.write_text("0.0")
        self.dark = write_pictures(folder / "dark", PROMPTS, 20)
        self.light = write_pictures(folder / "light", PROMPTS, 90)
        self.spec = str(self.scorer)

    def write(self, constant: float) -> None:
        self.scorer.write_text(SCORER.format(weights=str(self.weights), constant=constant))

    def evaluate(self, *names: str, images: int = 2) -> int:
        models = [f"{name}={getattr(self, name)}" for name in names]
        return run("evaluate.py", "--models", *models, "--scorers", self.spec, "--images_per_prompt", str(images),
                   "--output_dir", str(self.out))  # fmt: skip

    def calls(self) -> int:
        path = Path(f"{self.scorer}.calls")
        return len(path.read_text()) if path.exists() else 0

    def reds(self, folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        return [float(np.asarray(Image.open(folder / line["file_name"]))[..., 0].mean()) for line in lines]

    def check(self, added: float = 0.0) -> None:
        """Table and results hold what the scorer, as it is now, says of the pictures as they are now."""
        table = pq.read_table(self.out / "scores.parquet").to_pylist()
        for name in dict.fromkeys(row["model"] for row in table):
            found = [row["score"] for row in table if row["model"] == name]
            assert found == pytest.approx([red + added for red in self.reds(getattr(self, name))], abs=1e-3)
        results = read_results(self.out / "results.json")
        assert results["scorers"][0]["key"] == part_key(SCORERS, self.spec)
        means = {entry["model"]: entry["mean"] for entry in results["results"] if entry["aggregate"] == "mean"}
        for name, mean in means.items():
            assert mean == pytest.approx(np.mean(self.reds(getattr(self, name))) + added, abs=1e-3)


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    return World(tmp_path, monkeypatch)


CHANGES = {
    "its code": lambda w: w.write(constant=7.0),
    "a file that it imports": lambda w: w.helper.write_text("added = 7.0\n"),
    "a file that it names": lambda w: w.weights.write_text("7.0"),
    "its code, as long as before and with the old times": lambda w: _replaced(w.scorer, "+ 0.0", "+ 7.0"),
}


def _replaced(path: Path, old: str, new: str) -> None:
    times = path.stat()
    assert len(old) == len(new) and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_scorer_scores_everything_anew(change, world):
    assert world.evaluate("dark") == 0 and world.calls() == 10
    CHANGES[change](world)
    # A model is added: the other one's scores are not kept beside its
    assert world.evaluate("dark", "light") == 0
    assert world.calls() == 30
    world.check(added=7.0)
    assert world.evaluate("dark", "light") == 0 and world.calls() == 30


@pytest.mark.parametrize("given", ["a file", "a folder"])
def test_replaced_weights_of_a_scorer_score_everything_anew(given, world):
    place = world.folder / "weights"
    place.mkdir()
    weights = place / "head.txt"
    weights.write_text("1.0")
    world.spec = f"{world.scorer}={weights}"
    if given == "a folder":
        world.spec = f"{world.scorer}={place}"
        world.scorer.write_text(world.scorer.read_text().replace("Path(path or ", "(Path(path) / 'head.txt' or "))
    assert world.evaluate("dark", "light") == 0
    world.check(added=1.0)
    weights.write_text("2.0")
    assert world.evaluate("dark", "light") == 0 and world.calls() == 40
    world.check(added=2.0)
    # The same bytes at another place are the same weights
    shutil.copytree(place, world.folder / "moved")
    world.spec = world.spec.replace(f"={place}", f"={world.folder / 'moved'}")
    assert world.evaluate("dark", "light") == 0 and world.calls() == 40


def test_a_replaced_picture_is_scored_anew_and_so_is_a_damaged_copy(world, capsys):
    assert world.evaluate("dark", "light") == 0
    Image.new("RGB", (16, 16), (200, 10, 20)).save(world.light / "1-0.png")
    for y in range(16):
        image = Image.open(world.light / "1-0.png")
        image.putpixel((y, y), (0, 0, 0))
        image.save(world.light / "1-0.png")
    assert world.evaluate("dark", "light") == 0 and world.calls() == 30  # the file of that model's scores
    world.check()
    # The copies below the output folder
    copies = sorted((world.out / "images" / "dark" / "given").glob("*.png"))
    whole = {path: path.read_bytes() for path in copies}
    shutil.copyfile(copies[1], copies[0])
    copies[2].unlink()
    copies[3].write_bytes(b"half")
    assert world.evaluate("dark", "light") == 0 and world.calls() == 30
    assert {path: path.read_bytes() for path in copies} == whole
    assert f"{copies[0]} is lost or damaged" in capsys.readouterr().out
    world.check()


@pytest.mark.parametrize("what", ["index", "scores", "record"])
def test_files_of_an_evaluation_that_are_damaged_are_made_anew(what, world):
    assert world.evaluate("dark", "light") == 0
    path = {
        "index": world.out / "images" / "dark" / "given" / "00000-of-00001.jsonl",
        "scores": world.out / "scores" / "dark" / "mine" / "given" / "00000-of-00001.parquet",
        "record": world.out / "scores" / "dark" / "mine" / "scorer.json",
    }[what]
    whole = path.read_bytes()
    at = {"index": whole.find(b'"k": 1') + 5, "scores": len(whole) // 4, "record": whole.find(b'"key": "') + 9}[what]
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for harmed in (whole[: len(whole) // 2], changed, b"", None):
        path.write_bytes(harmed) if harmed is not None else path.unlink()
        assert world.evaluate("dark", "light") == 0
        assert path.read_bytes() == whole
        world.check()


def test_scores_of_a_scorer_that_is_gone_stay_together_or_not_at_all(world, capsys):
    world.spec = f"{world.scorer}={world.weights}"
    assert world.evaluate("dark", "light") == 0
    before = read_results(world.out / "results.json")
    world.weights.unlink()
    assert world.evaluate("dark", "light") == 0
    assert "scorer mine cannot be run now" in (said := capsys.readouterr().out) and "gave before stay" in said
    assert read_results(world.out / "results.json") == before
    # With a further model there would be one without: then there is no score at all
    world.more = write_pictures(world.folder / "more", PROMPTS, 50)
    assert world.evaluate("dark", "light", "more") == 2
    assert read_results(world.out / "results.json")["scorers"][0]["state"] == "not run"


def test_scores_of_two_versions_are_never_compared():
    said = [{"name": "mine", "state": "run", "key": key, "reason": ""} for key in ("a", "b")]
    assert first_not_run(said)["state"] == "not run" and "same version" in first_not_run(said)["reason"]
    assert first_not_run([said[0], said[0]])["state"] == "run"


def test_a_built_in_scorer_is_its_code_and_its_weights(tmp_path):
    keys = {part_key(SCORERS, "sharpness"), part_key(SCORERS, "pickscore"), part_key(SCORERS, "clip_h14")}
    keys |= {part_key(JUDGES, "length"), part_key(JUDGES, "distinct")}
    for content in (torch_ones(1), torch_ones(2)):
        safetensors.torch.save_file(content, tmp_path / "model.safetensors")
        file = tmp_path / "model.safetensors"
        specs = [
            f"clip_l14={tmp_path}",
            f"clip_l14={file}",
            f"openclip=ViT-B-32/{file}",
            f"openclip=local-dir:{tmp_path}",
        ]
        keys |= {part_key(SCORERS, spec) for spec in specs}
        keys.add(part_key(JUDGES, f"reward_model={tmp_path}"))
    keys |= {part_key(SCORERS, f"openclip=ViT-B-32/{tag}") for tag in ("laion2b_s34b_b79k", "openai")}
    assert len(keys) == 5 + 2 * 5 + 2
    assert part_key(SCORERS, "sharpness") == part_key(SCORERS, "sharpness")


def torch_ones(value: float) -> dict:
    return {"a": torch.full((2,), float(value))}


# Who drew a picture, and by which protocol

SAMPLING = Sampling("ddim", num_inference_steps=4, guidance_scale=3.0, resolution=32)
REST = {"images_per_prompt": 2, "seed": 0, "sampling": SAMPLING, "guidance_scales": [3.0]}


def test_everything_that_decides_a_picture_but_the_model_is_in_the_protocols_id():
    prompts = PromptSet("p", (PromptRow("00000", "a fox"), PromptRow("00001", "a hen")), "0" * 64, "", "")
    id_ = protocol_of(prompts, **REST)["id"]
    others = [{"images_per_prompt": 1}, {"seed": 1}, {"guidance_scales": [3.0, 1.0]}]
    drawing = {"sampler": "dpmpp", "num_inference_steps": 5, "resolution": 64, "precision": "bf16",
               "size_condition": REAL_SIZE, "prediction_scale": 1.04}  # fmt: skip
    others += [{"sampling": replace(SAMPLING, **{name: value})} for name, value in drawing.items()]
    ids = {protocol_of(prompts, **REST | other)["id"] for other in others}
    assert {*drawing, "guidance_scale"} == {field.name for field in fields(Sampling)}
    assert len({id_, *ids}) == 1 + len(others)
    assert protocol_of(prompts, **REST)["id"] == id_
    words = {precision_of(kind, tf32) for kind in ("no", "fp16", "bf16") for tf32 in (False, True)}
    assert len(words) == 6 and precision_of("no") == "fp32"


def test_a_model_whose_parts_are_replaced_under_its_path_is_drawn_anew(sdxl_dir, tiny_prompts, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(sdxl_dir, base)
    models = [f"base={base}", f"original={sdxl_dir}"]
    assert evaluate(tmp_path, tiny_prompts, "sharpness", models=models) == 0

    def scores(name: str) -> list[float]:
        rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
        return [row["score"] for row in rows if row["model"] == name]

    first = scores("base")
    assert first == scores("original")
    seen = [first]
    for part in ("unet", "vae", "text_encoder_2", "scheduler"):
        if part == "scheduler":
            config = base / "scheduler" / "scheduler_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.02}))
        else:
            path = next((base / part).glob("*.safetensors"))
            tensors = {name: tensor * 1.1 for name, tensor in safetensors.torch.load_file(path).items()}
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        capsys.readouterr()
        assert evaluate(tmp_path, tiny_prompts, "sharpness", models=models) == 0
        assert "belongs to something else" in capsys.readouterr().out, part
        assert scores("base") not in seen and scores("original") == first, part
        seen.append(scores("base"))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert evaluate(fresh, tiny_prompts, "sharpness", models=models) == 0
    again = pq.read_table(fresh / "out" / "scores.parquet").to_pylist()
    assert scores("base") == [row["score"] for row in again if row["model"] == "base"]


def test_a_pipeline_is_the_same_whatever_its_tokenizers_were_asked(sdxl_dir):
    _, pipeline = load_checkpoint(str(sdxl_dir))
    before = parts_hash(pipeline)
    for asked in ({"padding": "max_length", "truncation": True, "max_length": 77}, {"truncation": True}, {}):
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            tokenizer(["a fox", "a red hen"], **asked)
        assert parts_hash(pipeline) == before
    pipeline.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert parts_hash(pipeline) != before


# Inside a run


def settings_of(world: World, sdxl_dir, tiny_parquet, tiny_prompts, **more) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": sdxl_dir, "dataset_name": tiny_parquet, "resolution": 32, "rounds": 1,
        "max_train_samples": 8, "max_train_steps": 1, "train_batch_size": 4, "learning_rate": 1e-4, "beta": 2000,
        "num_inference_steps": 2, "sampler": "ddim", "guidance_scale": 3, "validation_prompts": tiny_prompts,
        "scorers": f"[{world.spec}]", "report_to": "none", "output_dir": world.out, "promote_if": "not_regressed",
        "preview_every": 0,
    }  # fmt: skip
    return [str(word) for key, value in (settings | more).items() for word in (f"--{key}", value)]


def test_a_run_that_goes_on_with_an_edited_scorer_scores_its_base_and_rounds_anew(
    world, sdxl_dir, tiny_parquet, tiny_prompts, capsys
):
    train = runpy.run_path(str(ROOT / "training" / "train_spin_sdxl.py"))["main"]
    given = (world, sdxl_dir, tiny_parquet, tiny_prompts)
    assert train(settings_of(*given)) == 0 and world.calls() == 8

    def scores(folder: Path) -> dict[str, list[float]]:
        rows = pq.read_table(folder / "scores.parquet").to_pylist()
        return {
            name: [r["score"] for r in rows if r["model"] == name] for name in dict.fromkeys(r["model"] for r in rows)
        }

    before = scores(world.out)
    world.write(constant=500.0)
    pictures = {path: path.read_bytes() for path in world.out.rglob("*.png")}
    lost = world.out / "round-1" / "evaluation" / "images" / "guidance-3" / "00001-0.png"
    shutil.rmtree(lost.parent)  # somebody made room
    capsys.readouterr()
    assert train(settings_of(*given, rounds=2)) == 0
    said = capsys.readouterr().out
    assert "spin round 1: its samples in" in said and "are made anew" in said
    after = scores(world.out)
    for name, values in before.items():
        assert after[name] == pytest.approx([value + 500 for value in values], abs=1e-3)
    assert all(path.read_bytes() == content for path, content in pictures.items() if path.name != "samples.png")
    # What was concluded of the first round is by the new scorer too; what was decided stays
    of_round = scores(world.out / "round-1" / "evaluation")
    assert min(score for values in of_round.values() for score in values) > 500
    results = read_results(world.out / "results.json")
    assert results["protocol"]["precision"] == "fp32"
    assert world.calls() == 8 + 12
    # Once more: nothing is scored or drawn, and all is as it was
    assert train(settings_of(*given, rounds=2)) == 0 and world.calls() == 20
    assert scores(world.out) == after and "anew" not in capsys.readouterr().out
