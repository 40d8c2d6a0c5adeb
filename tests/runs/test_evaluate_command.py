"""evaluation/evaluate.py and report.py as a user runs them."""

import fcntl
import json
import os
import runpy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.model_sources import read_given_pictures, read_source
from spin_diffusion.evaluation import distribution
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.runs import sweep
from spin_diffusion.store.folder import release
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import MARKER

ROOT = Path(__file__).resolve().parents[2]
SCORER = """
import torch
from spin_diffusion.evaluation.scorers import About
ABOUT = About(title="Redness", scale="mean of the red channel, 0 to 255", role="held-out")
def load(device, path=None):
    calls = __file__ + ".calls"
    def score(images, prompts):
        open(calls, "a").write("x" * len(images))
        return torch.tensor([sum(i.convert("RGB").split()[0].getdata()) / (i.width * i.height) for i in images])
    return score
"""


def run(script: str, *argv: str) -> int:
    return runpy.run_path(str(ROOT / "evaluation" / script))["main"](list(argv))


def refused(capsys, code: int, *parts: str) -> None:
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(error) == 1, error
    for part in parts:
        assert part in error[0]


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    path = tmp_path / "redness.py"
    path.write_text(SCORER)
    return path


def scored(scorer: Path) -> int:
    calls = Path(f"{scorer}.calls")
    return len(calls.read_text()) if calls.exists() else 0


@pytest.fixture
def brighter(sdxl_dir, tmp_path: Path) -> Path:
    """A round of a run: another UNet, and the manifest that names its base."""
    folder = tmp_path / "run" / "round-1"
    unet = UNet2DConditionModel.from_pretrained(sdxl_dir, subfolder="unet")
    unet.conv_out.bias.data += 0.2
    unet.save_pretrained(folder / "unet")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"base": Base(str(sdxl_dir)).as_dict()}))
    return folder


def evaluate(tmp_path: Path, prompts: Path, scorers: str, *argv: str, models: list[str]) -> int:
    return run(
        "evaluate.py", "--models", *models, "--prompts", str(prompts), "--scorers", scorers, "--images_per_prompt", "2",
        "--num_inference_steps", "2", "--guidance_scale", "3", "--resolution", "32",
        "--output_dir", str(tmp_path / "out"), *argv,
    )  # fmt: skip


def write_pictures(folder: Path, prompts: list[str], level: int, images: int = 2) -> Path:
    folder.mkdir()
    rng, lines = np.random.default_rng(level), []
    for n, prompt in enumerate(prompts):
        for k in range(images):
            noise = rng.integers(0, 40, (16, 16, 3)) + level
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{n}-{k}.png")
            lines.append(json.dumps({"file_name": f"{n}-{k}.png", "prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_one_command_draws_scores_and_reports_and_the_same_command_does_nothing_twice(
    sdxl_dir, brighter, tiny_prompts, scorer, tmp_path, capsys
):
    models = [f"base={sdxl_dir}", f"round1={brighter}"]
    assert evaluate(tmp_path, tiny_prompts, f"{scorer},sharpness", models=models) == 0
    out = tmp_path / "out"
    results = read_results(out / "results.json")
    assert [model["kind"] for model in results["models"]] == ["pipeline", "round"]
    assert results["models"][1]["base"] == str(sdxl_dir) and len(results["models"][1]["weights_sha256"]) == 64
    assert {scorer["state"] for scorer in results["scorers"]} == {"run"}
    assert (out / "report.html").is_file() and (out / "images" / "round1" / "guidance-3" / "00000-0.png").is_file()
    table = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(table) == 2 * 2 * 4 * 2  # models, scorers, prompts, images
    assert all((out / row["file"]).is_file() for row in table)
    assert scored(scorer) == 16
    drawn = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}

    # Once more: nothing is drawn or scored again, and the conclusions are the same
    assert evaluate(tmp_path, tiny_prompts, f"{scorer},sharpness", models=models) == 0
    assert scored(scorer) == 16 and read_results(out / "results.json") == results
    # A third model is added: only its pictures are new
    assert evaluate(tmp_path, tiny_prompts, f"{scorer},sharpness", models=[*models, f"again={sdxl_dir}"]) == 0
    assert scored(scorer) == 24
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    # The same weights and seeds draw the same pictures
    comparisons = read_results(out / "results.json")["comparisons"]
    again = [c for c in comparisons if c["model"] == "again" and c["scorer"] == "redness"]
    assert again[0]["difference"] == 0 and again[0]["ties"] == 4
    # The page again, without scoring
    (out / "report.html").unlink()
    assert run("report.py", str(out)) == 0 and (out / "report.html").is_file() and scored(scorer) == 24
    # Another protocol in the same folder
    capsys.readouterr()
    refused(capsys, evaluate(tmp_path, tiny_prompts, str(scorer), "--seed", "1", models=models), "seed: 0 -> 1")
    refused(capsys, evaluate(tmp_path, tiny_prompts, str(scorer), models=[f"base={brighter}"]), "give it another name")


def test_a_player_is_compared_at_every_strength_with_a_curve_over_them(
    brighter, sdxl_dir, tiny_prompts, scorer, tmp_path, capsys
):
    models = [f"base={sdxl_dir}", f"half={brighter}@0.5", f"twice={brighter}@2", f"whole={brighter}@1.0"]
    assert evaluate(tmp_path, tiny_prompts, str(scorer), models=models) == 0
    results = read_results(tmp_path / "out" / "results.json")
    found = {m["name"]: (m["source"], m["strength"]) for m in results["models"]}
    assert found["half"] == (f"{brighter}@0.5", 0.5) and found["whole"] == (str(brighter), 1.0)
    hashes = {m["name"]: m["weights_sha256"] for m in results["models"]}
    assert len(set(hashes.values())) == 4
    moved = {c["model"]: abs(c["difference"]) for c in results["comparisons"]}
    assert 0 < moved["half"] < moved["whole"] < moved["twice"]
    assert 'id="strengths"' in (tmp_path / "out" / "report.html").read_text()
    refused(capsys, evaluate(tmp_path / "b", tiny_prompts, str(scorer), models=[f"base={sdxl_dir}@0.5"]), "@0.5 out")


def test_a_sweep_chooses_on_one_half_of_the_prompts_and_shows_its_gain_on_the_other(
    sdxl_dir, brighter, tiny_prompts, scorer, tmp_path, capsys
):
    sweep = ["--sweep", "{guidance_scale: [3, 1], num_inference_steps: [2, 3], prediction_scale: [1, 1.5]}"]
    models = [f"base={sdxl_dir}", f"round1={brighter}"]
    assert evaluate(tmp_path, tiny_prompts, str(scorer), *sweep, models=models) == 0
    out, drawn = tmp_path / "out", scored(scorer)
    results = read_results(out / "results.json")

    def means(folder: str, half: list[str], scale: str = "guidance-3") -> dict[str, float]:
        found: dict[str, list[float]] = {id_: [] for id_ in half}
        for path in (out / folder).glob(f"redness/{scale}/*.parquet"):
            for row in pq.read_table(path).to_pylist():
                if row["id"] in found:
                    found[row["id"]].append(row["score"])
        assert {len(of_prompt) for of_prompt in found.values()} == {2}
        return {id_: float(np.mean(of_prompt)) for id_, of_prompt in found.items()}

    ids = [f"{n:05d}" for n in range(4)]
    choose, show, at_best = ids[::2], ids[1::2], {}
    for entry in results["sweep"]:
        name, (default, *others) = entry["model"], entry["settings"]
        assert len(others) == 7 and (default["guidance_scale"], default["passes"]) == (3.0, 4)
        assert (entry["num_selection"], entry["num_held_out"]) == (2, 2)
        usual = means(f"scores/{name}", ids)
        assert default["mean"] == pytest.approx(np.mean([usual[id_] for id_ in choose]))
        for row in others:
            same = row["num_inference_steps"] == 2 and row["prediction_scale"] == 1 and row["guidance_scale"] == 3
            folder = f"{row['num_inference_steps']}-steps-x{row['prediction_scale']:g}/scores"
            where = f"guidance-{row['guidance_scale']:g}"
            found = means(f"sweep/{name}/selection/{folder}", choose, where)
            assert not same and row["mean"] == pytest.approx(np.mean([*found.values()]))
        best = max(entry["settings"], key=lambda row: row["mean"])
        assert entry["settings"][entry["chosen"]] == best and entry["chosen"] > 0
        folder = f"{best['num_inference_steps']}-steps-x{best['prediction_scale']:g}/scores"
        at_best[name] = means(f"sweep/{name}/held-out/{folder}", show, f"guidance-{best['guidance_scale']:g}")
        gain = [at_best[name][id_] - usual[id_] for id_ in show]
        assert entry["gain"]["difference"] == pytest.approx(np.mean(gain), abs=1e-6)
    apart = [at_best["round1"][id_] - at_best["base"][id_] for id_ in show]
    assert results["sweep"][1]["to_baseline"]["difference"] == pytest.approx(np.mean(apart), abs=1e-6)
    assert results["sweep"][0]["to_baseline"] is None
    said = capsys.readouterr().out
    assert said.count("in place of guidance 3, 2 steps, on the 2 prompts that did not choose") == 2
    assert (
        "what training gained" in (out / "table.md").read_text()
        and "Free settings" in (out / "report.html").read_text()
    )

    # The same command finds all of it there; what was lost is drawn again, to the same bytes
    before, lost = results, next((out / "sweep" / "round1" / "held-out").glob("*/images/*/00001-0.png"))
    picture = lost.read_bytes()
    assert evaluate(tmp_path, tiny_prompts, str(scorer), *sweep, models=models) == 0
    assert scored(scorer) == drawn and read_results(out / "results.json") == before
    lost.unlink()
    assert evaluate(tmp_path, tiny_prompts, str(scorer), *sweep, models=models) == 0
    assert lost.read_bytes() == picture and read_results(out / "results.json") == before


FEATURES = """
import numpy as np, torch
def load(device):
    return lambda images: torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1)) / 64 for image in images])).float()
"""


def test_a_sweep_by_distance_chooses_what_is_nearest_to_the_real_pictures(
    sdxl_dir, tmp_path, scorer, monkeypatch, capsys
):
    for module in (distribution, sweep):
        monkeypatch.setattr(module, "MIN_PICTURES", 20)
    (tmp_path / "many.txt").write_text("\n".join(f"picture {number}" for number in range(40)))
    (tmp_path / "colour.py").write_text(FEATURES)
    (real := tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        picture = np.clip(rng.normal(rng.uniform(80, 160, 3), 20, (32, 32, 3)), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(real / f"{number:02d}.png")
    argv = ["--images_per_prompt", "1", "--sweep", "{guidance_scale: [1, 8], by: fd}", "--distribution_features"]
    argv += [str(tmp_path / "colour.py"), "--reference_images", str(real)]
    models = [f"base={sdxl_dir}"]
    assert evaluate(tmp_path, tmp_path / "many.txt", str(scorer), *argv, models=models) == 0
    out = tmp_path / "out"
    results = read_results(out / "results.json")
    (entry,) = results["sweep"]
    assert (entry["scorer"], entry["better"]) == ("fd", "lower")

    def colours(paths: Iterable[Path]) -> np.ndarray:
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(paths)]
        return np.stack([picture.mean(axis=(0, 1)) / 64 for picture in pictures])

    def fd(half: str, scale: float) -> distribution.Replicates:
        folder = out / "images" / "base" if scale == 3 else next((out / "sweep" / "base" / half).iterdir()) / "images"
        found = colours((folder / f"guidance-{scale:g}").glob("*.png"))
        if scale == 3:  # the evaluation has drawn all prompts
            found = found[half == "held-out" :: 2]
        return distribution.measure(found[:, None], colours(real.glob("*.png")))["fd"]

    means = [row["mean"] for row in entry["settings"]]
    scales = [row["guidance_scale"] for row in entry["settings"]]
    expected = [distribution.interval("fd", fd("selection", scale)).mean for scale in scales]
    assert means == pytest.approx(expected, rel=1e-3) and entry["chosen"] == int(np.argmin(expected))
    best = scales[entry["chosen"]]
    apart = distribution.interval("fd", fd("held-out", best), fd("held-out", 3))
    assert entry["gain"]["difference"] == pytest.approx(apart.mean, rel=1e-3, abs=1e-9)
    said = capsys.readouterr().out
    assert "by fd (lower is better) without any training" in said or "no setting of the sampler beats" in said
    # The same command measures nothing anew
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert evaluate(tmp_path, tmp_path / "many.txt", str(scorer), *argv, models=models) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    capsys.readouterr()
    few = [*argv, "--max_prompts", "38", "--output_dir", str(tmp_path / "few")]
    refused(capsys, evaluate(tmp_path, tmp_path / "many.txt", str(scorer), *few, models=models), "there are 19 of 19")


def test_scores_of_saved_pictures_are_those_that_were_given_when_they_were_drawn(
    sdxl_dir, tiny_prompts, scorer, tmp_path
):
    assert evaluate(tmp_path, tiny_prompts, str(scorer), models=[f"base={sdxl_dir}", f"same={sdxl_dir}"]) == 0
    first = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    given = tmp_path / "out" / "images" / "base" / "guidance-3"
    assert run("evaluate.py", "--models", f"a={given}", f"b={given}", "--images_per_prompt", "2", "--scorers",
               str(scorer), "--output_dir", str(tmp_path / "again")) == 0  # fmt: skip
    second = pq.read_table(tmp_path / "again" / "scores.parquet").to_pylist()
    assert sorted(r["score"] for r in first if r["model"] == "base") == pytest.approx(
        sorted(r["score"] for r in second if r["model"] == "a"), abs=1e-6
    )


def test_a_scorer_that_cannot_run_is_reported_and_the_others_are_kept(sdxl_dir, tiny_prompts, scorer, tmp_path, capsys):
    models = [f"base={sdxl_dir}", f"same={sdxl_dir}"]
    assert evaluate(tmp_path, tiny_prompts, f"{scorer},pickscore={tmp_path / 'nowhere'}", models=models) == 0
    results = read_results(tmp_path / "out" / "results.json")
    states = {said["name"]: said for said in results["scorers"]}
    assert states["redness"]["state"] == "run" and states["pickscore"]["state"] == "not run"
    assert "nowhere" in states["pickscore"]["reason"] and "pickscore was not run" in capsys.readouterr().out
    assert not [row for row in results["results"] if row["scorer"] == "pickscore"]
    code = run("report.py", str(tmp_path / "out"), "--fail_on", "regressed")
    refused(capsys, code, "--fail_on regressed cannot be decided: pickscore could not be run")


def test_when_no_scorer_can_run_that_is_an_error_and_the_pictures_stay(sdxl_dir, tiny_prompts, tmp_path, capsys):
    models = [f"base={sdxl_dir}", f"same={sdxl_dir}"]
    code = evaluate(tmp_path, tiny_prompts, f"pickscore={tmp_path / 'nowhere'}", models=models)
    refused(capsys, code, "no scorer could be run", "nowhere")
    assert (tmp_path / "out" / "report.html").is_file()


def test_folders_of_pictures_are_compared_and_what_is_broken_is_counted(scorer, tmp_path, capsys):
    prompts = [f"picture {n}" for n in range(30)]
    dark = write_pictures(tmp_path / "dark", prompts, 20)
    light = write_pictures(tmp_path / "light", prompts, 120)
    (light / "3-0.png").write_bytes(b"no picture at all")
    (light / "4-1.png").unlink()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(light / "5-0.png")
    # Odd but whole pictures
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(16, 16, 4), "RGBA").save(light / "6-0.png")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(light / "7-0.png")
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(16, 16, 4), "CMYK").save(light / "8-0.tiff")
    Image.new("RGB", (1, 1)).save(light / "9-0.png")
    # Floats: not numbers, and numbers without a white
    for file, level in (("10-0.tiff", np.nan), ("11-0.tiff", 0.5)):
        Image.fromarray(np.full((16, 16), level, dtype=np.float32)).save(light / file)
    metadata = light / "metadata.jsonl"
    for name in ('"8-0', '"10-0', '"11-0'):
        (light / f"{name[1:]}.png").unlink()
        metadata.write_text(metadata.read_text().replace(f"{name}.png", f"{name}.tiff"))
    argv = ["--scorers", f"{scorer},sharpness", "--images_per_prompt", "2", "--output_dir", str(tmp_path / "out")]
    assert run("evaluate.py", "--models", f"dark={dark}", f"light={light}", *argv) == 0
    results = read_results(tmp_path / "out" / "results.json")
    what = {failure["prompt"]: failure["what"] for failure in results["failures"]}
    assert (
        "cannot be shown: not a PNG, JPEG, WebP, GIF, BMP or TIFF picture" in what["picture 3"]
        and "cannot be read" in what["picture 4"]
    )
    assert "constant" in what["picture 5"] and "constant" in what["picture 9"] and len(what) == 6
    assert "not finite" in what["picture 10"] and "cannot be shown: an image of 32-bit floats" in what["picture 11"]
    redness = next(c for c in results["comparisons"] if c["scorer"] == "redness")
    assert redness["num_prompts"] == 26 and redness["verdict"] == "improved" and 90 < redness["difference"] < 105
    assert (redness["wins"], redness["ties"], redness["losses"]) == (26, 0, 4), "what it lost counts against it"
    (judged,) = results["verdicts"]
    assert judged["verdict"] in ("improved", "suspect") and "It failed at 4 prompts" in judged["reason"]
    counts = {"guidance_scale": None, "asked": 60, "unscored": 0}
    assert results["samples"] == [
        counts | {"model": "dark", "missing": 0, "broken": 0, "prompts_lost": 0},
        counts | {"model": "light", "missing": 4, "broken": 2, "prompts_lost": 4},
    ]
    # Said wherever the numbers are: the console, the table, the page
    said = "Only 26 of 30 prompts are compared: light lacks 4 of 60 images, of 4 prompts"
    broken = "Broken images (of one colour, empty) count with their scores: 2 of light."
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text(), page):
        assert said in text and broken in text
    assert "<dt>prompts compared</dt><dd>26 of 30</dd>" in page


def test_of_three_models_it_is_said_who_wins(scorer, tmp_path, capsys):
    prompts = [f"picture {n}" for n in range(20)]
    folders = {name: write_pictures(tmp_path / name, prompts, level) for name, level in
               {"dark": 20, "light": 120, "lighter": 160}.items()}  # fmt: skip
    twin = write_pictures(tmp_path / "twin", prompts, 160)

    def said(**models: Path) -> tuple[dict, str]:
        out = tmp_path / "-".join(models)
        specs = [f"{name}={folder}" for name, folder in models.items()]
        argv = ["--scorers", str(scorer), "--output_dir", str(out)]
        assert run("evaluate.py", "--models", *specs, *argv) == 0
        results = read_results(out / "results.json")
        assert results["protocol"]["images_per_prompt"] == 2, "as many as the folders have"
        (ranking,) = results["ranking"]
        if ranking["winner"] not in (None, results["baseline"]):
            assert results["headline"]["model"] == ranking["winner"], "the page speaks of the winner, not of the last"
        for text in (capsys.readouterr().out, (out / "table.md").read_text(), (out / "report.html").read_text()):
            assert ranking["sentence"] in text
        return ranking, (out / "report.html").read_text()

    ranking, page = said(**{name: folders[name] for name in ("dark", "lighter", "light")})
    assert ranking["winner"] == "lighter" and ranking["sentence"].startswith("lighter wins: it is better than each")
    assert 'id="ranking">Who wins' in page and "Pair by pair (1)" in page
    # Whoever is the baseline, and where two are the same
    assert said(**dict(reversed(folders.items())))[0]["winner"] == "lighter"
    ranking, page = said(**folders, twin=twin)
    assert ranking["winner"] is None
    assert ranking["sentence"].startswith("A tie by Redness: lighter and twin are not told apart; better than dark and")
    assert [(p["model"], p["place"]) for p in ranking["places"]] == [
        ("lighter", 1),
        ("twin", 1),
        ("light", 3),
        ("dark", 4),
    ]


def test_another_baseline_of_the_same_folders_is_no_other_protocol(scorer, tmp_path):
    prompts, out = [f"picture {n}" for n in range(8)], tmp_path / "out"
    folders = write_pictures(tmp_path / "a", prompts, 20), write_pictures(tmp_path / "b", prompts[::-1], 120)
    models = [f"{folder.name}={folder}" for folder in folders]
    argv = ["evaluate.py", "--models", *models, "--scorers", str(scorer), "--output_dir", str(out)]
    protocols = []
    for baseline in ("a", "b"):
        assert run(*argv, "--baseline", baseline) == 0
        results = read_results(out / "results.json")
        assert results["baseline"] == baseline
        protocols.append(results["protocol"])
    assert protocols[0] == protocols[1]


def test_a_verdict_fails_a_job_and_an_older_evaluation_is_looked_back_at(scorer, tmp_path, capsys):
    prompts = [f"picture {n}" for n in range(20)]
    dark, light, lighter = (
        write_pictures(tmp_path / name, prompts, level)
        for name, level in {"dark": 20, "light": 90, "lighter": 160}.items()
    )

    def evaluate(name: str, base: Path, model: Path, *argv: str) -> int:
        models = ["--models", f"base={base}", f"model={model}", "--scorers", str(scorer)]
        return run("evaluate.py", *models, "--output_dir", str(tmp_path / name), *argv)

    # A picture brighter than the other sets off the alarm of photometry
    assert evaluate("old", dark, lighter, "--fail_on", "regressed") == 0
    assert evaluate("old", dark, lighter, "--fail_on", "suspect") == 3
    assert "--fail_on: model at pictures as given: suspect" in capsys.readouterr().err
    assert evaluate("worse", light, dark, "--fail_on", "regressed") == 3
    assert evaluate("new", dark, light) == 0
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    assert run("report.py", new, "--fail_on", "regressed") == 0
    assert run("report.py", new, "--fail_on", "regressed", "--against", old) == 3
    assert "model against old: model at pictures as given: regressed" in capsys.readouterr().err
    assert "Against <bdi>old: model</bdi>" in (tmp_path / "new" / "report.html").read_text()
    assert run("report.py", old, "--against", new, "--fail_on", "regressed") == 0, "and it is better than what is new"
    alone = ["--models", f"base={dark}", "--scorers", str(scorer), "--output_dir", str(tmp_path / "alone")]
    refused(capsys, run("evaluate.py", *alone, "--fail_on", "regressed"), "no scorer compared two models")
    assert evaluate("other", dark, light, "--images_per_prompt", "1") == 0
    refused(capsys, run("report.py", new, "--against", str(tmp_path / "other")), "--against", "its protocol is")


def test_a_folder_that_has_nothing_to_compare_is_refused_before_anything_is_written(tmp_path, capsys):
    prompts = [f"picture {n}" for n in range(3)]
    models = [f"a={write_pictures(tmp_path / 'a', prompts, 20)}", f"b={write_pictures(tmp_path / 'b', prompts, 90, 1)}"]
    argv = ["--scorers", "sharpness", "--output_dir", str(tmp_path / "out")]
    code = run("evaluate.py", "--models", *models, *argv, "--images_per_prompt", "4")
    refused(capsys, code, "a has 2 pictures", "--images_per_prompt 2 or fewer")
    argv += ["--images_per_prompt", "2"]
    refused(
        capsys, run("evaluate.py", "--models", *models, *argv), "b=", "1 pictures", "--images_per_prompt 1 or fewer"
    )
    other = write_pictures(tmp_path / "other", ["x", "y"], 90)
    code = run("evaluate.py", "--models", models[0], f"other={other}", *argv)
    refused(capsys, code, "other=", "none of the 3 prompts, such as 'picture 0'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def load(device):\n    raise RuntimeError('no\\nway')\n", "RuntimeError at odd.py line 2: no way"),
        ("def load(device):\n    return lambda i, p: 1 / 0\n", "ZeroDivisionError at odd.py line 2: division by zero"),
        ("def load(device):\n    return lambda i, p: open('no.pt')\n", "FileNotFoundError at odd.py line 2"),
    ],
)
def test_a_scorer_of_ones_own_that_raises_is_not_run_and_the_others_are_kept(code, reason, scorer, tmp_path, capsys):
    (tmp_path / "odd.py").write_text(code)
    prompts = [f"picture {n}" for n in range(3)]
    models = [f"{name}={write_pictures(tmp_path / name, prompts, level)}" for name, level in (("a", 20), ("b", 90))]
    argv = ["--images_per_prompt", "2", "--output_dir", str(tmp_path / "out")]
    assert run("evaluate.py", "--models", *models, "--scorers", f"{tmp_path / 'odd.py'},{scorer}", *argv) == 0
    said = {s["name"]: s for s in read_results(tmp_path / "out" / "results.json")["scorers"]}
    assert said["redness"]["state"] == "run" and said["odd"]["state"] == "not run"
    assert reason in said["odd"]["reason"] and "\n" not in said["odd"]["reason"]
    assert f"scorer odd was not run: scorer odd failed: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothere\n", "ModuleNotFoundError at odd.py line 1: No module named 'nothere'"),
        ("def load(device:\n", "SyntaxError at odd.py line 1"),
        ("import sys\nsys.exit(0)\n", "SystemExit at odd.py line 2: 0"),
    ],
)
def test_a_scorer_that_cannot_be_imported_is_said_in_one_line(code, reason, tmp_path, capsys):
    (tmp_path / "odd.py").write_text(code)
    models = [f"a={write_pictures(tmp_path / 'a', ['x', 'y'], 20)}"]
    argv = ["--scorers", str(tmp_path / "odd.py"), "--output_dir", str(tmp_path / "out")]
    refused(capsys, run("evaluate.py", "--models", *models, *argv), "odd.py cannot be imported", reason)


def test_pictures_of_an_unknown_protocol_are_not_compared_with_drawn_ones(
    sdxl_dir, tiny_prompts, scorer, tmp_path, capsys
):
    texts = [json.loads(line)["prompt"] for line in tiny_prompts.read_text().splitlines()]
    given = write_pictures(tmp_path / "given", texts, 20)
    models = [f"base={sdxl_dir}", f"given={given}"]
    refused(capsys, evaluate(tmp_path, tiny_prompts, str(scorer), models=models), "--allow_unequal_protocol")
    allowed = ["--allow_unequal_protocol", "true"]
    assert evaluate(tmp_path, tiny_prompts, str(scorer), *allowed, models=models) == 0


def test_a_model_that_draws_nothing_finite_is_a_counted_failure(sdxl_dir, tiny_prompts, scorer, tmp_path, capsys):
    folder = tmp_path / "run" / "round-1"
    unet = UNet2DConditionModel.from_pretrained(sdxl_dir, subfolder="unet")
    unet.conv_out.bias.data[:] = 3e38  # finite, as weights must be; what is made of it is not
    unet.save_pretrained(folder / "unet")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"base": Base(str(sdxl_dir)).as_dict()}))
    models = [f"base={sdxl_dir}", f"nan={folder}"]
    refused(capsys, evaluate(tmp_path, tiny_prompts, str(scorer), models=models), "only 0 prompts", "(lost: nan ")
    index = next((tmp_path / "out" / "images" / "nan" / "guidance-3").glob("*.jsonl"))
    assert {json.loads(line)["state"] for line in index.read_text().splitlines()} == {"not finite"}


@pytest.mark.parametrize("change", ["missing", "nan"])
def test_a_round_whose_weights_are_not_whole_is_refused(change, brighter, sdxl_dir, tiny_prompts, tmp_path, capsys):
    file = brighter / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["conv_out.bias"]
    else:
        weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    code = evaluate(tmp_path, tiny_prompts, "sharpness", models=[f"base={sdxl_dir}", f"round1={brighter}"])
    refused(capsys, code, str(brighter / "unet"), "conv_out.bias", "lack" if change == "missing" else "not finite")


@pytest.mark.parametrize(
    "models, argv, parts",
    [
        (["base"], [], ["NAME=PATH_OR_ID"]),
        (["base=./nowhere"], [], ["./nowhere", "does not exist"]),
        (["base={sdxl}", "base={sdxl}"], [], ["'base' twice"]),
        (["../x={sdxl}"], [], ["letters, digits"]),
        (["base={sdxl}"], ["--baseline", "bse"], ["bse", "there are base"]),
        (["base={sdxl}"], ["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["base={sdxl}"], ["--scorers", "pickscor"], ["pickscor", "did you mean pickscore"]),
        (["base={sdxl}"], ["--scorers", "sharpness,sharpness"], ["'sharpness' twice"]),
        (["base={sdxl}"], ["--images_per_prompt", "0"], ["--images_per_prompt 0"]),
        (["base={sdxl}"], ["--guidence_scale", "3"], ["did you mean 'guidance_scale'"]),
        (["empty={tmp}"], [], ["neither a pipeline"]),
        (["base={sdxl}"], ["--mixed_precision", "fp16"], ["--mixed_precision fp16", "give bf16 or no"]),
        (["base={sdxl}"], ["--sweep", "{prediction_scale: [1, 0]}"], ["--sweep prediction_scale 0.0 must be above 0"]),
        (["base={sdxl}"], ["--sweep", "{steps: [1]}"], ["steps", "num_inference_steps"]),
        (["base={sdxl}"], ["--sweep", "{guidance_scale: [2]}", "--max_prompts", "3"], ["4 prompts or more", "got 3"]),
        (["base={sdxl}"], ["--sweep", "{guidance_scale: [2], by: fd}"], ["--sweep by fd needs real pictures"]),
        (["base={sdxl}"], ["--sweep", "{guidance_scale: [2]}"], ["sharpness is better neither up nor down"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(models, argv, parts, sdxl_dir, tiny_prompts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    models = [model.format(sdxl=sdxl_dir, tmp=tmp_path / "empty") for model in models]
    refused(capsys, evaluate(tmp_path, tiny_prompts, "sharpness", *argv, models=models), *parts)
    assert not (tmp_path / "out").exists()


def test_results_of_another_schema_version_are_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"schema_version": 99}')
    refused(capsys, run("report.py", str(tmp_path)), "schema_version 99", "reads 1")
    refused(capsys, run("report.py", str(tmp_path / "nowhere")), "results.json")


def test_a_second_command_and_a_page_are_refused_while_an_evaluation_works(scorer, tmp_path, capsys):
    prompts, out = ["a red apple", "a blue boat"], tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    models = [f"{name}={write_pictures(tmp_path / name, prompts, 30)}" for name in ("a", "b")]

    def again() -> int:
        return evaluate(tmp_path, tmp_path / "prompts.txt", str(scorer), models=models)

    assert again() == 0
    release(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with open(out / MARKER, "r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        capsys.readouterr()
        refused(capsys, again(), "another command works in", "give another --output_dir")
        refused(capsys, run("report.py", str(out)), "another command works in", "give another --output")
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        assert run("report.py", str(out), "--output", str(tmp_path / "page.html")) == 0
    (out / MARKER).unlink()
    capsys.readouterr()
    refused(capsys, run("report.py", str(out)), "is not a folder of this program", "give --output")
    refused(capsys, again(), f"is not empty and has no {MARKER}")


# Folders of pictures that are given


def given(folder: Path, **texts: str) -> Path:
    """A folder of pictures of one colour each, with their prompts in text files beside them."""
    folder.mkdir(exist_ok=True)
    for number, (name, text) in enumerate(texts.items()):
        Image.new("RGB", (16, 16), (40 * number, 90, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_picture_with_a_prompt_that_cannot_be_read_is_left_out_and_said(tmp_path, capsys):
    models = []
    for name in ("a", "b"):
        folder = given(tmp_path / name, one="one", two="two", three="three", odd="odd")
        rng = np.random.default_rng(len(models))
        for path in folder.glob("*.png"):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
        models.append(f"{name}={folder}")
    (tmp_path / "b" / "odd.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b" / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "b" / "one.png").read_bytes())
    (tmp_path / "b" / os.fsdecode(b"caf\xe9.txt")).write_text("four")
    (tmp_path / "b" / "linked").symlink_to("../gone")
    (tmp_path / "b" / "three.png").unlink()
    os.mkfifo(tmp_path / "b" / "three.png")
    argv = ["--scorers", "sharpness", "--images_per_prompt", "1", "--output_dir", str(tmp_path / "out")]
    assert run("evaluate.py", "--models", *models, *argv) == 0
    said = capsys.readouterr().out
    assert f"--models {models[1]}; 2 left out, the first is linked: link to nothing" in said
    results = read_results(tmp_path / "out" / "results.json")
    what = {failure["prompt"]: failure["what"] for failure in results["failures"]}
    assert "three.png is a named pipe, not a file" in what["three"] and "no such picture" in what["odd"]
    assert len(what) == 2


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_entry_with_broken_characters_is_left_out(tmp_path, kind):
    folder = given(tmp_path / "a", one="", two="", three="")
    lines = [b'{"file_name": "one.png", "prompt": "one"}', b'{"file_name": "two.png", "prompt": "half \\ud83d"}']
    lines += [b'{"file_name": "three.png", "prompt": "caf\xe9"}']
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    elif kind == "csv":
        (folder / "metadata.csv").write_bytes(b"file_name,text\none.png,one\ntwo.png,\xed\xa0\xbd\nthree.png,caf\xe9\n")
    else:
        cells = pa.array([b"one", b"\xed\xa0\xbd", b"caf\xe9"], pa.binary()).view(pa.string())
        names = [f"{name}.png" for name in ("one", "two", "three")]
        pq.write_table(pa.table({"file_name": names, "prompt": cells}), folder / "metadata.parquet")
    pictures = read_given_pictures(folder)
    assert [row["prompt"] for row in pictures.rows] == ["one"] and len(pictures.left_out) == 2
    assert "broken characters in the text" in pictures.note() and pictures.note().isprintable()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "x/../../secret.png", "C:\\s.png", "..\\s.png"])
@pytest.mark.parametrize("kind", ["metadata", "index"])
def test_the_index_of_a_folder_may_not_lead_out_of_it(tmp_path, name, kind):
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    folder = given(tmp_path / "a", one="one", two="two")
    if kind == "metadata":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "prompt": "one"}))
    else:
        row = {"id": "00000", "k": 0, "prompt": "one", "category": "", "file": name}
        (folder / "00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="leads out of the folder|does not lie beside it") as caught:
        read_given_pictures(folder)
    assert "\n" not in str(caught.value)


def test_an_index_may_not_lead_out_of_its_folder_through_a_link_either(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    folder = given(tmp_path / "a", one="one")
    (folder / "linked.png").symlink_to("../secret.png")
    row = {"id": "00000", "k": 0, "prompt": "one", "category": "", "file": "linked.png"}
    (folder / "00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="names 'linked.png', which does not lie beside it"):
        read_given_pictures(folder)
    # The owner's own link, without an index of somebody else's
    (folder / "00000-of-00001.jsonl").unlink()
    (folder / "linked.txt").write_text("linked")
    assert [row["prompt"] for row in read_given_pictures(folder).rows] == ["linked", "one"]


def test_pictures_behind_a_link_to_a_folder_are_found(tmp_path):
    given(tmp_path / "elsewhere", one="one", two="two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "linked").symlink_to("../elsewhere")
    (tmp_path / "a" / "around").symlink_to("..")
    assert read_source(f"a={tmp_path / 'a'}").kind == "images"
    pictures = read_given_pictures(tmp_path / "a")
    assert [row["prompt"] for row in pictures.rows] == ["one", "two"]
    assert pictures.note().startswith("; 1 left out, the first is around: link to a folder that is read already")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["one.txt", "metadata.jsonl", "metadata.csv", "00000-of-00001.jsonl"])
def test_what_is_no_file_beside_given_pictures_is_not_waited_for(tmp_path, kind, name):
    folder = given(tmp_path / "a", one="one", two="two")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    if name == "one.txt":
        assert "not a file" in read_given_pictures(folder).note()
    else:
        with pytest.raises(InputError, match="not a file"):
            read_given_pictures(folder)
