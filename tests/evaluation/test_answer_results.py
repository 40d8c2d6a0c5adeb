import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from scipy import stats

from spin_diffusion.evaluation import protocols
from spin_diffusion.evaluation.evaluated import EvaluatedModel, belonging
from spin_diffusion.evaluation.prompt_sets import PromptRow, PromptSet
from spin_diffusion.evaluation.records import IMAGES, modality_of, read_results
from spin_diffusion.evaluation.results import MAX_CURVE_POINTS, conclude
from spin_diffusion.evaluation.scoring import SampleFolder, score_samples
from spin_diffusion.evaluation.tables import as_markdown, metrics_of, print_table
from spin_diffusion.evaluation.verdicts import promotion
from spin_diffusion.samples.drawn import draw_samples, picture_shards, requests_of, sample_files
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress
from tests.evaluation.made_up_answers import answers_by, babble, draw_answers, evaluate, folder_of, prompts, protocol_of

MODELS = [
    ("base", "baseline", 0, babble(0), 0.0),
    ("round 1", "round", 1, babble(1), 1.0),
    ("round 2", "round", 2, babble(2, 30), 3.0),
    ("sft", "rival", None, babble(3), -2.0),
]
CURVES = [
    {"model": f"round {k}", "round": k, "step": step, "r_real": step / 10, "r_generated": -step / 20, "loss": 1 / step}
    for k in (1, 2)
    for step in range(1, 21)
]
MEASURES = [
    {"model": model, "round": round_, "name": "gap", "title": "Gap", "value": value, "low": low, "high": high,
     "better": "none"}
    for model, round_, value, low, high in (("base", 0, 0.0, None, None), ("round 1", 1, 0.2, 0.1, 0.3))
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a whole evaluation, and its results; do not write into it."""
    root = tmp_path_factory.mktemp("answers")
    found = evaluate(root, MODELS, rows=prompts(50), curves=CURVES, measures=MEASURES, training_prompts=["another"])
    return root, found


def entry(results: dict[str, Any], key: str, **wanted: Any) -> dict[str, Any]:
    return next(row for row in results[key] if all(row[name] == value for name, value in wanted.items()))


def test_results_are_read_as_they_were_written(whole) -> None:
    root, results = whole
    assert read_results(root / "results.json") == results
    assert {row["guidance_scale"] for key in ("results", "comparisons", "alarms") for row in results[key]} == {None}
    assert results["headline"] == {"model": "round 2", "guidance_scale": None}
    assert results["protocol"]["sampling"]["temperature"] == 1.0 and "sampler" not in results["protocol"]
    assert [model["round"] for model in results["models"]] == [0, 1, 2, None]


def test_numbers_are_those_of_a_plain_computation(whole) -> None:
    root, results = whole
    rows = pq.read_table(root / "scores.parquet").to_pylist()
    by: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        by.setdefault((row["model"], row["scorer"]), {}).setdefault(row["id"], []).append(row["score"])
    for scorer in ("log_likelihood", "length", "distinct"):
        base = np.array([np.mean(values) for _, values in sorted(by["base", scorer].items())])
        ours = np.array([np.mean(values) for _, values in sorted(by["round 2", scorer].items())])
        mean = entry(results, "results", model="round 2", scorer=scorer, aggregate="mean")
        assert mean["mean"] == pytest.approx(ours.mean()) and mean["sd"] == pytest.approx(ours.std(ddof=1))
        compared = entry(results, "comparisons", model="round 2", scorer=scorer)
        error = stats.sem(ours - base)
        assert compared["difference"] == pytest.approx((ours - base).mean())
        # Student's t, or of equal differences x that of a mean of x and -x
        tied = (20 * 0.025**0.02 - 10, 10)
        low, high = stats.t.interval(0.95, 49, (ours - base).mean(), error) if error else tied
        assert (compared["low"], compared["high"]) == pytest.approx((low, high))
        wins, losses = int((ours > base).sum()), int((ours < base).sum())
        assert (compared["wins"], compared["ties"], compared["losses"]) == (wins, 50 - wins - losses, losses)
        p = [stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0]
        p += [stats.ttest_rel(ours, base).pvalue] if error else []
        assert compared["p"] == pytest.approx(max(p))
    # Adjusted over all tests of the page
    smallest = min(results["comparisons"], key=lambda row: row["p"])
    assert len(results["comparisons"]) == 3 * 3 and smallest["p_holm"] == pytest.approx(min(1.0, 9 * smallest["p"]))
    # What the rules of the made-up models say: gain of 3 nats, 10 words more
    assert entry(results, "comparisons", model="round 2", scorer="length")["difference"] == 10.0
    assert entry(results, "comparisons", model="round 2", scorer="log_likelihood")["difference"] == pytest.approx(
        3, abs=0.5
    )
    best = entry(results, "results", model="base", scorer="distinct", aggregate="best_of_k")["mean"]
    assert best == pytest.approx(np.mean([max(values) for values in by["base", "distinct"].values()]))


def test_the_verdicts_follow_the_rule(whole) -> None:
    _, results = whole
    verdicts = {row["model"]: row["verdict"] for row in results["verdicts"]}
    # 30 words after 20 are 1.5 times as many and away from the real answers: worth a warning at most, not an alarm
    states = {row["id"]: row["state"] for row in results["alarms"] if row["model"] == "round 2"}
    assert states["answer_length"] == "warn" and states["training_leak"] == "ok" and states["goodhart"] == "not run"
    assert verdicts == {"round 1": "improved", "round 2": "improved", "sft": "regressed"}
    (ranking,) = results["ranking"]
    assert ranking["winner"] == "round 2" and ranking["scorers"] == ["log_likelihood"]
    assert [(p["model"], p["place"]) for p in ranking["places"]] == [
        ("round 2", 1), ("round 1", 2), ("base", 3), ("sft", 4)
    ]  # fmt: skip
    assert "round 2 wins" in ranking["sentence"] and len(results["between_others"]) == 3 * 3
    assert "which is held out" in entry(results, "verdicts", model="round 2")["reason"]
    assert entry(results, "comparisons", model="round 2", scorer="length")["verdict"] == "drift"
    assert {row["by"] for row in results["breakdowns"]} == {"category", "prompt length"}
    promoted, reason = promotion(results, "not_regressed")
    assert not promoted and reason.startswith("log_likelihood fell by ") and "guidance" not in reason
    assert metrics_of(results, "round 2")["length/difference"] == 10.0


def test_an_alarm_makes_the_verdict_suspect(tmp_path: Path) -> None:
    models = [MODELS[0], ("round 1", "round", 1, answers_by(lambda row: "ever the same answer to all"), 5.0)]
    results = evaluate(tmp_path, models, rows=prompts(30))
    (verdict,) = results["verdicts"]
    assert verdict["verdict"] == "suspect" and "diversity_over_seeds" in verdict["reason"]
    assert "so the higher scores by log_likelihood may not mean better answers" in verdict["reason"]


def test_the_table_of_answers_has_every_answer(whole) -> None:
    root, _ = whole
    rows = pq.read_table(root / "answers.parquet").to_pylist()
    assert len(rows) == 4 * 50 * 2 and {row["state"] for row in rows} == {"ok"}
    assert set(rows[0]) == {
        "model", "guidance_scale", "id", "k", "prompt", "category", "seed", "sha256", "state", "text", "reference",
        "finish", "num_tokens",
    }  # fmt: skip
    assert rows[0]["reference"] == prompts(1)[0]["reference"] and rows[0]["num_tokens"] == 21
    scores = pq.read_table(root / "scores.parquet").to_pylist()
    assert len(scores) == len(rows) * 3
    seeds = {(row["id"], row["k"]): row["seed"] for row in rows if row["model"] == "base"}
    assert all(seeds[row["id"], row["k"]] == row["seed"] for row in rows)


def test_tables_speak_of_answers(whole, capsys: pytest.CaptureFixture) -> None:
    _, results = whole
    print_table(results, Console(width=200))
    printed, markdown = capsys.readouterr().out, as_markdown(results)
    for text in (printed, markdown):
        assert "50 prompts x 2 answers" in text
        assert not any(word in text for word in ("guidance", "picture", "image"))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_judge_that_was_not_run_for_one_model_counts_for_none(tmp_path: Path) -> None:
    rows = prompts(30)
    results = evaluate(tmp_path, MODELS[:2], rows=rows, specs=["length", "reward_model"])
    said = entry(results, "scorers", name="reward_model")
    assert said["state"] == "not run" and "which reward model" in said["reason"]
    assert {row["scorer"] for row in results["results"]} == {"length"}
    assert results["verdicts"][0]["verdict"] == "inconclusive"


def test_answers_of_another_protocol_are_refused(tmp_path: Path) -> None:
    evaluate(tmp_path, MODELS[:2], rows=prompts(30), specs=["length"])
    requests = requests_of(prompts(30), 2, 0)
    models = [EvaluatedModel(name, "candidate", folder_of(tmp_path / f"models/{i}")) for i, name in enumerate("ab")]
    with pytest.raises(InputError, match="holds answers of another protocol"):
        conclude(tmp_path, models, protocol_of(requests, temperature=0.5), ["length"], title="")
    sample_files(models[0].folder.samples)[0].unlink()
    with pytest.raises(InputError, match="incomplete"):
        conclude(tmp_path, models, protocol_of(requests), ["length"], title="")


def test_answers_without_a_score_are_failures_and_take_their_prompt_out(tmp_path: Path) -> None:
    rows = prompts(40)
    evaluate(tmp_path, MODELS[:2], rows=rows, specs=["length"])
    requests = requests_of(rows, 2, 0)
    protocol = protocol_of(requests)
    models = [
        EvaluatedModel(name, role, folder_of(tmp_path / f"models/{i}"), i)
        for i, (name, role) in enumerate((("base", "baseline"), ("round 1", "round")))
    ]
    # A model that answers anew after it was judged: the scores of its first file are of other texts
    file = sample_files(models[1].folder.samples)[0]
    file.unlink()
    silent = answers_by(lambda row: "" if row["k"] else "other words")
    draw_answers(requests, tmp_path / "models/1", protocol, silent, f"{1:064x}")
    results = conclude(tmp_path, models, protocol, ["length"], title="")
    assert {row["num_prompts"] for row in (*results["results"], *results["comparisons"])} == {8}
    failures = [row for row in results["failures"] if row["model"] == "round 1"]
    assert len(failures) == 64 and failures[0]["what"] == "no score by length; its prompt is left out for every model"
    assert not [row for row in results["failures"] if row["model"] == "base"]


def test_a_score_belongs_to_the_sample_that_it_was_given_for() -> None:
    rows = {("a", 0): {"sha256": "x"}, ("a", 1): {"sha256": None}}
    scores = [{"id": "a", "k": k, "sha256": sha256, "score": 1.0} for k, sha256 in ((0, "x"), (1, "x"), (2, "x"))]
    assert belonging(rows, scores) == {("a", 0): scores[0]}
    assert belonging(rows, [scores[0] | {"sha256": "y"}]) == {}


def test_empty_answers_count_and_are_told(tmp_path: Path) -> None:
    silent = answers_by(lambda row: "" if row["id"] == "00003" else "some words " + row["prompt"])
    results = evaluate(tmp_path, [MODELS[0], ("m", "candidate", None, silent, 0.0)], rows=prompts(30))
    assert [(row["id"], row["what"]) for row in results["failures"]] == [("00003", "empty answer")] * 2
    assert results["comparisons"][-1]["num_prompts"] == 30


# Training curves and measures


def test_curves_and_measures_are_kept(whole) -> None:
    _, results = whole
    assert results["training_curves"] == CURVES and results["measures"] == MEASURES


def test_without_curves_and_measures_there_are_none(tmp_path: Path) -> None:
    results = evaluate(tmp_path, MODELS[:2], rows=prompts(20))
    assert "training_curves" not in results and "measures" not in results


def test_long_curves_are_averaged_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    nan = float("nan")
    curve = [
        {"model": "round 1", "round": 1, "step": step, "r_real": float(step), "r_generated": nan, "loss": None}
        for step in range(1, 3001)
    ]
    random.Random(0).shuffle(curve)
    measure = MEASURES[1] | {"value": nan, "low": nan}
    results = evaluate(tmp_path, MODELS[:2], rows=prompts(20), curves=curve, measures=[measure])
    kept = results["training_curves"]
    assert len(kept) == MAX_CURVE_POINTS and [row["step"] for row in kept[:2]] == [10, 20] and kept[-1]["step"] == 3000
    assert kept[0]["r_real"] == 5.5 and kept[0]["r_generated"] is None and kept[0]["loss"] is None
    assert results["measures"][0]["value"] is None
    assert read_results(tmp_path / "results.json")["training_curves"] == kept


def test_results_of_pictures_have_curves_too(tmp_path: Path) -> None:
    texts = [f"prompt {i}" for i in range(20)]
    set_ = PromptSet("p", tuple(PromptRow(f"{i:05d}", text) for i, text in enumerate(texts)), "0" * 64, "", "")
    protocol = protocols.protocol_of(
        set_, images_per_prompt=1, seed=0, sampling=Sampling("ddim", 1, 3.0, 8), guidance_scales=[3.0]
    )
    accelerator, models = Accelerator(cpu=True), []
    for place, name in enumerate(("base", "round 1")):
        folder = SampleFolder(tmp_path / name / "images", tmp_path / name / "scores")

        def draw(prompts_: list[str], seeds: list[int], sampling: Sampling, done: Any, place: int = place) -> list:
            rngs = [np.random.default_rng([seed % 1000, place]) for seed in seeds]
            return [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for rng in rngs]

        wanted = set_.requests(1, 0)
        shards = picture_shards(wanted, folder.samples, protocol, "", draw)
        draw_samples(shards, accelerator, lambda scale, total: Progress().phase("", total))
        score_samples({name: folder}, [3.0], ["sharpness"], accelerator, Progress().phase)
        models.append(EvaluatedModel(name, "round" if place else "baseline", folder, place))
    results = conclude(
        tmp_path, models, protocol, ["sharpness"], title="", headline_scale=3.0, curves=CURVES, measures=MEASURES
    )
    assert read_results(tmp_path / "results.json") == results
    assert results["training_curves"] == CURVES and results["measures"] == MEASURES
    assert modality_of(results["protocol"]) == IMAGES
    assert {"sharpness@3", "sharpness@3/difference"} <= metrics_of(results, "round 1").keys()
    without = conclude(tmp_path, models, protocol, ["sharpness"], title="", headline_scale=3.0)
    assert without == {key: value for key, value in results.items() if key not in ("training_curves", "measures")}


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"images_per_prompt": 1}, "protocol"),
        ({"resolution": 64}, "protocol"),
        ({"answers_per_prompt": 0}, "protocol"),
        ({"answers_per_prompt": None}, "protocol"),
        ({"sampling": {"temperature": 1.0}}, "protocol.sampling"),
    ],
)  # fmt: skip
def test_a_protocol_is_of_pictures_or_of_answers(whole, tmp_path: Path, changed: dict, place: str) -> None:
    root, results = whole
    protocol = {key: value for key, value in (results["protocol"] | changed).items() if value is not None}
    (tmp_path / "results.json").write_text(json.dumps(results | {"protocol": protocol}))
    with pytest.raises(InputError, match="not what an evaluation writes: " + place):
        read_results(tmp_path / "results.json")
