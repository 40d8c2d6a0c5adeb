"""What is learnt of a player on samples that it is not trained on: the held-out gap of an image run."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.evaluation import distribution
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.runs import evaluator, player_pictures, real_pictures
from spin_diffusion.runs.evaluator import RunReporter
from spin_diffusion.runs.image_run import run
from spin_diffusion.store.files import read_json, read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture

SCORER = """
import torch
def load(device):
    def score(images, prompts):
        return torch.tensor([float(image.convert("L").resize((1, 1)).getpixel((0, 0))) for image in images])
    return score
"""


@pytest.fixture
def settings(sdxl_dir, tiny_parquet, tmp_path) -> dict:
    return {
        "pretrained_model_name_or_path": sdxl_dir, "dataset_name": tiny_parquet, "resolution": 32, "rounds": 1,
        "max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-4, "beta": 2000, "num_inference_steps": 2,
        "sampler": "ddim", "guidance_scale": 3, "samples_per_shard": 8, "generation_batch_size": 4, "num_held_out": 6,
        "preview_every": 0, "report_to": "none", "output_dir": tmp_path / "out",
    }  # fmt: skip


def play(settings: dict) -> Path:
    """The folder of a run."""
    run(parse_config([word for name, value in settings.items() for word in (f"--{name}", str(value))]), "sdxl")
    return settings["output_dir"]


def prompts(folder: Path) -> list[str]:
    return [row["prompt"] for path in sorted((folder / "samples").glob("*")) for row in read_rows(path)]


@pytest.fixture
def pages(monkeypatch) -> list[str]:
    """The page, each time that it was to be brought up to date."""
    pages, refresh = [], RunReporter.refresh

    def shown(self: RunReporter) -> None:
        refresh(self)
        pages.append((self.output_dir / "report.html").read_text())

    monkeypatch.setattr(RunReporter, "refresh", shown)
    monkeypatch.setattr(evaluator, "PAGE_SHARE", float("inf"))
    return pages


def test_held_out_pictures_are_drawn_for_and_never_trained_on(settings, tiny_prompts, pages, capsys):
    looking = {"select_every": 2, "preview_every": 3, "report_to": "tensorboard"}
    out = play(settings | looking | {"validation_prompts": tiny_prompts, "max_validation_prompts": 2})
    held_out, trained_on = prompts(out / "held_out"), prompts(out / "data")
    assert len(held_out) == 6 and len(trained_on) == 18 and not {*held_out} & {*trained_on}
    record = read_json(out / "round-1" / "round.json")
    assert sorted(prompts(out / "round-1" / "held_out")) == sorted(held_out)
    assert record["held_out_gap"]["num_samples"] == 6 and record["held_out_gap"]["low"] is not None
    assert "held-out gap" in (out / "report.html").read_text()
    measures = {entry["name"]: entry["value"] for entry in read_results(out / "results.json")["measures"]}
    assert measures["held_out_gap"] == record["held_out_gap"]["mean"]
    the_looks_are_shown(out, record)
    # While it trained, the page had the previews so far
    sheets = [re.findall('<img src="([^"]+)"[^>]* alt="Previews of spin round 1', page) for page in pages]
    assert not sheets[0] and len({*map(tuple, sheets)}) == 3 and sheets[-1][0] in (out / "report.html").read_text()
    told = capsys.readouterr().out
    assert re.search("^spin round 1: drawn in .*^spin round 1: trained in .* left, until ", told, re.S | re.M)


def the_looks_are_shown(out: Path, record: dict) -> None:
    """Judgements and previews are on the page, in the results, in the ledger and in the tracker."""
    results, page = read_results(out / "results.json"), (out / "report.html").read_text()
    assert [entry["step"] for entry in results["selection"]] == [0, 2, 4] and results["selection"][0]["value"] == 0
    (chosen,) = (entry["step"] for entry in results["selection"] if entry["chosen"])
    assert chosen == record["training"]["selection"]["step"]
    assert "The best step of a round" in page and f"the player of step {chosen} was kept" in page
    for step in (0, 3):
        drawn = out / "round-1" / "previews" / f"step-{step:06d}" / "images" / "guidance-3"
        assert len(list(drawn.glob("*.png"))) == 2
    assert results["previews"] == [{"model": "spin", "round": 1, "file": "round-1/previews.png"}]
    assert 'alt="Previews of spin round 1' in page
    assert {"judged", "previewed"} <= {entry["phase"] for entry in results["ledger"]}
    assert record["ledger"]["previewed"]["samples"] == 4 and record["ledger"]["judged"]["flops"] > 0
    told = EventAccumulator(str(next((out / "logs").rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.step for event in told.Images("spin/round-1/previews")] == [0, 3]


def test_held_out_pictures_are_of_those_that_the_curation_keeps(settings, tmp_path):
    scorer = tmp_path / "redness.py"
    scorer.write_text(SCORER)
    limits = {"max_train_samples": 10, "max_train_steps": 1}
    out = play(settings | limits | {"curation": f"{{scorer: {scorer}, top: 12}}"})
    chosen = {row["prompt"] for row in read_rows(out / "data" / "curation.parquet") if row["chosen"]}
    assert len(chosen) == 12 and {*prompts(out / "held_out")} | {*prompts(out / "data")} == chosen


def test_by_a_scorer_the_best_step_of_the_pictures_of_held_out_captions_is_promoted(settings, tmp_path, capsys):
    scorer = tmp_path / "brightness.py"
    scorer.write_text(SCORER)
    selecting = {"select_every": 2, "select_by": scorer, "max_train_steps": 5, "learning_rate": 1e-3}
    del settings["preview_every"]  # by default there are previews of held-out captions
    out = play(settings | selecting)
    previews = [path.name for path in (out / "round-1" / "previews").iterdir() if path.is_dir()]
    assert sorted(previews) == [f"step-{step:06d}" for step in (0, 1, 2, 5)]
    record = read_json(out / "round-1" / "round.json")
    selection = record["training"]["selection"]
    assert [entry["step"] for entry in selection["curve"]] == [0, 2, 4, 5] and selection["by"] == "brightness"
    best = max(selection["curve"][1:], key=lambda entry: entry["mean"])
    assert selection["step"] == best["step"] and (record["state"] == "PROMOTED") == (best["mean"] > 0)
    # What was drawn lies there, and gives the same numbers again
    means = {}
    for step in (0, best["step"]):
        pictures = sorted((out / "round-1" / "judged" / f"step-{step:06d}" / "images" / "guidance-3").glob("*.png"))
        assert len(pictures) == 6
        means[step] = np.mean([Image.open(path).convert("L").resize((1, 1)).getpixel((0, 0)) for path in pictures])
    assert best["mean"] == pytest.approx(means[best["step"]] - means[0])
    assert record["ledger"]["judged"]["samples"] == 4 * 6 and record["ledger"]["judged"]["flops"] > 0
    assert [line for line in capsys.readouterr().out.splitlines() if "by brightness" in line]


FEATURES = """
import numpy as np, torch
def load(device):
    def embed(images):
        return torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1)) / 64 for image in images])).float()
    return embed
"""


@pytest.fixture
def by_distance(settings, tmp_path, monkeypatch) -> dict:
    """Settings by which steps are judged by distance; 20 pictures are enough here."""
    for module in (distribution, real_pictures):
        monkeypatch.setattr(module, "MIN_PICTURES", 20)
    features = tmp_path / "colour.py"
    features.write_text(FEATURES)
    return settings | {
        "select_every": 2, "select_by": "fd", "distribution_features": features, "max_train_steps": 5,
        "checkpointing_steps": 2, "learning_rate": 3e-3, "num_held_out": 20,
    }  # fmt: skip


def colours(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture).mean(axis=(0, 1)) / 64 for picture in pictures])


def test_by_distance_the_step_is_promoted_whose_pictures_are_nearest_to_the_held_out_ones(
    by_distance, tiny_prompts, tmp_path, monkeypatch, whole_charts, capsys
):
    by_distance |= {"validation_prompts": tiny_prompts, "max_validation_prompts": 2}
    out = play(by_distance)
    record = read_json(out / "round-1" / "round.json")
    selection = record["training"]["selection"]
    assert [entry["step"] for entry in selection["curve"]] == [0, 2, 4, 5]
    assert (selection["by"], selection["better"]) == ("fd", "lower")
    best = min(selection["curve"][1:], key=lambda entry: entry["mean"])
    assert selection["step"] == best["step"] and best["low"] < best["mean"] < best["high"]
    assert (record["state"] == "PROMOTED") == (best["mean"] < 0)
    # The pictures that lie there give the same change again
    rows = [row for path in sorted((out / "held_out" / "samples").glob("*")) for row in read_rows(path)]
    real = colours([open_picture(row["image"]) for row in rows])
    of_step = {}
    for step in (0, best["step"]):
        folder = out / "round-1" / "judged" / f"step-{step:06d}" / "images" / "guidance-3"
        pictures = [Image.open(path) for path in sorted(folder.glob("*.png"))]
        of_step[step] = distribution.measure(colours(pictures)[:, None], real)["fd"]
    change = distribution.interval("fd", of_step[best["step"]], of_step[0])
    assert (best["mean"], best["low"]) == pytest.approx((change.mean, change.low), rel=1e-4)
    assert f"best step {best['step']} of 5, by fd (lower is better)" in capsys.readouterr().out
    assert {entry["better"] for entry in read_results(out / "results.json")["selection"]} == {"lower"}
    assert "change, lower is better" in (out / "report.html").read_text()
    assert record["ledger"]["judged"]["samples"] == 4 * 20 and record["ledger"]["judged"]["flops"] > 0

    # Killed while it judges, a round ends with the same bytes
    measured, calls = player_pictures.measured, []

    def dying(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*given)

    monkeypatch.setattr(player_pictures, "measured", dying)
    broken = by_distance | {"output_dir": tmp_path / "broken"}
    with pytest.raises(KeyboardInterrupt):
        play(broken)
    again = read_json(play(broken) / "round-1" / "round.json")
    assert again["training"]["resumed_from"] == 2
    assert again["training"]["selection"] == selection and again["files"] == record["files"]


def test_too_few_pictures_for_the_features_are_refused_in_a_line(by_distance):
    message = "--select_by fd: it takes 20 pictures .* there are 19 of 19 prompts.*; hold out more \\(--num_held_out\\)"
    with pytest.raises(InputError, match=message):
        play(by_distance | {"num_held_out": 19})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--select_every 5", "--select_every 5 judges the player on held-out samples: give --num_held_out"),
        ("--num_held_out 4 --select_by pickscore", "--select_by pickscore needs --select_every"),
        (
            "--num_held_out 4 --select_every 5 --select_by fd",
            "--select_by fd needs the features .*--distribution_features",
        ),
        ("--num_held_out 4 --select_every 5 --objective dpo", "--select_by gap needs generated samples that are not"),
    ],
)
def test_what_cannot_be_selected_by_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse_config(["--pretrained_model_name_or_path", "base", "--dataset_name", "data", *flags.split()])


def test_a_scorer_that_is_not_there_or_has_no_best_is_refused_before_a_model_is_loaded(settings, tmp_path):
    drift = tmp_path / "drift.py"
    drift.write_text(
        "from spin_diffusion.evaluation.scorers import About\nABOUT = About('d', 's', role='drift')\n" + SCORER
    )
    settings |= {"pretrained_model_name_or_path": tmp_path / "nothing", "select_every": 2}
    for spec, message in (("pickscor", "--select_by pickscor: .*pickscore"), (drift, "no step is its best")):
        with pytest.raises(InputError, match=message):
            play(settings | {"select_by": spec})
