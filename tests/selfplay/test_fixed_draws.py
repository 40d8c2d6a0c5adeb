"""Fixed draws: the opponent's errors, computed once, are those that it would have made beside the player."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.runs.image_plan import settle_draws
from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.train import Pairs
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, make_game, play_all

SAVED = "unet/diffusion_pytorch_model.safetensors"


def direct(monkeypatch) -> None:
    """Let every game ask the opponent beside the player, whatever was kept."""
    scores = DiffusionGame.scores

    def asking(self, player, batch):
        sides = [{k: v for k, v in side.items() if k != "opponent_score"} for side in (batch.real, batch.generated)]
        return scores(self, player, replace(batch, real=sides[0], generated=sides[1]))

    monkeypatch.setattr(DiffusionGame, "scores", asking)
    monkeypatch.setattr(DiffusionGame, "release_opponent", lambda self: None)


@pytest.mark.parametrize(
    "rounds",
    [
        {"objective": "space", "num_generated": 2, "rounds": 1},
        {"objective": "dpo", "rounds": 1},
        {"objective": "sft", "rounds": 1},
        {"objective": "spin", "anchor": "base"},
        {"objective": "spin", "real_parts": 2, "opponent": "ema"},
    ],
    ids=lambda rounds: "-".join(str(value) for value in rounds.values()),
)
def test_the_player_is_the_one_that_it_would_be_with_the_opponent_beside_it(rounds, sdxl_dir, tmp_path, monkeypatch):
    def play_with(folder):
        game = make_game(sdxl_dir, fixed_draws=2, proportion_empty_prompts=0.3, winner_preserving_mu=0.5)
        # Not Adam, whose division by the gradient's size would magnify rounding
        training = replace(TRAINING, max_train_steps=6, optimizer="sgd", learning_rate=1e-3)
        return play_all(sdxl_dir, folder, training, game, **rounds)

    kept = play_with(tmp_path / "kept")
    with monkeypatch.context() as patch:
        direct(patch)
        beside = play_with(tmp_path / "direct")
    ours, theirs = (load_file(tmp_path / name / SAVED) for name in ("kept", "direct"))
    base = make_game(sdxl_dir).player.state_dict()
    moved = max((theirs[name] - base[name]).abs().max() for name in theirs)
    apart = max((ours[name] - theirs[name]).abs().max() for name in theirs)
    # Rounding alone: the two score in batches of other pairs
    assert apart < 0.001 * moved, (apart, moved)
    for one, other in zip(kept, beside, strict=True):
        assert one["training"]["r_real"] == pytest.approx(other["training"]["r_real"], abs=1e-5)


def test_no_opponent_is_in_memory_while_the_player_is_trained(sdxl_dir, tmp_path, monkeypatch):
    game = make_game(sdxl_dir, fixed_draws=1)
    seen = []
    take_step = train_module._take_step
    monkeypatch.setattr(train_module, "_take_step", lambda *args: seen.append(game.opponent) or take_step(*args))
    records = play_all(sdxl_dir, tmp_path, game=game)
    assert len(seen) == 8 and seen == [None] * 8
    assert records[1]["opponent"]["round"] == 1 and records[1]["training"]["distance"] is None
    kept = load_file(next((tmp_path / "round-2" / "scores" / "real").glob("*.safetensors")))["opponent_score"]
    assert kept.shape[1] == 1 and kept.dtype == torch.float32


def test_adapters_keep_their_opponent_and_their_errors_too(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, fixed_draws=1, lora=LoraSettings(use_lora=True, rank=2))
    records = play_all(sdxl_dir, tmp_path, game=game)
    assert records[1]["training"]["r_real"] != 0 and records[1]["training"]["distance"] > 0


def test_visit_after_visit_a_pair_goes_round_its_own_draws():
    kept = torch.arange(12.0).view(4, 3)
    pairs = Pairs(
        list("abcd"), list("abcd"), lambda i: ({"opponent_score": kept[i]}, {"opponent_score": kept[i] + 100}), draws=3
    )
    seen: dict[str, list[tuple[int, float]]] = {}
    for position in range(4 * 7):
        batch = pairs.batch([position], 5, 1)
        assert batch.generated["opponent_score"] == batch.real["opponent_score"] + 100
        seen.setdefault(batch.ids[0], []).append((batch.seeds[0], batch.real["opponent_score"].item()))
    for place, name in enumerate("abcd"):
        scores = [score for _, score in seen[name]]
        assert scores == [3.0 * place + visit % 3 for visit in range(7)]
        assert seen[name][:3] == seen[name][3:6] and len(set(seen[name])) == 3
    assert len({seed for visits in seen.values() for seed, _ in visits}) == 12


def test_killed_while_scoring_and_while_training_it_ends_in_the_same_bytes(sdxl_dir, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    unusual = {"fixed_draws": 2, "timestep_sampling": "sections", "dropped_captions": "real"}
    unusual |= {"proportion_empty_prompts": 0.5, "score_weighting": "v"}
    play_all(sdxl_dir, tmp_path / "whole", game=make_game(sdxl_dir, **unusual), rounds=1)
    folder = tmp_path / "killed"
    for method, calls in (("scores_at_draws", 5), ("scores", 3)):
        with monkeypatch.context() as patch:
            original, count = getattr(DiffusionGame, method), []

            def dies(self, *args, original=original, count=count, calls=calls):
                count.append(1)
                if len(count) > calls:
                    raise Killed
                return original(self, *args)

            patch.setattr(DiffusionGame, method, dies)
            with pytest.raises(Killed):
                play_all(sdxl_dir, folder, game=make_game(sdxl_dir, **unusual), rounds=1)
    play_all(sdxl_dir, folder, game=make_game(sdxl_dir, **unusual), rounds=1)
    assert file_hash(folder / SAVED) == file_hash(tmp_path / "whole" / SAVED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fixed_draws", "-1"], "at least 0"),
        (["--fixed_draws", "1", "--candidates", "{number: 2, scorer: pickscore}"], "not made for candidates"),
    ],
)
def test_what_would_not_be_the_same_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse_config(["--pretrained_model_name_or_path", "base", *flags])


@pytest.mark.parametrize(("steps", "draws", "said"), [("[12, 20]", 2, ""), ("6", 1, ""), ("5", 0, "1.7 times")])
def test_auto_keeps_as_many_draws_as_are_visited_twice_in_every_round(sdxl_dir, capsys, steps, draws, said):
    game = make_game(sdxl_dir)
    settings = parse_config(
        ["--pretrained_model_name_or_path", "base", "--train_batch_size", "2", "--gradient_accumulation_steps", "2",
         "--max_train_steps", steps, "--fixed_draws", "auto"]
    )  # fmt: skip
    settled = settle_draws(settings, game.accelerator, pairs=12)
    assert settled.denoiser.fixed_draws == draws and game.fixed_draws == 0
    assert (said in capsys.readouterr().out) if said else not capsys.readouterr().out
    assert settle_draws(settled, game.accelerator, pairs=1) == settled
