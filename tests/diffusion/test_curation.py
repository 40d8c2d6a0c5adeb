"""Curation: which real images are chosen, what a kill costs, what is refused, and the script from end to end."""

import io
import re
import runpy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from spin_diffusion.data.rows import Example
from spin_diffusion.data.settings import CurationSettings, DataSettings
from spin_diffusion.diffusion import curation as curation_module
from spin_diffusion.diffusion.curation import (
    Curation,
    check_judges,
    choose,
    content_settings,
    curation_line,
    curation_lines,
)
from spin_diffusion.diffusion.game import example_id
from spin_diffusion.diffusion.settings import CandidateSettings
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.store.files import read_json, read_rows
from spin_diffusion.store.hashes import file_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.run_dir import file_hash
from tests.test_processes import play as play_in_processes

ROOT = Path(__file__).resolve().parents[2]

BRIGHTNESS = """
import numpy as np
import torch

CALLS = []


def load(device):
    return score


def score(images, prompts):
    CALLS.append((len(images), [image.size for image in images]))
    return torch.tensor([float(np.asarray(image.convert("L")).mean()) for image in images])
"""

NOTES = """
import os
import time
from pathlib import Path

plain = score


def score(images, prompts):
    time.sleep(0.3)  # long enough for the other process to take a file as well
    with open(Path(__file__).with_name(f"{os.environ.get('LOCAL_RANK', 0)}.scored"), "a") as file:
        file.write(f"{len(images)}\\n")
    return plain(images, prompts)
"""


@pytest.fixture
def brightness(tmp_path: Path) -> str:
    path = tmp_path / "brightness.py"
    path.write_text(BRIGHTNESS)
    return str(path)


# The rules


def reference(scores, ids, prompts, one_per_prompt, threshold, top) -> set[int]:
    """The rules as one would say them, with sorted lists."""
    places = list(range(len(scores)))
    if one_per_prompt:
        best = {}
        for place in places:
            other = best.get(prompts[place])
            if other is None or (-scores[place], ids[place]) < (-scores[other], ids[other]):
                best[prompts[place]] = place
        places = list(best.values())
    if threshold is not None:
        places = [place for place in places if scores[place] >= threshold]
    if top is not None:
        places = sorted(places, key=lambda place: (-scores[place], ids[place]))[:top]
    return set(places)


@pytest.mark.parametrize("one_per_prompt", [False, True])
@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("top", [None, 3, 100])
def test_the_chosen_are_those_of_the_plain_rules(one_per_prompt, threshold, top):
    rng = np.random.default_rng(0)
    settings = CurationSettings("any", top, threshold)
    for _ in range(50):
        scores = rng.integers(0, 5, 20).astype(np.float64)  # many ties
        ids = rng.permutation(20).astype(np.uint64)
        prompts = rng.integers(0, 8, 20).astype(np.uint64)
        choice = choose(scores, ids, prompts, settings, one_per_prompt)
        expected = reference(scores, ids, prompts, one_per_prompt, threshold, top)
        assert set(np.flatnonzero(choice.chosen).tolist()) == expected
        assert sum(choice.left_out.values()) == 20 - len(expected)


def test_one_per_prompt_comes_before_the_threshold_and_the_top():
    scores = np.array([9.0, 8.0, 3.0, 2.0])
    ids, prompts = np.arange(4, dtype=np.uint64), np.array([0, 0, 1, 2], np.uint64)
    choice = choose(scores, ids, prompts, CurationSettings("any", 2, 2.5), True)
    assert choice.chosen.tolist() == [True, False, True, False]
    assert choice.left_out == {"--one_image_per_prompt": 1, "--curation threshold 2.5": 1, "--curation top 2": 0}


def test_of_equal_scores_the_lower_id_wins_whatever_the_order_of_the_data():
    scores, prompts = np.full(4, 0.5), np.zeros(4, np.uint64)
    for ids in ([4, 3, 2, 1], [1, 2, 3, 4], [2**63 + 1, 2**63, 2**63 + 2, 2**63 + 3]):
        ids = np.array(ids, np.uint64)
        assert ids[choose(scores, ids, prompts, CurationSettings("any", 1)).chosen] == [min(ids)]
        assert ids[choose(scores, ids, prompts, CurationSettings("any"), True).chosen] == [min(ids)]


def test_a_score_at_the_threshold_is_kept_though_scorers_return_fp32():
    scores = np.array(torch.tensor([0.7, 0.69]).tolist())
    assert scores[0] < 0.7
    choice = choose(
        scores, np.arange(2, dtype=np.uint64), np.arange(2, dtype=np.uint64), CurationSettings("x", None, 0.7)
    )
    assert choice.chosen.tolist() == [True, False]


# Reading, scoring, going on


def picture(level: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


WARNING = "  brightness chose what is learnt, so a rise of its score alone is no gain: judge by other scorers"
LEVELS = [50, 200, 10, 130, 90, 250, 70, 30, 180, 110, 20]


@dataclass(eq=False)
class Data:
    """A data set of grey pictures that counts how often it is read and how many examples are alive."""

    levels: list[int]
    read: int = 0
    alive: int = 0
    most_alive: int = 0

    def __call__(self) -> Iterator[Example]:
        self.read += 1
        for number, level in enumerate(self.levels):
            example = Example(f"prompt {number // 2}", picture(level), None, f"row {number}")
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(example, self._died)
            yield example
            del example

    def _died(self) -> None:
        self.alive -= 1


def rows_of(examples):
    for example in examples:
        yield {"id": example_id(example), "prompt": example.prompt, "image": example.image}


def make(
    tmp_path: Path,
    data: Data,
    scorer: str,
    shard: int = 4,
    decides: dict | None = None,
    one_per_prompt: bool = False,
    **rules,
) -> Curation:
    return Curation(
        CurationSettings(scorer, **rules), tmp_path / "curation", tmp_path / "data" / "curation.parquet",
        decides or {}, data, example_id, rows_of, shard, "cpu", one_per_prompt,
    )  # fmt: skip


def levels(examples: Iterator[Example]) -> list[int]:
    return [open_picture(example.image).getpixel((0, 0))[0] for example in examples]


def test_the_chosen_examples_come_in_the_order_of_the_data_set(brightness, tmp_path):
    data = Data(LEVELS)
    curation = make(tmp_path, data, brightness, top=4)
    assert levels(curation.take(data)) == [200, 130, 250, 180]
    table = pq.read_table(tmp_path / "data" / "curation.parquet").to_pylist()
    assert [row["score"] for row in table] == [float(level) for level in LEVELS]
    assert [row["chosen"] for row in table] == [level >= 130 for level in LEVELS]
    assert table[3] == {
        "id": example_id(list(data())[3]), "prompt": "prompt 1", "score": 130.0, "chosen": True,
    }  # fmt: skip
    assert curation_line(curation.summary) == "curated by brightness: 4 of 11 kept (scores 130 to 250)"
    assert curation_lines(curation.summary, curation.settings)[1:] == ["  left out by --curation top 4: 7", WARNING]


def test_a_top_larger_than_the_set_is_a_note(brightness, tmp_path):
    data = Data(LEVELS)
    curation = make(tmp_path, data, brightness, top=100, one_per_prompt=True)
    assert levels(curation.take(data)) == [200, 130, 250, 70, 180, 20]
    assert curation_lines(curation.summary, curation.settings)[1:] == [
        "  left out by --one_image_per_prompt: 5", "  --curation top 100 is more than the 6 there are", WARNING,
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_data_set(brightness, tmp_path):
    most = []
    for count in (40, 400):
        data = Data([number * 7 % 256 for number in range(count)])
        curation = make(tmp_path / str(count), data, brightness, shard=64, threshold=128.0)
        assert sum(1 for _ in curation.take(data)) == sum(level >= 128 for level in data.levels)
        most.append(data.most_alive)
    assert most[0] == most[1] <= curation_module.BATCH + 2


@pytest.mark.parametrize("count", [1, 3, 4, 8, 11])
@pytest.mark.parametrize("killed_at", [0, 3, 6, 10])
def test_a_killed_scoring_goes_on_where_it_was(brightness, tmp_path, count, killed_at, monkeypatch):
    plain = Data(LEVELS[:count])
    whole = levels(make(tmp_path / "whole", plain, brightness, threshold=60.0, decides={"a": 1}).take(plain)) \
        if max(LEVELS[:count]) >= 60 else None  # fmt: skip
    stop = {"at": killed_at}

    def dying() -> Iterator[Example]:
        for number, example in enumerate(Data(LEVELS[:count])()):
            if number == stop["at"]:
                raise KeyboardInterrupt
            yield example

    killed = make(tmp_path / "killed", dying, brightness, threshold=60.0, decides={"a": 1})
    if killed_at < count:
        with pytest.raises(KeyboardInterrupt):
            list(killed.take(dying))
        assert len(list((tmp_path / "killed" / "curation").glob("0*.parquet"))) == killed_at // 4
    stop["at"] = None
    scored = []
    score = curation_module.score_rows
    monkeypatch.setattr(curation_module, "score_rows", lambda scorer, rows: scored.extend(rows) or score(scorer, rows))
    if whole is None:
        with pytest.raises(InputError):
            killed.take(dying)
        return
    assert levels(killed.take(dying)) == whole
    if killed_at < count:
        assert len(scored) == count - killed_at // 4 * 4
    assert file_hash(killed.table) == file_hash(tmp_path / "whole" / "data" / "curation.parquet")


def test_files_of_a_longer_data_set_are_not_taken_for_scores(brightness, tmp_path):
    """As two processes leave them that are killed: the later file is there, the one before it is not."""
    whole = make(tmp_path, Data(LEVELS), brightness, top=2)
    whole.score(None)
    (whole.directory / "complete.json").unlink()
    (whole.directory / "00001.parquet").unlink()
    shorter = Data(LEVELS[:7])  # three in the file that is scored anew, and three in the one behind it
    with pytest.raises(InputError, match="is not the one that was scored"):
        list(make(tmp_path, shorter, brightness, top=2).take(shorter))


def test_what_is_scored_is_not_scored_again_when_the_rules_change(brightness, tmp_path, monkeypatch):
    data = Data(LEVELS)
    with pytest.raises(InputError) as error:
        make(tmp_path, data, brightness, threshold=251.0).take(data)
    assert str(error.value) == (
        "--curation threshold 251 leaves none of the real images: brightness scores 11 images from 10 to 250, the "
        "median is 90; give a lower one, their scores are kept"
    )
    monkeypatch.setattr(curation_module, "load_scorer", lambda *_: pytest.fail("it was scored already"))
    assert levels(make(tmp_path, data, brightness, threshold=200.0).take(data)) == [200, 250]
    assert data.read == 2  # once to score, once to take
    curation = make(tmp_path, data, brightness, threshold=200.0)
    curation.forget()
    assert not curation.directory.exists()


def test_other_data_settings_or_another_scorer_are_scored_again(brightness, tmp_path):
    data = Data(LEVELS)
    list(make(tmp_path, data, brightness, decides={"resolution": 8}, top=2).take(data))
    Path(brightness).with_name("darkness.py").write_text(BRIGHTNESS.replace("float(np", "-float(np"))
    darkness = str(Path(brightness).with_name("darkness.py"))
    assert levels(make(tmp_path, data, darkness, decides={"resolution": 8}, top=2).take(data)) == [10, 20]
    brighter = Data([5, *LEVELS[1:]])
    again = make(tmp_path, brighter, darkness, decides={"resolution": 16}, top=2)
    assert levels(again.take(brighter)) == [5, 10]


def test_other_weights_behind_the_same_name_score_everything_again(brightness, tmp_path, monkeypatch):
    data, scored, score, load = Data(LEVELS), [], curation_module.score_rows, curation_module.load_scorer
    curation = make(tmp_path, data, brightness, top=2)
    curation.score(None)
    (curation.directory / "complete.json").unlink()  # as a kill at the end leaves it

    monkeypatch.setattr(curation_module, "score_rows", lambda scorer, rows: scored.extend(rows) or score(scorer, rows))
    monkeypatch.setattr(
        curation_module, "load_scorer", lambda *given: replace(load(*given), checkpoint={"weights": "others"})
    )
    curation.score(None)
    assert len(scored) == len(LEVELS)


def test_a_data_set_that_changes_in_between_is_refused(brightness, tmp_path):
    data = Data(LEVELS)
    for number, changed in enumerate(([1, *LEVELS[1:]], LEVELS[:-1], [*LEVELS, 7], LEVELS[::-1])):
        curation = make(tmp_path / str(number), data, brightness, top=2)
        with pytest.raises(InputError, match=r"have changed; delete .*curation"):
            list(curation.take(Data(changed)))


# What is refused


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ({"top": 5}, ["--curation top needs a scorer"]),
        ({"top": 5, "threshold": 0.2}, ["--curation top and threshold need a scorer"]),
        ({"scorer": "pickscore"}, ["pickscore has no rule", "give top"]),
        ({"scorer": "pickscore", "top": 0}, ["--curation top 0 must be at least 1"]),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, parts):
    with pytest.raises(InputError) as error:
        DataSettings(curation=CurationSettings(**rules))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("spec", "part"),
    [("pickscor", "did you mean pickscore"), ("nowhere.py", "does not exist"), ("sharpness", "score of drift")],
)
def test_a_scorer_that_cannot_choose_is_refused_before_anything_is_loaded(spec, part):
    with pytest.raises(InputError, match=part) as error:
        check_judges(CurationSettings(spec, 5), CandidateSettings())
    assert str(error.value).startswith(f"--curation scorer {spec}: ")
    check_judges(CurationSettings(), CandidateSettings())
    check_judges(CurationSettings("pickscore", 5), CandidateSettings())


def test_a_scorer_that_fails_is_named_by_its_flag(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(
        "import torch\ndef load(device):\n    return lambda images, prompts: torch.full((len(images),), torch.nan)\n"
    )
    data = Data(LEVELS)
    with pytest.raises(
        InputError, match=r"--curation scorer .*broken.py: scorer broken returned nan for the prompt 'pro"
    ):
        make(tmp_path, data, str(path), top=1).take(data)
    spec = f"pickscore={tmp_path / 'nowhere'}"
    with pytest.raises(InputError, match=r"--curation scorer pickscore=.*nowhere: "):
        make(tmp_path, data, spec, top=1).take(data)


def test_the_hash_of_a_users_own_scorer_is_part_of_the_settings(brightness):
    before = content_settings(CurationSettings(brightness, 5))
    Path(brightness).write_text(BRIGHTNESS + "\n# another\n")
    assert content_settings(CurationSettings(brightness, 5)) != before
    # Of a scorer that comes along, too: its code may change with the version
    assert re.fullmatch(
        r"pickscore \(SHA-256 [0-9a-f]{16}\)", content_settings(CurationSettings("pickscore", 5))["scorer"]
    )


# From end to end


@pytest.fixture
def settings(sdxl_dir, tiny_parquet, tiny_prompts, brightness, tmp_path) -> dict:
    return {
        "pretrained_model_name_or_path": str(sdxl_dir),
        "dataset_name": str(tiny_parquet),
        "resolution": 16,
        "rounds": 1,
        "max_train_steps": 1,
        "train_batch_size": 2,
        "learning_rate": 1e-4,
        "beta": 2000,
        "num_inference_steps": 1,
        "guidance_scale": 1,
        "samples_per_shard": 5,
        "report_to": "none",
        "preview_every": 0,
        "curation": {"scorer": brightness},
        "output_dir": str(tmp_path / "out"),
    }


def play(tmp_path: Path, settings: dict, *argv: str) -> int:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    script = str(ROOT / "training" / "train_spin_sdxl.py")
    return runpy.run_path(script)["main"](["--config", str(config), *argv])


def refused(capsys, code: int, *parts: str) -> None:
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(error) == 1, error
    for part in parts:
        assert part in error[0]


def test_the_script_plays_with_the_brightest_images_as_they_are_stored(settings, tiny_prompts, tmp_path, capsys):
    settings |= {"validation_prompts": str(tiny_prompts), "scorers": [settings["curation"]["scorer"]]}
    assert play(tmp_path, settings, "--curation", "{top: 6}") == 0
    out = tmp_path / "out"
    # Of four colours the yellow ones are the brightest, and there are six of them
    rows = [row for path in sorted((out / "data" / "samples").iterdir()) for row in read_rows(path)]
    assert len(rows) == 6 and all("yellow" in row["prompt"] for row in rows)
    table = {row["id"]: row for row in pq.read_table(out / "data" / "curation.parquet").to_pylist()}
    assert len(table) == 24
    for row in rows:
        stored = np.asarray(open_picture(row["image"]).convert("L"))
        assert stored.shape == (16, 16) and table[row["id"]]["chosen"]
        assert table[row["id"]]["score"] == pytest.approx(stored.mean(), abs=1e-4)
    assert min(table[row["id"]]["score"] for row in rows) > max(
        row["score"] for row in table.values() if not row["chosen"]
    )
    printed = capsys.readouterr().out
    assert "curated by brightness: 6 of 24 kept (scores " in printed
    assert "left out by --curation top 6: 18" in printed and "Data       6 pairs, curated by" in printed
    curated = read_json(out / "manifest.json")["data"]["left_out"]["curation"]
    assert (curated["scored"], curated["kept"], curated["left_out"]) == (24, 6, {"--curation top 6": 18})
    assert not (out / "curation").exists()
    assert ", chosen by brightness" in (out / "README.md").read_text()
    # What chose is no independent judge
    scorers = read_results(out / "results.json")["scorers"]
    assert [(scorer["name"], scorer["role"]) for scorer in scorers] == [("brightness", "in-domain")]
    # The same command again: nothing is scored
    weights = file_hash(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert play(tmp_path, settings, "--curation", "{top: 6}") == 0
    assert "Data       6 pairs, curated by" in capsys.readouterr().out
    assert file_hash(out / "unet" / "diffusion_pytorch_model.safetensors") == weights
    # Other rules, or another scorer under the same name
    refused(capsys, play(tmp_path, settings, "--curation", "{top: 7}"), "curation top: 6 -> 7", "another --output_dir")
    Path(settings["curation"]["scorer"]).write_text(BRIGHTNESS + "\n# another\n")
    code = play(tmp_path, settings, "--curation", "{top: 6}")
    refused(capsys, code, "prepared with other settings (curation)")


def test_two_processes_score_the_same_as_one_and_share_the_work(settings, tmp_path):
    scorer = Path(settings["curation"]["scorer"])
    scorer.write_text(BRIGHTNESS + NOTES)
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        play_in_processes(
            settings | {"train_batch_size": 2 // count, "curation": {"scorer": str(scorer), "top": 6}}, folder, count
        )
        by_process = {path: sum(map(int, path.read_text().split())) for path in tmp_path.glob("*.scored")}
        assert len(by_process) == count and sum(by_process.values()) == 24
        for path in by_process:
            path.unlink()
        data = folder / "out" / "data"
        found.append(file_hashes([data / "curation.parquet", data / "samples"], data))
        assert not (folder / "out" / "curation").exists()
    assert found[0] == found[1] and len(found[0]) == 3


def test_of_a_human_pair_the_winner_is_scored(settings, tmp_path, capsys):
    # The losers are grey and brighter than the winners but for the yellow and green ones
    assert play(tmp_path, settings, "--objective", "dpo", "--curation", "{top: 6}") == 0
    rows = [row for path in (tmp_path / "out" / "data" / "samples").iterdir() for row in read_rows(path)]
    assert len(rows) == 6 and all("yellow" in row["prompt"] and row["loser_image"] for row in rows)


def test_a_threshold_that_leaves_nothing_can_be_corrected_in_the_same_folder(settings, tmp_path, capsys):
    refused(capsys, play(tmp_path, settings, "--curation", "{threshold: 250}"), "--curation threshold 250 leaves none")
    path = Path(settings["curation"]["scorer"])
    assert play(tmp_path, settings, "--curation", "{threshold: 150}") == 0
    assert "curated by brightness" in capsys.readouterr().out and path.is_file()


def test_bad_rules_are_refused_before_the_folder_is_made(settings, tmp_path, capsys):
    refused(capsys, play(tmp_path, settings), "has no rule to choose by")
    refused(
        capsys,
        play(tmp_path, settings | {"curation": {"scorer": "sharpness"}}, "--curation", "{top: 3}"),
        "score of drift",
    )
    assert not (tmp_path / "out").exists()
