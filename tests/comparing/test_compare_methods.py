"""evaluation/compare_methods.py as a user runs it, and the arithmetic behind it against plain references."""

import io
import json
import math
import multiprocessing
import os
import runpy
import shutil
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from spin_diffusion.comparing import analysis, cells, compare, making
from spin_diffusion.comparing.analysis import DifferenceFamily, against_real, crossed_interval
from spin_diffusion.comparing.cells import Task, View
from spin_diffusion.comparing.contest import Contest, Entry, choose, highest, run_flops, steps_for
from spin_diffusion.comparing.making import make
from spin_diffusion.comparing.plan import Cell, make_plan, parsed
from spin_diffusion.comparing.report import findings, rate_text, weight
from spin_diffusion.comparing.settings import MODES, parse_settings
from spin_diffusion.diffusion.base import load_checkpoint
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import UnitCosts
from spin_diffusion.diffusion.sampling import drawing_pipeline
from spin_diffusion.diffusion.single_file import write_single_file
from spin_diffusion.evaluation import distribution
from spin_diffusion.evaluation.statistics import half_width, mean_interval
from spin_diffusion.runs.image_run import run as train
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import write_json, write_rows
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import MARKER
from tests.ranks import FORKING
from tests.runs.test_evaluate_command import SCORER, refused
from tests.store.test_folder import take_elsewhere

ROOT = Path(__file__).resolve().parents[2]
UNIT = UnitCosts(unet=10, unet_backward=20, unet_backward_inputs=11, text=1, vae_encode=3, vae_decode=5)


def run(*argv: str) -> int:
    return runpy.run_path(str(ROOT / "evaluation" / "compare_methods.py"))["main"](list(argv))


@pytest.fixture
def config(tmp_path: Path, sdxl_dir, tiny_parquet, tiny_prompts) -> Path:
    """Two methods, two seeds, two rates, one world."""
    (tmp_path / "redness.py").write_text(SCORER)
    training = {
        "dataset_name": str(tiny_parquet), "max_train_samples": 8, "resolution": 32, "rounds": 2, "beta": 2000.0,
        "train_batch_size": 2, "samples_per_shard": 4, "num_inference_steps": 2, "guidance_scale": 3.0,
        "generation_batch_size": 4,
    }  # fmt: skip
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(training))
    content = {
        "training_config": str(tmp_path / "training.yaml"),
        "worlds": {"tiny": {"about": "Noise.", "pretrained_model_name_or_path": str(sdxl_dir)}},
        "methods": {"sft": {"objective": "sft", "rounds": 1}, "spin": {"objective": "spin"}},
        "total_steps": 4,
        "learning_rates": [1e-4, 1e-5],
        "widen_rates": 0,
        "seeds": [0, 1],
        "prompts": str(tiny_prompts),
        "num_validation_prompts": 2,
        "num_test_prompts": 2,
        "sweep": {"guidance_scale": [1.0, 3.0]},
        "scorers": [str(tmp_path / "redness.py")],
        "jobs": 0,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "compare.yaml"


def settings_of(config: Path, *argv: str):
    return parse_settings(["--config", str(config), *argv])


# Choices


def at(guidance_scale: float, num_inference_steps: int = 2, prediction_scale: float = 1.0) -> Sampling:
    """As the training settings of the tests draw."""
    return Sampling(
        "dpmpp", num_inference_steps, guidance_scale, 32, precision="fp32", prediction_scale=prediction_scale
    )


def test_the_rate_is_that_of_the_highest_mean_in_the_whole_table():
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = {rate: {at(scale): float(rng.random()) for scale in (1.0, 2.0, 3.0)} for rate in (1e-5, 1e-4, 1e-3)}
        score, rate = max((score, rate) for rate, means in table.items() for score in means.values())
        choice = choose(table)
        assert (choice.score, choice.learning_rate) == (score, rate)
        assert choice.at_edge == (rate != 1e-4)


def test_a_run_without_an_end_is_never_chosen_and_ties_go_to_the_smaller_value():
    assert choose({1e-5: {at(1.0): 0.2}, 1e-3: None}).learning_rate == 1e-5
    assert choose({1e-5: None, 1e-3: None}) is None
    assert choose({1e-3: {at(3.0): 0.5, at(1.0): 0.5}, 1e-4: {at(1.0): 0.5}}).learning_rate == 1e-4
    ties = [at(3.0), at(1.0), at(1.0, num_inference_steps=9), at(1.0, prediction_scale=1.04)]
    assert highest(dict.fromkeys(ties, 0.5)) == at(1.0)
    assert highest({1: 0.3, 2: 0.7, 3: 0.7}) == 2
    assert not choose({1e-4: {at(1.0): 0.5}}).at_edge


def test_rates_settings_and_rounds_are_chosen_on_validation_prompts_alone(config, monkeypatch):
    contest, asked = Contest(settings_of(config, "--test_rounds", "[1, 2]")), []
    monkeypatch.setattr(contest, "mean", lambda cell, view: asked.append(view) or 0.5)
    cell = contest.plan.cell("tiny", "spin", 1e-4, 0, 2)
    assert contest.means(cell, contest.plan.guided("tiny")) == {at(1.0): 0.5, at(3.0): 0.5}
    assert contest.best(cell) == at(1.0)
    compare._best_round(contest, Entry("tiny", "steps", "spin", 2, cells=[cell]))
    assert {(view.prompts, view.round) for view in asked} == {("validation", 1), ("validation", 2)}


@pytest.mark.parametrize(
    ("peak", "widen", "grid", "chosen", "at_edge"),
    [
        (1e-4, 2, [5e-5, 1e-4, 2e-4], 1e-4, False),
        (4e-4, 2, [5e-5, 1e-4, 2e-4, 4e-4, 8e-4], 4e-4, False),
        (1e-2, 2, [5e-5, 1e-4, 2e-4, 4e-4, 8e-4], 8e-4, True),
        (1e-6, 1, [2.5e-5, 5e-5, 1e-4, 2e-4], 2.5e-5, True),
        (1e-2, 0, [5e-5, 1e-4, 2e-4], 2e-4, True),
    ],
)
def test_a_grid_is_widened_where_its_best_rate_lies_at_an_edge(config, monkeypatch, peak, widen, grid, chosen, at_edge):
    given = settings_of(config, "--learning_rates", "[5e-5, 1e-4, 2e-4]", "--widen_rates", str(widen))
    contest = Contest(given)
    monkeypatch.setattr(contest, "mean", lambda cell, view: -abs(math.log(cell.training["learning_rate"] / peak)))
    monkeypatch.setattr(compare, "_run", lambda contest, name, tasks: True)
    entry = contest.entry("tiny", "steps", "spin", 2)
    assert compare._choose_rates(contest, "choose rates", [entry])
    assert entry.rates == pytest.approx(grid)
    assert (entry.choice.learning_rate, entry.choice.at_edge) == (pytest.approx(chosen), at_edge)


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (1.25e-5, "1.25e-5"), (3.333e-11, "3.33e-11"), (0.02, "2e-2")]
)
def test_a_rate_is_shown_with_the_digits_that_tell_it_from_its_neighbours(rate, text):
    assert rate_text(rate) == text


# Intervals


def coverage(
    rng: np.random.Generator, seeds: int, prompts: int, of_seeds: float, confidence: float, draw: str = "normal"
) -> float:
    """How often the interval holds the true mean, 0, where seeds move the mean this much and prompts and pairs by 1."""
    noise = {"normal": rng.normal, "exponential": lambda size: rng.exponential(size=size) - 1}[draw]
    sets = 10_000
    values = noise(size=(sets, 1, prompts)) + noise(size=(sets, seeds, prompts))
    values = values + of_seeds * noise(size=(sets, seeds, 1))
    means, widths = values.mean(axis=(1, 2)), [half_width(values.mean(axis=axis), confidence) for axis in (1, 2)]
    one, width = crossed_interval(values[0], confidence), np.hypot(*widths)
    expected = (means[0] - width[0], means[0] + width[0])
    assert (one.low, one.high) == pytest.approx(expected), "what is counted is what is used"
    return float((np.abs(means) <= width).mean())


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.5, 3.0])
def test_the_interval_holds_the_true_mean_at_least_as_often_as_it_says(seeds, of_seeds):
    rng = np.random.default_rng(2)
    # The standard error of the coverage is 0.2 % at 95 % and 0.07 % at 99.5 %
    assert coverage(rng, seeds, 20, of_seeds, 0.95) >= 0.95 - 0.007
    assert coverage(rng, seeds, 20, of_seeds, 0.995) >= 0.995 - 0.002


def test_the_interval_holds_too_seldom_where_skewed_seeds_decide_as_is_said():
    rng = np.random.default_rng(2)
    assert 0.85 <= coverage(rng, 3, 80, 3.0, 0.95, "exponential") <= 0.93
    assert coverage(rng, 3, 80, 0.0, 0.95, "exponential") >= 0.95


def test_seeds_that_differ_widen_the_interval_and_one_seed_speaks_of_its_prompts():
    rng = np.random.default_rng(3)
    same = np.repeat(rng.normal(0, 1, (1, 40)), 3, axis=0)
    apart = same + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = crossed_interval(same), crossed_interval(apart)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    alone = crossed_interval(same[:1])
    assert (alone.low, alone.high) == pytest.approx((narrow.low, narrow.high))
    assert alone == mean_interval(same[0])
    assert crossed_interval(np.zeros((2, 4))).low == 0
    with pytest.raises(ValueError, match="seeds, prompts"):
        crossed_interval(np.zeros(3))


def test_a_difference_pairs_seed_with_seed_and_is_adjusted_for_its_whole_family():
    rng = np.random.default_rng(5)
    a, b, c = ({seed: rng.normal(0, 1, 40) for seed in seeds} for seeds in ((0, 1, 2), (2, 1), (2,)))
    family = DifferenceFamily()
    found, single = family.difference(a, b), family.difference(a, c)
    apart = np.stack([a[1] - b[1], a[2] - b[2]])
    assert found["mean"] == pytest.approx(apart.mean())
    assert found["seeds"] == pytest.approx({"1": apart[0].mean(), "2": apart[1].mean()})
    assert family.difference(a, {7: a[0]}) is None and family.adjust() == 2
    wide = crossed_interval(apart, 1 - 0.05 / 2)
    assert found["adjusted"] == [wide.low, wide.high] and wide.low < found["low"] and found["high"] < wide.high
    assert single["adjusted"] is None and weight(single | {"low": 1.0, "high": 2.0}) == "some", "one seed of several"
    alone = DifferenceFamily()
    of_one_seed = alone.difference(c, {2: c[2] - 1})
    assert alone.adjust() == 1 and weight(of_one_seed) == "sure", "all have one seed, as the page says"


def test_of_methods_that_are_all_the_same_hardly_any_is_ever_printed_in_bold():
    """Five methods against a sixth, after three rounds at three guidance scales, with three seeds: 45 differences."""
    bold = italic = 0
    for run_ in range(40):
        rng, family, found = np.random.default_rng(run_), DifferenceFamily(), []
        prompts = rng.normal(0, 1, 30)
        methods = [[{s: prompts + rng.normal(0, 0.3) + rng.normal(0, 0.5, 30) for s in range(3)} for _ in range(9)]
                   for _ in range(6)]  # fmt: skip
        for method in methods[1:]:
            found += [family.difference(a, b) for a, b in zip(method, methods[0], strict=True)]
        assert family.adjust() == 45
        bold += any(weight(said) == "sure" for said in found)
        italic += any(weight(said) == "some" for said in found)
    assert bold <= 0.05 * 40 < italic


def test_the_drift_is_what_the_last_round_lost_of_the_best_one(config, monkeypatch):
    contest = Contest(settings_of(config))
    monkeypatch.setattr(contest, "curve", lambda entry: {3: [0.4, 0.6], 1: [0.5, 0.7], 2: [0.3, 0.3], 4: []})
    monkeypatch.setattr(analysis, "_scores", lambda *given: {"best": {}})
    cell = contest.plan.cell("tiny", "spin", 1e-4, 0, 3)

    def over(rounds: int) -> dict:
        cells_ = [replace(cell, training=cell.training | {"rounds": rounds})]
        entry = Entry("tiny", "steps", "spin", 3, choose({1e-4: {at(1.0): 0.5}}), cells_, best_round=1)
        row: dict = {}
        analysis._add_rounds(contest, entry, row, {}, DifferenceFamily())
        return row

    found = over(3)
    assert [(row["round"], row["mean"]) for row in found["curve"]] == [(1, 0.6), (2, 0.3), (3, 0.5)]
    assert found["best_round"] == 1 and found["drift"] == pytest.approx(-0.1)
    assert over(4)["drift"] is None


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_family_is_every_difference_that_is_shown(rounds, config, monkeypatch):
    argv = ["--budget", "steps", *(["--test_rounds", "[1, 2]"] if rounds else [])]
    contest = Contest(settings_of(config, *argv))
    rng = np.random.default_rng(0)
    scores = {mode: {seed: rng.normal(0, 1, 9) for seed in (0, 1)} for mode in MODES}
    choice = choose({1e-4: {at(1.0): 0.5}})
    contest.entries = [
        Entry("tiny", "steps", name, 1, choice, [contest.plan.cell("tiny", name, 1e-4, 0, 1)])
        for name in ("sft", "spin")
    ]
    monkeypatch.setattr(analysis, "_scores", lambda *given, **named: scores)
    monkeypatch.setattr(contest, "means", lambda *given: {at(1.0): 0.5})
    monkeypatch.setattr(contest, "curve", lambda entry: {})
    monkeypatch.setattr(analysis, "_measured", lambda *given: {"scores": {}})
    monkeypatch.setattr(analysis, "_cost", lambda *given: (1.0, 1.0, 1.0))
    monkeypatch.setattr(analysis, "_rounds_of", lambda *given: dict.fromkeys(range(1, rounds + 1), scores))
    (budget,) = analysis._world(contest, "tiny")["budgets"]

    def shown(said) -> list[dict]:
        if isinstance(said, dict) and "adjusted" in said:
            return [said]
        return [one for part in (said.values() if isinstance(said, dict) else said if isinstance(said, list) else [])
                for one in shown(part)]  # fmt: skip

    # Two methods to the base and one to the other, at three guidance scales, after the end and after each round
    assert budget["differences"] == len(shown(budget["rows"])) == 3 * 3 * (1 + rounds)
    wide = crossed_interval(np.zeros((2, 9)) + 1.0, 1 - 0.05 / budget["differences"])
    assert wide.low < 1 == wide.high
    assert budget["first"]["best"] == {"method": "sft", "not_told_apart": ["spin"]}


def test_it_is_said_which_method_is_first_and_which_are_not_told_apart_from_it(config):
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 1, 60)

    def method(gain: float) -> dict[str, dict[int, np.ndarray]]:
        of_seeds = {s: prompts + gain + rng.normal(0, 0.01, 60) for s in range(5)}
        return dict.fromkeys(MODES, of_seeds)

    scores = {
        "sft": method(0.0),
        "spin": method(0.5),
        "space": method(0.501),
        "failed": dict.fromkeys(MODES, {}),
    }
    first = analysis._first(scores)
    assert first["usual"]["method"] in ("spin", "space") and len(first["usual"]["not_told_apart"]) == 1
    assert analysis._first({"failed": scores["failed"]}) == dict.fromkeys(MODES)
    rows = [{"method": name, "state": "ok", "to_reference": None} for name in scores]
    results = {"settings": {"reference": "sft"}, "seeds": [0]}
    settings = {"guidance_scale": 3.0, "num_inference_steps": 10, "prediction_scale": 1.0, "passes": 20}
    gain = {"mean": 0.05, "low": 0.04, "high": 0.06, "seeds": {}, "adjusted": [0.03, 0.07]}
    best = settings | {"num_inference_steps": 40, "prediction_scale": 1.04, "passes": 80}
    world = {"usual": settings, "base": {"best": best, "free_gain": {"guidance 1": None, "usual": gain}}}
    said = " ".join(findings(results, world, {"rows": rows, "first": first}))
    assert "the base gains +0.050 [+0.040, +0.060] over guidance 3 by its best settings of the sampler" in said
    assert "(guidance 3, 40 steps, prediction x 1.04, at 4 times the passes" in said
    assert "The highest mean is that of sp" in said and "not told apart from it: sp" in said
    first = dict.fromkeys(MODES, {"method": "spin", "not_told_apart": []})
    said = " ".join(findings(results, world, {"rows": rows, "first": first}))
    assert "that of spin; it is ahead of every other method." in said


SMALL = """
import numpy as np, torch
def load(device):
    return lambda images: torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1)) / 30 for image in images])).float()
"""


def colours(rng: np.random.Generator, number: int, kinds: int) -> np.ndarray:
    return np.array([[200, 60, 60], [60, 60, 200]])[rng.integers(kinds, size=number)] + rng.normal(0, 9, (number, 3))


def write_real(contest: Contest, cell: Cell, rng: np.random.Generator) -> None:
    """120 real pictures of two kinds, as the data of a cell's run."""

    def png(colour: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.broadcast_to(colour.round().astype(np.uint8), (8, 8, 3)).copy()).save(buffer, "PNG")
        return buffer.getvalue()

    data = contest.folder(cell) / "run" / "data"
    real = [{"id": f"{n:03d}", "prompt": "", "image": png(colour)} for n, colour in enumerate(colours(rng, 120, 2))]
    write_rows(data / "samples" / "00000-of-00001.parquet", real, {})
    manifest = {"rows": 120, "hash": "1", "settings": {"resolution": 8}, "left_out": {}, "files": {}}
    write_json(data / "manifest.json", manifest, sealed=True)


def write_view(contest: Contest, cell: Cell, view: View, drawn: np.ndarray, images: int, redness: float) -> None:
    rows = [
        {
            "id": f"{place // images:03d}",
            "k": place % images,
            "redness": redness,
            "distance": None,
            "features": list(colour / 30),
        }
        for place, colour in enumerate(drawn)
    ]
    write_rows(cells.scores_path(contest.folder(cell), view), rows, {"key": f"{cell.seed} {cell.method} {view.name}"})


@pytest.mark.parametrize("prompts", [25, 24])
def test_a_method_that_draws_one_kind_of_pictures_covers_less_of_the_real_ones(prompts, config, tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "many.txt").write_text("\n".join(f"picture {number}" for number in range(40)))
    asked = ["--prompts", str(tmp_path / "many.txt"), "--num_test_prompts", str(prompts), "--images_per_prompt", "4"]
    contest = Contest(settings_of(config, *asked, "--distribution_features", str(tmp_path / "small.py")))
    entries = [
        Entry("tiny", "steps", method, 2, cells=[contest.plan.cell("tiny", method, 1e-4, seed, 2) for seed in (0, 1)])
        for method in ("sft", "spin")
    ]
    contest.entries += entries
    rng = np.random.default_rng(0)
    write_real(contest, entries[0].cells[0], rng)
    usual = contest.plan.usual("tiny")
    monkeypatch.setattr(contest, "best_of_base", lambda world: usual)
    base = [contest.plan.base("tiny", seed) for seed in (0, 1)]
    for of_cells, kinds in ((base, 2), (entries[0].cells, 2), (entries[1].cells, 1)):
        for cell in of_cells:
            write_view(contest, cell, View("test", cell.rounds, usual), colours(rng, 4 * prompts, kinds), 4, 0.5)
    found = against_real(contest, "tiny", entries)
    rows = {row["method"]: row for row in found["rows"] if row["mode"] == "usual"}
    if prompts == 24:
        assert not rows and "100 pictures of 20 prompts" in found["left_out"]
        return
    assert set(rows) == {"base", "sft", "spin"} and found["num_images"] == 100
    assert rows["sft"]["metrics"]["recall"]["mean"] > 0.8 > 0.6 > rows["spin"]["metrics"]["recall"]["mean"]
    assert rows["spin"]["metrics"]["precision"]["mean"] > 0.8 and len(rows["spin"]["metrics"]["fd"]["seeds"]) == 2
    lost = rows["spin"]["to_base"]
    assert lost["recall"]["high"] < 0 and lost["fd"]["low"] > 0 and rows["sft"]["to_base"]["recall"]["high"] > 0


def test_the_sampler_whose_pictures_are_nearest_to_real_ones_is_the_best_where_distance_chooses(
    config, tmp_path, monkeypatch
):
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "many.txt").write_text("\n".join(f"picture {number}" for number in range(110)))
    asked = ["--prompts", str(tmp_path / "many.txt"), "--num_test_prompts", "10", "--num_validation_prompts", "100"]
    asked += ["--distribution_features", str(tmp_path / "small.py"), "--sweep"]
    by_scorer = Contest(settings_of(config, *asked, "{guidance_scale: [1.0, 3.0]}"))
    contest = Contest(settings_of(config, *asked, "{guidance_scale: [1.0, 3.0], by: fd}"))
    cell, rng = contest.plan.cell("tiny", "spin", 1e-4, 0, 2), np.random.default_rng(0)
    contest.entries = [Entry("tiny", "steps", "spin", 2, cells=[cell])]
    write_real(contest, cell, rng)
    for view in contest.validation(cell, contest.plan.free("tiny")):
        kinds = 2 if view.sampling.guidance_scale == 1 else 1  # redder, and far from the half of the real ones
        write_view(contest, cell, view, colours(rng, 100, kinds), 1, view.sampling.guidance_scale)
    assert by_scorer.best(cell).guidance_scale == 3 and contest.best(cell).guidance_scale == 1
    monkeypatch.setattr(distribution, "PICTURES_PER_FEATURE", 40)
    with pytest.raises(InputError, match="by fd: fd of 3 features takes 120 pictures.* --num_validation_prompts"):
        contest.best(cell)


# Equal steps, equal compute


def test_equal_compute_gives_fine_tuning_the_steps_that_the_opponents_images_cost(config):
    plan = make_plan(settings_of(config))
    spin = parsed(plan.cell("tiny", "spin", 1e-4, 0, plan.steps_per_round("tiny", "spin")).training)
    sft = parsed(plan.cell("tiny", "sft", 1e-4, 0, plan.steps_per_round("tiny", "sft")).training)
    assert (plan.steps_per_round("tiny", "spin"), plan.steps_per_round("tiny", "sft")) == (2, 4)
    # Two rounds, each of the 4 images that it visits, at 2 steps with guidance; their prompts are encoded, and they are
    # decoded and encoded
    drawing = 2 * 4 * (4 * 10 + 2 * 1 + 3 + 5)
    real = 8 * (3 + 1)  # images and prompts, encoded once
    a_step = 4 * (10 + 20 + 10)
    budget = run_flops(spin, UNIT, 8, [2, 2], zeros_for_empty=False)
    assert budget == real + drawing + 4 * a_step
    steps = steps_for(sft, UNIT, 8, budget, zeros_for_empty=False)
    assert steps == (budget - real) // (2 * (10 + 20))
    assert run_flops(sft, UNIT, 8, [steps], False) <= budget < run_flops(sft, UNIT, 8, [steps + 1], False)
    assert steps_for(spin, UNIT, 8, budget, False) == 2
    # A longer round draws all that there are, and no more
    assert steps_for(spin, UNIT, 8, 10**6, False) == (10**6 - real - 2 * drawing) // (2 * a_step)
    assert steps_for(spin, UNIT, 8, drawing // 4, False) == 0


def test_what_a_run_encodes_before_its_first_step_is_counted(config):
    plan = make_plan(settings_of(config))
    cell = plan.cell("tiny", "sft", 1e-4, 0, 4)

    def flops(**changed) -> int:
        return run_flops(parsed(cell.training | changed), UNIT, 8, [4], False)

    a_step = 2 * (10 + 20)
    assert flops() == 8 * (3 + 1) + 4 * a_step
    # Through the VAE and back before they are encoded
    assert flops(vae_round_trip=True) == 8 * (3 + 3 + 5 + 1) + 4 * a_step
    # The worse images of a data set of pairs are encoded too
    assert flops(objective="dpo") == 8 * (2 * 3 + 1) + 4 * 2 * (a_step + 2 * 10)


def test_a_methods_settings_go_before_its_worlds_and_a_worlds_before_everybodys(config):
    given = yaml.safe_load(config.read_text())
    given["worlds"]["tiny"] |= {"beta": 3000.0, "guidance_scale": 5.0, "learning_rates": [2e-4], "total_steps": 8}
    given["methods"]["spin"] |= {"beta": 4000.0, "learning_rates": [3e-4]}
    config.write_text(yaml.safe_dump(given))
    plan = make_plan(settings_of(config, "--sweep", "{guidance_scale: [3.0], prediction_scale: [1.0, 1.04]}"))
    assert [plan.training_of("tiny", method)["beta"] for method in ("base", "sft", "spin")] == [3000.0, 3000.0, 4000.0]
    assert (plan.rates("tiny", "sft"), plan.rates("tiny", "spin")) == ([2e-4], [3e-4])
    guided = [at(scale) for scale in (1.0, 3.0, 5.0)]
    assert plan.guided("tiny") == guided and (plan.usual("tiny"), plan.unguided("tiny")) == (at(5.0), at(1.0))
    assert plan.free("tiny") == sorted([*guided, at(3.0, prediction_scale=1.04)])
    assert (plan.steps_per_round("tiny", "sft"), plan.steps_per_round("tiny", "spin")) == (8, 4)
    plan = make_plan(settings_of(config, "--usual_guidance", "2", "--num_inference_steps", "9"))
    assert plan.guided("tiny") == [at(scale, num_inference_steps=9) for scale in (1.0, 2.0, 3.0)]


def test_a_cell_is_named_by_what_it_is_trained_with(config):
    plan = make_plan(settings_of(config))
    cell = plan.cell("tiny", "spin", 1e-4, 0, 2)
    assert cell.folder == plan.cell("tiny", "spin", 1e-4, 0, 2).folder
    harmless = replace(cell, training=cell.training | {"checkpointing_steps": 3})
    assert harmless.key == cell.key
    split = replace(cell, training=cell.training | {"train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert split.key == cell.key
    others = [plan.cell("tiny", "spin", 1e-4, 1, 2), plan.cell("tiny", "spin", 1e-4, 0, 3),
              plan.cell("tiny", "spin", 1e-5, 0, 2), replace(cell, training=cell.training | {"rounds": 3}),
              replace(cell, training=cell.training | {"beta": 3000.0}),
              replace(cell, training=cell.training | {"train_batch_size": 4}),
              replace(cell, training=cell.training | {"gradient_accumulation_steps": 3})]  # fmt: skip
    assert len({cell.key, *(other.key for other in others)}) == 8


# Errors


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--reference", "sftt"], ["--reference sftt", "did you mean 'sft'?"]),
        (["--worlds", '{"tiny": {"methods": ["spn"]}}'], ["worlds: tiny: methods spn", "'spin'"]),
        (["--methods", '{"sft": {"objektive": "sft"}, "spin": {}}'], ["methods: sft: unknown setting 'objektive'"]),
        (["--methods", '{"sft": {}, "spin": {"beta": "much"}}'], ["methods: spin: --beta"]),
        (
            ["--methods", '{"sft": {}, "spin": {"learning_rate": 1}}'],
            ["methods: spin: learning_rate", "learning_rates"],
        ),
        (["--methods", '{"sft": {}, "spin": {"rounds": 3}}'], ["methods: spin: total_steps 4", "multiple of 3"]),
        (["--worlds", '{"tiny": {"pretrained_model_name_or_path": "a/b/c"}}'], ["worlds: tiny: a/b/c"]),
        (["--only_worlds", "tinny"], ["--only_worlds tinny", "did you mean 'tiny'?"]),
        (["--num_test_prompts", "3"], ["has 4 prompts, fewer than"]),
        (["--learning_rates", "[0.0]"], ["--learning_rates 0.0 must be above 0"]),
        (["--seeds", "[1, 1]"], ["--seeds [1, 1]", "none twice"]),
        (["--sweep", "{prediction_scale: [0]}"], ["--sweep prediction_scale 0.0 must be above 0"]),
        (["--sweep", "{guidance_scale: [1], by: fd}"], ["--sweep by fd needs the features"]),
        (
            ["--sweep", "{guidance_scale: [1], by: fd}", "--distribution_features", "dinov2"],
            ["--num_validation_prompts 100 or more, not 2"],
        ),
        (["--guidance_scales", "[1.0]"], ["unknown setting 'guidance_scales'", "--sweep '{guidance_scale: "]),
        (["--training_config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["--scorers", "pickscor"], ["pickscor", "did you mean pickscore?"]),
        (["--bugdet", "steps"], ["unknown setting 'bugdet', did you mean 'budget'?"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(config, tmp_path, capsys, argv, parts):
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, run("--config", str(config), *argv), *parts)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_programs_folder_is_refused(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("worlds: {a: {}}")
    refused(capsys, run("--config", str(config)), "is not empty and has no .spin-diffusion.json")
    (tmp_path / "out" / "config.yaml").unlink()
    take_folder(tmp_path / "out", "evaluation")
    (tmp_path / "out" / "results.json").write_text("{}")
    refused(capsys, run("--config", str(config)), "says evaluation, not comparison")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MARKER, "results.json"]


# The whole


def test_one_command_compares_and_the_same_command_does_nothing_twice(config, tmp_path, whole_charts):
    (tmp_path / "small.py").write_text(SMALL)
    command = ["--config", str(config), "--sweep", "{guidance_scale: [1.0, 3.0], prediction_scale: [1.0, 1.5]}"]
    command += ["--distribution_features", str(tmp_path / "small.py")]
    assert run(*command) == 0
    out = tmp_path / "out"
    results = json.loads((out / "comparison.json").read_text())
    world = results["worlds"][0]
    steps, compute = ({row["method"]: row for row in budget["rows"]} for budget in world["budgets"])
    assert [budget["budget"] for budget in world["budgets"]] == ["steps", "compute"]
    assert all(row["state"] == "ok" and row["seeds"] == [0, 1] for row in [*steps.values(), *compute.values()])
    # The same steps; then the same compute, for which fine-tuning gets more of them and self-play is the same cells
    assert (steps["sft"]["steps"], steps["spin"]["steps"]) == (4, 4)
    assert compute["sft"]["steps"] > 4 and compute["spin"]["scores"] == steps["spin"]["scores"]
    assert steps["sft"]["gflops"] < compute["sft"]["gflops"] <= steps["spin"]["gflops"]
    assert len(steps["spin"]["curve"]) == 2 and len(steps["sft"]["curve"]) == 1

    # What it took is the sum over all its runs
    noted = [json.loads(path.read_text()) for path in out.rglob("took.json")]
    took = results["took"]
    assert took["runs"] == len(noted) == sum(1 for _ in (out / "cells" / "tiny").iterdir())
    assert took["seconds"] == pytest.approx(sum(one["seconds"] for one in noted)) and took["seconds"] > 1
    assert took["cpu_seconds"] == pytest.approx(sum(one["cpu_seconds"] for one in noted)) and took["cpu_seconds"] > 0
    assert f"All {len(noted)} runs together" in (out / "comparison.md").read_text()

    # The table's numbers are those of the images, by a plain mean
    rows = pq.read_table(out / "cells.parquet").to_pylist()
    assert world["budgets"][0]["distances"]["num_real"] == 8 and "features" not in rows[0]
    test_prompts = {row["prompt"] for row in rows if row["prompts"] == "test"}
    assert len(test_prompts) == 2 and not test_prompts & {r["prompt"] for r in rows if r["prompts"] == "validation"}
    rate = steps["spin"]["choice"]["learning_rate"]

    def mean(method: str, rate: float | None, per_round: int, scale: float, times: float, seed: int, prompts: str):
        found = [
            row["redness"] for row in rows
            if row["method"] == method and row["learning_rate"] == rate and row["training_seed"] == seed
            and row["guidance_scale"] == scale and row["prompts"] == prompts and row["round"] == row["rounds"]
            and row["steps_per_round"] == per_round and row["prediction_scale"] == times
        ]  # fmt: skip
        assert len(found) == (4 if prompts == "test" else 2)
        return float(np.mean(found))

    chosen = max((mean("spin", r, 2, s, 1, 0, "validation"), r) for r in (1e-4, 1e-5) for s in (1.0, 3.0))
    assert chosen[0] == pytest.approx(steps["spin"]["choice"]["score"]) and chosen[1] == rate

    # The best settings of the sampler: of a method at its rate, and of the base, against each other
    def best_of(method: str, rate: float | None, per_round: int) -> list[float]:
        free = [(scale, times) for scale in (1.0, 3.0) for times in (1.0, 1.5)]
        found = max(free, key=lambda how: mean(method, rate, per_round, *how, 0, "validation"))
        said = world["base"]["best"] if method == "base" else steps[method]["best"]
        assert (said["guidance_scale"], said["prediction_scale"]) == found and world["num_free"] == 4
        return [mean(method, rate, per_round, *found, seed, "test") for seed in (0, 1)]

    best, of_base = steps["spin"]["scores"]["best"], np.array(best_of("base", None, 0))
    assert best["mean"] == pytest.approx(np.mean(best_of("spin", rate, 2)))
    to_base = np.array(best_of("spin", rate, 2)) - of_base
    assert steps["spin"]["to_base"]["best"]["mean"] == pytest.approx(np.mean(to_base))
    free_gain = np.mean(of_base) - np.mean([mean("base", None, 0, 3.0, 1.0, seed, "test") for seed in (0, 1)])
    assert world["base"]["free_gain"]["usual"]["mean"] == pytest.approx(free_gain, abs=1e-9)

    sft_rate = steps["sft"]["choice"]["learning_rate"]
    difference = steps["spin"]["to_reference"]["usual"]["mean"]
    each = [mean("spin", rate, 2, 3.0, 1, s, "test") - mean("sft", sft_rate, 4, 3.0, 1, s, "test") for s in (0, 1)]
    assert difference == pytest.approx(np.mean(each))
    markdown, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    assert "| spin |" in markdown and f"{best['mean']:.3f} at {steps['spin']['best']['guidance_scale']:g}" in markdown
    assert "Of the distance to real images not all is told: it takes 100 pictures" in markdown
    assert "Without any training the base gains" in markdown and "to the base at its best" in page
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page

    # Once more: no run is made, no picture is drawn or scored, the report is the same
    calls = (tmp_path / "redness.py.calls").stat().st_size
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}
    assert run(*command) == 0
    assert (tmp_path / "redness.py.calls").stat().st_size == calls
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()} == before
    assert (out / "comparison.md").read_text() == markdown
    # A view that is lost costs itself only, and comes back with the same bytes
    lost = next((out / "cells").rglob("test-*.parquet"))
    whole = lost.read_bytes()
    lost.unlink()
    assert run(*command) == 0
    assert lost.read_bytes() == whole and (tmp_path / "redness.py.calls").stat().st_size == calls + 4


def test_every_round_is_tested_against_the_reference_after_as_many_rounds(config, tmp_path):
    given = yaml.safe_load(config.read_text())
    given["methods"]["sft"]["rounds"] = 2
    given |= {"learning_rates": [1e-4], "budget": "steps", "every_round": False, "test_rounds": [1], "seeds": [0]}
    config.write_text(yaml.safe_dump(given))
    assert run("--config", str(config)) == 0
    out = tmp_path / "out"
    sft, spin = json.loads((out / "comparison.json").read_text())["worlds"][0]["budgets"][0]["rows"]

    def means(method: str, k: int, scale: float) -> dict[int, np.ndarray]:
        found = {}
        for row in pq.read_table(out / "cells.parquet").to_pylist():
            if (row["method"], row["prompts"], row["round"], row["guidance_scale"]) == (method, "test", k, scale):
                found.setdefault((row["training_seed"], row["id"]), []).append(row["redness"])
        return {key: np.mean(scores) for key, scores in found.items()}

    assert [found["round"] for found in spin["by_round"]] == [1, 2]
    assert "to_reference" not in sft["by_round"][0]
    for k, found in enumerate(spin["by_round"], 1):
        for mode, scale in (("guidance 1", 1.0), ("usual", 3.0), ("best", spin["best"]["guidance_scale"])):
            mine, theirs = (
                means("spin", k, scale),
                means("sft", k, {"best": sft["best"]["guidance_scale"]}.get(mode, scale)),
            )
            assert found["scores"][mode]["mean"] == pytest.approx(np.mean(list(mine.values())))
            apart = np.mean([mine[key] - theirs[key] for key in mine])
            assert found["to_reference"][mode]["mean"] == pytest.approx(apart)
    last = spin["by_round"][-1]
    assert last["scores"]["usual"] == spin["scores"]["usual"] and last["to_base"]["usual"] == spin["to_base"]["usual"]
    markdown, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    assert f"| spin | 1 | {spin['by_round'][0]['scores']['guidance 1']['mean']:.3f} |" in markdown
    assert "round by round" in page

    # With fewer rounds, the reference stands where it ends
    given["methods"]["sft"]["rounds"] = 1
    config.write_text(yaml.safe_dump(given))
    assert run("--config", str(config)) == 0
    sft, spin = json.loads((out / "comparison.json").read_text())["worlds"][0]["budgets"][0]["rows"]
    assert [len(row["by_round"]) for row in (sft, spin)] == [1, 2]
    mine, theirs = means("spin", 1, 3.0), means("sft", 1, 3.0)
    apart = np.mean([mine[key] - theirs[key] for key in mine])
    assert spin["by_round"][0]["to_reference"]["usual"]["mean"] == pytest.approx(apart)


def test_a_run_that_diverges_is_shown_and_not_dropped(config, tmp_path, monkeypatch):
    def diverges(run_config: Config, family: str) -> None:
        plays = run_config.rounds.objective == "spin"
        if plays and (run_config.rounds.seed == 1 or run_config.training.learning_rate == 1e-4):
            raise FloatingPointError("step 2: loss nan")
        train(run_config, family)

    given = yaml.safe_load(config.read_text())
    given["methods"]["sft"]["learning_rates"] = [1e-4]
    config.write_text(yaml.safe_dump(given))
    monkeypatch.setattr(compare, "run", diverges)
    assert run("--config", str(config), "--budget", "steps", "--every_round", "false") == 0
    out = tmp_path / "out"
    results = json.loads((out / "comparison.json").read_text())
    sft, spin = results["worlds"][0]["budgets"][0]["rows"]
    assert sft["state"] == "ok" and sft["failures"] == []
    assert spin["state"] == "partly" and spin["seeds"] == [0] and spin["choice"]["learning_rate"] == 1e-5
    assert len(spin["failures"]) == 2 and "seed 1 diverged: step 2: loss nan" in spin["failures"][1]
    assert "spin (1 seeds)" in (out / "comparison.md").read_text()
    assert "loss nan" in (out / "comparison.html").read_text()

    # It is not run again unless that is asked for; then it takes its place in the table
    monkeypatch.setattr(compare, "run", lambda run_config, family: pytest.fail("run again"))
    assert run("--config", str(config), "--budget", "steps", "--every_round", "false") == 0
    monkeypatch.setattr(compare, "run", train)
    argv = ["--config", str(config), "--budget", "steps", "--every_round", "false", "--retry_failed"]
    assert run(*argv) == 0
    results = json.loads((out / "comparison.json").read_text())
    assert results["worlds"][0]["budgets"][0]["rows"][1]["state"] == "ok"


def test_a_method_none_of_whose_runs_ends_has_a_row_that_says_so(config, tmp_path, monkeypatch, capsys):
    def diverges(run_config: Config, family: str) -> None:
        if run_config.rounds.objective == "spin":
            raise FloatingPointError("loss nan")
        train(run_config, family)

    monkeypatch.setattr(compare, "run", diverges)
    why = "seed 0 diverged: loss nan"
    argv = ["--config", str(config), "--seeds", "[0]", "--learning_rates", "[1e-5]", "--budget", "steps"]
    refused(capsys, run(*argv), "lacks results", "steps, spin: rate 1e-05", why)
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "| spin | - | failed: rate 1e-05, seed 0 diverged: loss nan |" in markdown
    assert "Not all was run. Without a result: spin." in markdown and "no method is ahead" not in markdown
    assert "none of the methods with a result (there is none) is ahead" in markdown


def test_a_method_that_is_refused_is_no_verdict_on_methods(config, tmp_path, capsys):
    given = yaml.safe_load(config.read_text())
    given |= {"learning_rates": [1e-4], "seeds": [0], "budget": "steps", "every_round": False}
    given["methods"]["spin"]["rounds"] = 1
    given["methods"] |= {"dpo": {"objective": "dpo", "rounds": 1, "max_train_samples": 1}}
    config.write_text(yaml.safe_dump(given))
    code = run("--config", str(config))
    refused(capsys, code, "lacks results", "tiny, equal steps, dpo: rate 0.0001, seed 0 refused: ", "--retry_failed")
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "Not all was run. Without a result: dpo." in markdown and "no method is ahead" not in markdown
    assert "none of the methods with a result (spin) is ahead" in markdown
    # It is said again, not forgotten
    refused(capsys, run("--config", str(config)), "lacks results", "dpo")


def test_methods_with_an_adapter_are_trained_drawn_and_scored_like_the_others(config, tmp_path):
    given = yaml.safe_load(config.read_text())
    given |= {"learning_rates": [1e-2], "seeds": [0], "budget": "steps"}
    given["methods"]["lora"] = given["methods"].pop("spin") | {"use_lora": True, "rank": 4}
    config.write_text(yaml.safe_dump(given))
    assert run("--config", str(config)) == 0
    out = tmp_path / "out"
    rows = {
        row["method"]: row
        for row in json.loads((out / "comparison.json").read_text())["worlds"][0]["budgets"][0]["rows"]
    }
    assert {row["state"] for row in rows.values()} == {"ok"} and len(rows["lora"]["curve"]) == 2
    assert "Not all was run" not in (out / "comparison.md").read_text()
    scored = pq.read_table(out / "cells.parquet").to_pylist()
    of = {m: [r["redness"] for r in scored if r["method"] == m and r["prompts"] == "test"] for m in ("base", "lora")}
    assert of["lora"] and of["lora"][: len(of["base"])] != of["base"]
    # The pictures are those of evaluation/evaluate.py from the same round: an adapter loaded as a user loads it
    cell = next(path for path in (out / "cells" / "tiny").iterdir() if path.name.startswith("lora"))
    assert (cell / "run" / "round-2" / "lora").is_dir() and not (cell / "failed.json").exists()
    argv = ["--models", f"lora={cell / 'run' / 'round-2'}", "--prompts", given["prompts"], "--images_per_prompt", "4",
            "--num_inference_steps", "2", "--guidance_scale", "3", "--resolution", "32", "--generation_batch_size", "4",
            "--scorers", given["scorers"][0], "--output_dir", str(tmp_path / "evaluated")]  # fmt: skip
    assert runpy.run_path(str(ROOT / "evaluation" / "evaluate.py"))["main"](argv) == 0
    evaluated = pq.read_table(tmp_path / "evaluated" / "scores.parquet").to_pylist()
    by_prompt = {(row["prompt"], row["k"]): row["score"] for row in evaluated}
    last = [r for r in scored if r["method"] == "lora" and r["prompts"] == "test" and r["guidance_scale"] == 3
            and r["round"] == 2]  # fmt: skip
    assert last and [r["redness"] for r in last] == pytest.approx(
        [by_prompt[r["prompt"], r["k"]] for r in last], abs=0.1
    )


def test_time_that_is_up_leaves_the_rest_for_the_next_command(config, tmp_path, capsys):
    assert run("--config", str(config), "--max_hours", "1e-9") == 0
    assert "is over: the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "comparison.json").exists()


# Processes


def task_of(config: Path, contest: Contest) -> Task:
    cell = contest.plan.base("tiny", 0)
    return contest.task(cell, [View("validation", 0, at(1.0))])


def test_a_process_that_dies_costs_its_own_cell_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(making.multiprocessing, "get_context", lambda kind: FORKING)  # which has imported everything
    contest = Contest(settings_of(config))
    task = task_of(config, contest)
    scorer = tmp_path / "deadly.py"
    scorer.write_text("import os\ndef load(device):\n    os._exit(7)\n")
    deadly = replace(task, folder=tmp_path / "deadly", settings=replace(task.settings, scorers=[str(scorer)]))
    done: list[Task] = []
    making.run_all([deadly, task], train, 1, done.append, lambda: True)
    assert done == [deadly, task]
    assert cells.last_failure(tmp_path / "deadly") == {"kind": "killed", "message": "its process ended with code 7"}
    assert cells.is_done(task) and not cells.is_done(deadly)
    assert cells.read_view(task.folder, task.views[0]) is not None
    # A process of its own gives the same bytes as this one
    here = replace(task, folder=tmp_path / "here")
    make(here, train)
    name = f"scores/{task.views[0].name}.parquet"
    assert (here.folder / name).read_bytes() == (task.folder / name).read_bytes()


class InAThread(threading.Thread):
    """Stands for a process, and says which GPUs it would see; the first one dies at once."""

    started: ClassVar[list[str | None]] = []
    exitcode = 7

    def __init__(self, target, args, daemon) -> None:
        pipe, train = args
        own = Connection(os.dup(pipe.fileno()))  # as a process has its own
        dies = not self.started
        target = (lambda pipe, train: pipe.close()) if dies else target
        super().__init__(target=target, args=(own, train), daemon=daemon)

    def start(self) -> None:
        self.started.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        super().start()


@pytest.mark.parametrize(("seen", "there", "taken"), [("4,7", 8, "4747"), (None, 3, "0120"), (None, 0, None)])
def test_processes_take_the_gpus_in_turns_and_one_that_dies_leaves_its_own(seen, there, taken, tmp_path, monkeypatch):
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr(making.torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(InAThread, "started", [])
    pipes = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=InAThread)
    monkeypatch.setattr(making.multiprocessing, "get_context", lambda kind: pipes)
    together = threading.Barrier(3, timeout=30)  # as many tasks as processes, until one is left
    monkeypatch.setattr(making, "make", lambda task, train: together.wait())
    tasks, done = [SimpleNamespace(folder=tmp_path / str(number)) for number in range(4)], []
    making.run_all(tasks, train, 3, done.append, lambda: True)
    assert sorted(task.folder.name for task in done) == ["0", "1", "2", "3"]
    first, *others = InAThread.started
    expected = list(taken[:3]) + [taken[0]] if taken else [None] * 4
    assert [first, *others] == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_round_that_saved_an_adapter_draws_with_it(sdxl_dir, tmp_path):
    family, pipeline = load_checkpoint(str(sdxl_dir))
    unet = UNet2DConditionModel.from_pretrained(sdxl_dir, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    family.PIPELINE.save_lora_weights(str(tmp_path / "lora"), unet_lora_layers=get_peft_model_state_dict(unet))
    loaded = drawing_pipeline(pipeline, "checkpoint", lora=tmp_path / "lora").unet
    inputs = {
        "encoder_hidden_states": torch.ones(1, 7, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)},
    }
    predicted = [model(torch.ones(1, 4, 8, 8), 5, **inputs).sample for model in (unet, loaded, pipeline.unet)]
    assert torch.allclose(predicted[0], predicted[1], atol=1e-5)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-3)


def test_what_was_killed_is_run_again_and_what_diverged_is_not(config, tmp_path):
    task = replace(task_of(config, Contest(settings_of(config))), folder=tmp_path)
    assert cells.failure_of(task) is None
    for kind, is_final in (("killed", False), ("diverged", True), ("refused", True)):
        making.write_failure(tmp_path, kind, "why")
        assert cells.is_done(task) == (cells.failure_of(task) is not None) == is_final
        assert cells.failure_of(replace(task, settings=replace(task.settings, retry_failed=True))) is None


def test_one_process_at_a_time_works_on_a_cell(tmp_path):
    program, entered, leave = "run of a comparison", threading.Event(), threading.Event()

    def enter():
        with making._alone(tmp_path):
            entered.set()
            leave.wait(60)

    other = take_elsewhere(tmp_path, program=program)
    assert other.stdout.readline() == "taken\n"
    here = threading.Thread(target=enter)
    here.start()
    assert not entered.wait(0.3)
    other.kill()
    other.wait()
    assert entered.wait(30)
    refused = take_elsewhere(tmp_path, program=program)
    assert "another command works in" in refused.communicate()[1] and refused.returncode == 1
    leave.set()
    here.join()
    other = take_elsewhere(tmp_path, program=program)
    assert other.communicate()[0] == "taken\n"


def test_another_drawing_is_scored_again(config):
    contest = Contest(settings_of(config))
    task = task_of(config, contest)
    make(task, train)
    assert cells.is_done(task)
    assert not cells.is_done(replace(task, views=[View("validation", 0, at(1.0, num_inference_steps=1))]))
    scorer = Path(task.settings.scorers[0])
    renamed = scorer.with_name("renamed.py")
    renamed.write_text(scorer.read_text())
    assert not cells.is_done(replace(task, settings=replace(task.settings, scorers=[str(renamed)])))
    # What is not in the file's name, and what is behind a scorer's name
    assert not cells.is_done(replace(task, views=[View("validation", 0, replace(at(1.0), precision="bf16"))]))
    scorer.write_text(scorer.read_text().replace("Redness", "Another redness"))
    assert not cells.is_done(task)


def test_scores_that_do_not_say_what_they_depend_on_are_made_anew(config):
    contest = Contest(settings_of(config))
    task = task_of(config, contest)
    make(task, train)
    path = cells.scores_path(task.folder, task.views[0])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"drawing": "[]"}), path)
    assert not cells.is_done(task)
    cells.forget_stale(task)
    assert not path.exists()


def test_a_base_data_or_scorer_that_is_replaced_under_its_name_makes_another_cell(
    config, sdxl_dir, tiny_parquet, tmp_path
):
    base, data = tmp_path / "base", tmp_path / "train.parquet"
    shutil.copytree(sdxl_dir, base)
    shutil.copyfile(tiny_parquet, data)
    scorer = tmp_path / "redness.py"
    more = {"pretrained_model_name_or_path": str(base), "dataset_name": str(data), "curation": {"scorer": str(scorer)}}
    plan = make_plan(settings_of(config))
    cells_ = [plan.cell("tiny", "spin", 1e-4, 0, 2), plan.base("tiny", 0)]
    trained, alone = (replace(cell, training=cell.training | more) for cell in cells_)
    seen = [(trained.key, alone.key)]
    assert seen == [(trained.key, alone.key)]
    vae = base / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.5}))
    seen.append((trained.key, alone.key))
    for path in (data, scorer):
        path.write_bytes(path.read_bytes() + b" ")
        seen.append((trained.key, alone.key))
    assert len({key for key, _ in seen}) == 4 and len({key for _, key in seen}) == 2


def test_a_base_is_the_same_in_a_folder_and_in_a_single_file(config, sdxl_dir, tmp_path):
    plan, file = make_plan(settings_of(config)), tmp_path / "base.safetensors"
    write_single_file(file, load_checkpoint(str(sdxl_dir))[1], torch.float32, {})
    elsewhere = {"pretrained_model_name_or_path": str(file), "base_config": str(sdxl_dir)}
    for cell in (plan.cell("tiny", "spin", 1e-4, 0, 2), plan.base("tiny", 0)):
        assert replace(cell, training=cell.training | elsewhere).folder == cell.folder


def test_prompts_that_choose_and_prompts_that_report_are_apart(config):
    sets = cells.prompt_sets(settings_of(config))
    validation, test = ({row.prompt for row in sets[name].rows} for name in ("validation", "test"))
    assert len(validation) == len(test) == 2 and not validation & test


def test_a_cell_is_the_run_that_the_training_command_makes(config, tmp_path):
    contest = Contest(settings_of(config))
    cell = contest.plan.cell("tiny", "spin", 1e-4, 0, 1)
    task = contest.task(cell, [])
    make(contest.task(contest.plan.cell("tiny", "sft", 1e-4, 0, 1), []), train)  # another cell before it
    make(task, train)
    assert cells.is_trained(task)
    content = cell.training | {"output_dir": str(tmp_path / "by-command")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    script = runpy.run_path(str(ROOT / "training" / "train_spin_sdxl.py"))["main"]
    assert script(["--config", str(tmp_path / "run.yaml")]) == 0
    weights = "round-2/unet/diffusion_pytorch_model.safetensors"
    assert (task.folder / "run" / weights).read_bytes() == (tmp_path / "by-command" / weights).read_bytes()


@pytest.mark.parametrize("name", ["compare_toy", "rounds_toy"])
def test_every_world_and_method_of_the_files_is_one_that_can_be_trained(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = parse_settings(["--config", f"evaluation/configs/{name}.yaml"])
    plan = make_plan(settings)  # parses every method in every world
    assert all(
        Path(plan.training_of(world, "sft")["pretrained_model_name_or_path"]).is_dir() for world in plan.worlds()
    )
    assert {"sft", "spin", "space", "ddo"} <= set(settings.methods)
