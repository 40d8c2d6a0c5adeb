"""Self-labelled candidates from the command line: end to end with a scorer of one's own, and what is refused."""

from pathlib import Path

import pytest
import yaml

from spin_diffusion.diffusion.curation import scorer_as_judge
from spin_diffusion.store.files import read_json, read_rows
from tests.cli.test_scripts import play, refused, run, settings  # noqa: F401
from tests.test_processes import play as play_in_processes

# How warm a picture is: known exactly from its pixels
SCORER = """
import numpy as np
import torch

def load(device):
    def score(images, prompts):
        return torch.tensor([{sign} * float(np.asarray(image)[..., 0].mean()) for image in images])
    return score
"""


@pytest.fixture
def scorer(tmp_path) -> Path:
    path = tmp_path / "warmth.py"
    path.write_text(SCORER.format(sign=1))
    return path


@pytest.fixture
def asked(settings, scorer) -> dict:  # noqa: F811
    return settings | {
        "candidates": {"number": 3, "scorer": str(scorer)}, "validation_prompts": None, "scorers": None,
        "samples_per_shard": 8, "max_train_samples": 24,
    }  # fmt: skip


def with_(asked: dict, **changed) -> dict:
    """The settings with other candidates."""
    return asked | {"candidates": asked["candidates"] | changed}


def rows_of(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in read_rows(path)]


def test_one_command_plays_with_candidates_and_a_scorer_of_ones_own(asked, scorer, tmp_path, capsys):
    half = with_(asked, share=0.5) | {"compare_with": ["sft"]}
    assert play(tmp_path, half) == 0
    printed = capsys.readouterr().out
    assert "Candidates 3 for 50% of the prompts, best against worst by" in printed
    assert "spin round 1: candidates' best" in printed
    folder = tmp_path / "out" / "round-1"
    samples = {(row["id"], row["k"]): row for row in rows_of(folder / "samples")}
    judge = scorer_as_judge(str(scorer), "cpu")
    judged = [row for row in rows_of(folder / "choices") if row["scores"] is not None]
    assert 0 < len(judged) < 24
    for row in judged:
        scores = [judge([samples[row["id"], k]])[0] for k in range(3)]
        assert row["scores"] == pytest.approx(scores)
        assert scores[row["real"]] == max(scores) > min(scores) == scores[row["generated"]]
    said = read_json(folder / "round.json")["candidates"]
    assert said["judge"].startswith(f"{scorer} (SHA-256 ") and said["mean_best"] > said["mean_worst"]
    assert not (tmp_path / "out" / "compare-sft" / "round-1" / "choices").exists()
    # Once more: nothing to do. With another number, share or scorer: refused with the difference
    assert play(tmp_path, half) == 0
    capsys.readouterr()
    for change in ({"number": 4}, {"share": 0.75}, {"scorer": "pickscore"}):
        code = play(tmp_path, with_(half, **change))
        refused(capsys, code, "other settings", f"candidates {next(iter(change))}", "->")


def test_a_scorer_of_the_evaluation_is_said_to_be_no_witness(asked, scorer, tiny_prompts, tmp_path, capsys):
    asked |= {"scorers": [str(scorer)], "validation_prompts": str(tiny_prompts)}
    assert play(tmp_path, asked) == 0
    assert "says what was aimed at, not what was gained" in capsys.readouterr().out


@pytest.mark.parametrize("change, parts", [
    ({"candidates": {"number": 3}}, ["--candidates number 3 needs a scorer"]),
    ({"candidates": {"scorer": "pickscore"}}, ["--candidates scorer pickscore needs a number of 2 or more"]),
    ({"candidates": {"share": 0.5}}, ["--candidates share 0.5 needs"]),
    ({"candidates": {"number": 1}}, ["--candidates number 1 must be at least 2"]),
    ({"candidates": {"number": -2}}, ["--candidates number -2 must be at least 2"]),
    ({"candidates": {"number": 3, "scorer": "x.py", "share": 0}}, ["--candidates share 0", "above 0 and at most 1"]),
    ({"candidates": {"number": 3, "scorer": "pickscore", "share": 1.5}}, ["share 1.5", "above 0 and at most 1"]),
    ({"num_generated": 2}, ["--num_generated 2 and --candidates number 3 exclude each other"]),
    ({"objective": "dpo"}, ["--candidates number 3", "--objective dpo has not"]),
    ({"objective": ["spin", "sft"], "rounds": 2}, ["--objective sft has not"]),
    ({"generated_from": "data"}, ["--objective spin with --generated_from data has not"]),
    ({"candidates": {"number": 3, "scorer": "pickscor"}}, ["scorer pickscor: there is no 'pickscor'", "pickscore?"]),
    ({"candidates": {"number": 3, "scorer": "nowhere.py"}}, ["--candidates scorer nowhere.py: ", "does not exist"]),
    ({"candidates": {"number": 3, "scorer": "sharpness"}}, ["--candidates scorer sharpness", "drift"]),
])  # fmt: skip
def test_what_cannot_be_played_is_refused_before_anything_is_written(asked, tmp_path, capsys, change, parts):
    refused(capsys, play(tmp_path, asked | change), *parts)
    assert not (tmp_path / "out").exists()


def test_a_scorer_without_weights_is_refused_before_anything_is_drawn(asked, tmp_path, capsys):
    refused(capsys, play(tmp_path, with_(asked, scorer=f"pickscore={tmp_path / 'nowhere'}")), "nowhere")
    assert not (tmp_path / "out" / "round-1" / "samples").exists()


def test_a_file_that_changed_makes_its_choices_anew(asked, scorer, tmp_path, monkeypatch):
    """Killed between the judge's shards; then the file is turned round: no choice of the old one is left."""
    from spin_diffusion.samples.sample import CHOICES
    from spin_diffusion.store import files

    plain, written = files.write_rows, []

    def dying(path, *args):
        if path.parent.name == CHOICES:
            if written:
                raise KeyboardInterrupt
            written.append(path)
        plain(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_rows", dying)
        assert play(tmp_path, asked) == 130
    before = read_rows(written[0])
    scorer.write_text(SCORER.format(sign=-1))
    import sys

    for name in [name for name in sys.modules if name.startswith("warmth_")]:  # a new process has not read it
        del sys.modules[name]
    assert play(tmp_path, asked) == 0
    after = read_rows(written[0])
    assert [(row["real"], row["generated"]) for row in before] == [(row["generated"], row["real"]) for row in after]


def test_a_file_that_changed_between_the_rounds_is_refused(asked, scorer, tmp_path, capsys):
    assert play(tmp_path, asked) == 0
    judged = read_json(tmp_path / "out" / "round-1" / "round.json")["candidates"]["judge"]
    original = scorer.read_text()
    scorer.write_text(original + "\n# another\n")
    assert play(tmp_path, asked) == 0  # nothing is left to judge
    code = play(tmp_path, asked | {"rounds": 2})
    refused(capsys, code, f"another judge of candidates than round 1 (then {judged}", "another --output_dir")
    assert not (tmp_path / "out" / "round-2" / "samples").exists()
    scorer.write_text(original)
    assert play(tmp_path, asked | {"rounds": 2}) == 0
    assert read_json(tmp_path / "out" / "round-2" / "round.json")["candidates"]["judge"] == judged


def test_two_processes_choose_the_same_as_one(asked, tmp_path):
    for count in (1, 2):
        settings_ = with_(asked, share=0.5) | {"train_batch_size": 4 // count}
        play_in_processes(settings_, tmp_path / str(count), count)
    one, two = (tmp_path / str(count) / "out" / "round-1" for count in (1, 2))
    names = sorted(path.relative_to(one) for folder in ("samples", "choices") for path in (one / folder).iterdir())
    assert len(names) == 6
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    records = [read_json(folder / "round.json")["candidates"] for folder in (one, two)]
    assert records[0] == records[1]


def test_a_language_model_has_no_such_setting(tmp_path, capsys):
    refused(capsys, run("train_space_llm.py", "--candidates", "{number: 3}"), "unknown setting 'candidates'")


def test_the_resolved_settings_read_back(asked, tmp_path):
    assert play(tmp_path, asked) == 0
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["candidates"]["number"], saved["candidates"]["share"]) == (3, 1.0)
