import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from spin_diffusion.evaluation.evaluated import read_scores, scorer_record
from spin_diffusion.samples.drawn import requests_of, sample_files
from spin_diffusion.store.files import read_rows, rows_metadata
from spin_diffusion.store.input_error import InputError
from tests.evaluation.made_up_answers import (
    answers_by,
    babble,
    draw_answers,
    folder_of,
    judge_answers,
    likes,
    prompts,
    protocol_of,
)

REQUESTS = requests_of(prompts(40), 4, 7)
PROTOCOL = protocol_of(REQUESTS)


class Counting:
    """A model that remembers which requests it was asked."""

    def __init__(self, model: int = 0) -> None:
        self.draw, self.asked = babble(model), []

    def __call__(self, rows: list[dict[str, Any]], done: Any) -> list[dict[str, Any]]:
        self.asked.append(len(rows))
        return self.draw(rows, done)


def draw(folder: Path, model: Any, protocol: dict[str, Any] = PROTOCOL, requests: Any = REQUESTS, **more: Any) -> None:
    draw_answers(requests, folder, protocol, model, **more)


def judge(folder: Path, specs: list[str], log_likelihood: Any = None) -> None:
    judge_answers({"m": folder}, specs, {"m": log_likelihood} if log_likelihood else None)


def answer_files(folder: Path) -> list[Path]:
    return sample_files(folder / "answers")


def every_answer(folder: Path) -> list[dict[str, Any]]:
    return [row for path in answer_files(folder) for row in read_rows(path)]


def read_answer_scores(folder: Path, name: str) -> list[Any]:
    return read_scores(folder_of(folder), name, None)


def read_judge(folder: Path, name: str) -> dict[str, Any]:
    return scorer_record(folder_of(folder), name)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Requests and protocol


def test_every_answer_has_a_seed_of_its_own_that_models_share() -> None:
    assert [(row["id"], row["k"]) for row in REQUESTS[:5]] == [*(("00000", k) for k in range(4)), ("00001", 0)]
    assert len({row["seed"] for row in REQUESTS}) == 160
    assert requests_of(prompts(40), 4, 7) == REQUESTS != requests_of(prompts(40), 4, 8)


def test_the_protocol_says_what_changes_the_answers() -> None:
    assert PROTOCOL["prompt_set"]["num_prompts"] == 40 and PROTOCOL["answers_per_prompt"] == 4
    assert protocol_of(REQUESTS, name="other", source="elsewhere")["id"] == PROTOCOL["id"]
    different = [
        protocol_of(REQUESTS, temperature=0.7), protocol_of(REQUESTS, max_new_tokens=9), protocol_of(REQUESTS, seed=1),
        protocol_of(REQUESTS, top_k=50), protocol_of(REQUESTS, template="ab"), protocol_of(REQUESTS[:-4]),
        protocol_of([row | {"reference": "other"} for row in REQUESTS]),
    ]  # fmt: skip
    assert len({PROTOCOL["id"], *(one["id"] for one in different)}) == 8
    with pytest.raises(InputError, match="the prompt 00039 is asked for the answers"):
        protocol_of(REQUESTS[:-1])


# Drawing


def test_what_is_drawn_stays_and_a_lost_shard_is_drawn_again(tmp_path: Path) -> None:
    model = Counting()
    draw(tmp_path, model)
    assert model.asked == [64, 64, 32]
    assert [path.name for path in answer_files(tmp_path)] == [f"0000{i}-of-00003.parquet" for i in range(3)]
    whole, rows = contents(tmp_path), every_answer(tmp_path)
    assert [(row["id"], row["k"], row["seed"]) for row in rows] == [(r["id"], r["k"], r["seed"]) for r in REQUESTS]
    again = Counting()
    draw(tmp_path, again)
    assert again.asked == []
    answer_files(tmp_path)[1].unlink()
    with pytest.raises(InputError, match="incomplete: run the same command again"):
        answer_files(tmp_path)
    draw(tmp_path, again)
    assert again.asked == [64] and contents(tmp_path) == whole


@pytest.mark.parametrize(
    "changed",
    [
        {"weights_sha256": "b"},
        {"protocol": protocol_of(REQUESTS, temperature=0.5)},
        {"requests": [row | {"reference": "other"} for row in REQUESTS]},
    ],
)
def test_other_weights_another_protocol_or_other_prompts_draw_again(tmp_path: Path, changed: dict[str, Any]) -> None:
    draw(tmp_path, babble(), weights_sha256="a")
    model = Counting()
    draw(tmp_path, model, **({"weights_sha256": "a"} | changed))
    assert model.asked == [64, 64, 32]
    assert rows_metadata(answer_files(tmp_path)[0])["weights"] == changed.get("weights_sha256", "a")


def test_shards_of_a_longer_protocol_do_not_stay(tmp_path: Path) -> None:
    draw(tmp_path, babble())
    few = REQUESTS[:64]
    draw(tmp_path, babble(), protocol_of(few), few)
    assert [path.name for path in answer_files(tmp_path)] == ["00000-of-00001.parquet"]
    assert len(every_answer(tmp_path)) == 64


def test_processes_share_shards_out_and_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "one", babble())
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr("spin_diffusion.store.files.shared_out", lambda things, one: things[one.process_index :: 2])
    asked = []
    for index in (1, 0):
        monkeypatch.setattr(Accelerator, "process_index", property(lambda self, index=index: index))
        monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self, index=index: index == 0))
        model = Counting()
        draw(tmp_path / "two", model)
        asked.append(model.asked)
    assert asked == [[64], [64, 32]]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_odd_texts_survive(tmp_path: Path) -> None:
    odd = [
        "",
        " \n",
        "\U0001f468\u200d\U0001f680",
        "\u202e\u05e9\u05dc\u05d5\u05dd",
        "x" * 10_000,
        "\x00\x1b",
        "half \ud83d",
    ]
    requests = requests_of([{"prompt": f"p \ud800 {i}"} for i in range(len(odd))], 1, 0)
    draw(tmp_path, answers_by(lambda row: odd[int(row["id"])]), protocol_of(requests), requests)
    assert [row["text"] for row in every_answer(tmp_path)] == [*odd[:-1], "half ?"]
    assert {row["reference"] for row in every_answer(tmp_path)} == {None}


# Judging


def test_scores_stay_and_belong_to_the_answers(tmp_path: Path) -> None:
    draw(tmp_path, babble(), weights_sha256="a")
    asked = []

    def log_likelihood(wanted: list[str], completions: list[str]) -> list[float]:
        asked.append(len(wanted))
        return likes(0, 0.0)(wanted, completions)

    judge(tmp_path, ["length", "log_likelihood"], log_likelihood)
    assert asked == [16, 16, 8], "each prompt once"
    lengths = {(row["id"], row["k"]): row["score"] for row in read_answer_scores(tmp_path, "length")}
    assert lengths == {(row["id"], row["k"]): float(row["num_tokens"]) for row in every_answer(tmp_path)}
    whole = contents(tmp_path)
    judge(tmp_path, ["length", "log_likelihood"], log_likelihood)
    assert len(asked) == 3 and contents(tmp_path) == whole
    assert read_judge(tmp_path, "length")["state"] == "run"
    (tmp_path / "scores/log_likelihood/00001-of-00003.parquet").unlink()
    judge(tmp_path, ["log_likelihood"], log_likelihood)
    assert asked[3:] == [16] and contents(tmp_path) == whole


def test_scores_of_other_weights_or_texts_do_not_count_and_are_given_again(tmp_path: Path) -> None:
    draw(tmp_path, babble(), weights_sha256="a")
    judge(tmp_path, ["length", "log_likelihood"], likes(0, 0.0))
    before = {row["id"]: row["score"] for row in read_answer_scores(tmp_path, "log_likelihood")}
    # The same texts by other weights: the real answers are as likely as the new model says
    draw(tmp_path, babble(), weights_sha256="b")
    assert read_answer_scores(tmp_path, "log_likelihood") == [] == read_answer_scores(tmp_path, "length")
    judge(tmp_path, ["length", "log_likelihood"], likes(0, 5.0))
    after = {row["id"]: row["score"] for row in read_answer_scores(tmp_path, "log_likelihood")}
    assert {id_: score + 5 for id_, score in before.items()} == pytest.approx(after)
    # Other texts by the same weights
    answer_files(tmp_path)[0].unlink()
    draw(tmp_path, babble(1, 30), weights_sha256="b")
    assert len(read_answer_scores(tmp_path, "length")) == 160 - 64
    judge(tmp_path, ["length"])
    assert [row["score"] for row in read_answer_scores(tmp_path, "length")][:64] == [31.0] * 64


def test_a_judge_that_cannot_run_has_a_reason_and_no_score(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw(tmp_path, babble())
    nan = tmp_path / "sometimes.py"
    nan.write_text(
        "def load(device):\n    return lambda answers, ll: [1.0 if a.id < '00020' else float('nan') for a in answers]\n"
    )
    judge(tmp_path, ["reward_model=/no/such", str(nan), "log_likelihood", "length"])
    printed = capsys.readouterr().out
    for name, reason in (
        ("reward_model", "/no/such is no folder"), ("sometimes", "returned nan for the prompt"),
        ("log_likelihood", "it asks the model m, which is not loaded here"),
    ):  # fmt: skip
        said = read_judge(tmp_path, name)
        assert said["state"] == "not run" and reason in said["reason"]
        assert f"scorer {name} was not run: {said['reason']}" in printed
    assert read_judge(tmp_path, "length")["state"] == "run"
    assert not list((tmp_path / "scores").glob("reward_model/*")) and not list((tmp_path / "scores").glob("log_l*/*"))
    judge(tmp_path, ["log_likelihood"], likes(0, 0.0))
    assert read_judge(tmp_path, "log_likelihood")["state"] == "run", "it is tried again"


def test_each_model_is_asked_by_its_own_log_likelihood(tmp_path: Path) -> None:
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for folder in folders.values():
        draw(folder, babble())
    judge_answers(folders, ["log_likelihood"], {"a": likes(0, 0.0), "b": likes(0, 3.0)})
    a, b = (read_answer_scores(folder, "log_likelihood")[0]["score"] for folder in folders.values())
    assert b == pytest.approx(a + 3) and math.isfinite(a)


def test_two_judges_of_one_name_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, babble())
    with pytest.raises(InputError, match="'length' twice"):
        judge(tmp_path, ["length", "length"])
    with pytest.raises(InputError, match="there is no 'nothing'"):
        judge(tmp_path, ["nothing"])
    assert not (tmp_path / "scores").exists()


def test_the_record_of_a_judge_is_all_of_its_about(tmp_path: Path) -> None:
    draw(tmp_path, babble())
    judge(tmp_path, ["length"])
    said = json.loads((tmp_path / "scores/length.json").read_text())
    assert said["name"] == "length" and said["role"] == "drift" and said["title"] == "Length"
    assert said["checkpoint"] == {} and said["reason"] == "" and "tokens" in said["scale"]
