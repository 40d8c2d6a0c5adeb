"""A round that its evaluation rejects: its opponent plays on, and nothing of it reaches the user."""

from dataclasses import replace
from pathlib import Path

import pytest

from spin_diffusion.evaluation.verdicts import promotion
from spin_diffusion.selfplay.one_round import Judgement
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import ROUNDS, TRAINING, make_game, prepare_data


def play_judged(sdxl_dir: Path, out: Path, rejected: set[int], rounds: int = 3) -> list[dict]:
    game = make_game(sdxl_dir)
    prepare_data(game, out / "data")

    def judge(k: int, folder: Path, parent: int) -> Judgement:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(f'{{"against": {parent}}}')
        return Judgement({"score": float(k)}, k not in rejected, "the score fell" if k in rejected else "")

    training = replace(TRAINING, max_train_steps=1)
    return play(SelfPlay(game, out / "data", out, replace(ROUNDS, rounds=rounds), training, game.accelerator, judge))


def weights(folder: Path) -> str:
    return file_hash(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_rejected_round_is_rolled_back_to_its_opponent(sdxl_dir, tmp_path, capsys):
    records = play_judged(sdxl_dir, tmp_path, rejected={2})
    assert [record["state"] for record in records] == ["PROMOTED", "REJECTED", "PROMOTED"]
    assert [record["parent"] for record in records] == [0, 1, 1]
    # The third round plays against the first's player, as the second did
    assert records[2]["opponent"] == records[1]["opponent"]
    assert records[1]["rejected_because"] == "the score fell"
    assert weights(tmp_path) == weights(tmp_path / "round-3") != weights(tmp_path / "round-2")
    assert "round 2 is rejected (the score fell): the player of round 1 plays on" in capsys.readouterr().out
    assert read_json(tmp_path / "round-3" / "evaluation" / "results.json") == {"against": 1}


def test_a_rejected_last_round_leaves_the_one_before_it_and_is_not_played_again(sdxl_dir, tmp_path):
    first = play_judged(sdxl_dir, tmp_path, rejected={2}, rounds=2)
    for _ in range(2):
        assert weights(tmp_path) == weights(tmp_path / "round-1") != weights(tmp_path / "round-2")
        assert play_judged(sdxl_dir, tmp_path, rejected=set(), rounds=2) == first


def test_when_every_round_is_rejected_there_is_nothing_to_load(sdxl_dir, tmp_path):
    records = play_judged(sdxl_dir, tmp_path, rejected={1, 2}, rounds=2)
    assert not (tmp_path / "unet").exists()
    assert records[1]["parent"] == 0


def results(verdict: str, role: str, overall: str = "inconclusive", state: str = "run") -> dict:
    return {
        "scorers": [{"name": "judge", "role": role, "state": state, "reason": ""}],
        "comparisons": [{"scorer": "judge", "difference": -0.5, "guidance_scale": 3.0, "verdict": verdict}],
        "protocol": {"guidance_scales": [3.0]},
        "verdicts": [{"verdict": overall, "reason": "why"}],
    }


@pytest.mark.parametrize(
    "found, rule, promoted",
    [
        (results("regressed", "truth"), "always", True),
        (results("regressed", "truth"), "not_regressed", False),
        (results("regressed", "held-out"), "not_regressed", False),
        (results("regressed", "alignment"), "not_regressed", False),
        (results("regressed", "aesthetics"), "not_regressed", True),
        (results("drift", "drift"), "not_regressed", True),
        (results("inconclusive", "truth"), "not_regressed", True),
        (results("inconclusive", "truth"), "improved", False),
        (results("improved", "truth", "improved"), "improved", True),
        (results("improved", "truth", "suspect"), "improved", False),
    ],
)
def test_promotion_follows_its_rule(found, rule, promoted):
    decided, reason = promotion(found, rule)
    assert decided == promoted and bool(reason) != promoted


def test_one_scale_where_it_fell_is_enough_and_so_is_one_where_it_improved():
    steady, fell = results("inconclusive", "truth"), results("regressed", "truth")
    fell["comparisons"][0]["guidance_scale"] = 7.5
    both = steady | {"comparisons": steady["comparisons"] + fell["comparisons"]}
    assert promotion(both, "not_regressed") == (False, "judge fell by 0.5 at guidance 7.5")
    verdicts = [{"verdict": verdict, "reason": "why"} for verdict in ("inconclusive", "improved")]
    assert promotion(steady | {"verdicts": verdicts}, "improved") == (True, "")


def test_promotion_cannot_be_decided_by_a_scorer_that_did_not_run():
    with pytest.raises(InputError, match="judge could not be run"):
        promotion(results("inconclusive", "truth", state="not run"), "improved")
