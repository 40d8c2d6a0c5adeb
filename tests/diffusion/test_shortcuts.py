"""The shortcut probe: its measures against plain formulas, what it says of known traces, and its place in a round."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from spin_diffusion.diffusion import shortcuts
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.diffusion.settings import ImageSettings, ProbeSettings
from spin_diffusion.diffusion.shortcuts import (
    MIN_PAIRS,
    ShortcutProbe,
    band_edges,
    blocking,
    features,
    log_spectrum,
    report,
    residual_statistics,
    ridge_direction,
    separability,
)
from spin_diffusion.runs.page import page_of
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.one_round import Probe
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import ROUNDS, TRAINING, drawing_for_all, examples, make_game, prepare_data


def noise(pairs: int, seed: int, size: int = 16) -> torch.Tensor:
    return torch.randn(pairs, 4, size, size, generator=torch.Generator().manual_seed(seed))


def blurred(x: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    return (1 - share) * x + share * (x.roll(1, -1) + x.roll(-1, -1)) / 2


# Measures


def test_the_spectrum_is_that_of_the_plain_sum_over_the_pixels():
    x = noise(1, 0, 8).double()
    window = torch.tensor([0.5 - 0.5 * math.cos(2 * math.pi * (i + 1) / 9) for i in range(8)], dtype=torch.float64)
    window = window[:, None] * window
    y = ((x[0, 2] - x[0, 2].mean()) * window).tolist()
    sums: dict[int, list[float]] = {}
    for u in range(8):
        for v in range(8):
            if u or v:
                f_u, f_v = (u - 8 if u >= 4 else u) / 8, (v - 8 if v >= 4 else v) / 8
                band = min(int(math.hypot(f_u, f_v) / (0.5 / 6)), 5)
                value = sum(
                    y[i][j] * complex(math.cos(angle), -math.sin(angle))
                    for i in range(8) for j in range(8) for angle in [2 * math.pi * (u * i + v * j) / 8]
                )  # fmt: skip
                sums.setdefault(band, []).append(abs(value) ** 2 / (window**2).sum().item())
    found = log_spectrum(x)[0, 2]
    assert set(sums) == set(range(1, 6)) and math.isnan(found[0])  # at 8 px nothing but the mean is below 1/12
    for band, powers in sums.items():
        assert found[band] == pytest.approx(10 * math.log10(sum(powers) / len(powers)), abs=1e-9)


def test_white_noise_of_unit_variance_has_0_db_in_every_band_and_a_wave_is_in_its_own():
    power = (10 ** (log_spectrum(noise(400, 1)) / 10)).mean(axis=(0, 1))  # in the lowest the mean is missing
    assert 10 * np.log10(power[1:]) == pytest.approx(np.zeros(5), abs=0.2) and power[0] < 1
    wave = torch.cos(2 * math.pi * 0.375 * torch.arange(32.0)).expand(1, 1, 32, 32)
    edges = band_edges()
    assert edges[4] < 0.375 < edges[5]
    assert log_spectrum(wave)[0, 0].argmax() == 4


def test_residual_statistics_of_white_noise_and_of_spikes():
    log_spread, log_kurtosis, neighbours = residual_statistics(noise(200, 2, 32)).mean(axis=(0, 1))
    # x - blur has weights 1 - 1/4 in the middle, -1/8 four times, -1/16 four times
    variance = 0.75**2 + 4 / 64 + 4 / 256
    assert log_spread == pytest.approx(math.log(variance) / 2, abs=0.02)
    assert log_kurtosis == pytest.approx(math.log(3), abs=0.05)
    # beside: each kernel with itself moved by one
    kernel = -np.outer([1, 2, 1], [1, 2, 1]) / 16
    kernel[1, 1] += 1
    assert neighbours == pytest.approx((kernel[:, 1:] * kernel[:, :-1]).sum() / variance, abs=0.02)
    spikes = torch.zeros(1, 1, 32, 32)
    spikes[..., ::8, ::8] = 1.0
    assert residual_statistics(spikes)[0, 0, 1] > math.log(10)


def test_blocks_are_seen_at_their_period_only():
    blocks = torch.rand(3, 4, 4, 4).repeat_interleave(4, -1).repeat_interleave(4, -2) + 0.01 * noise(3, 3)
    assert (blocking(blocks, 4) > 2).all()
    assert (blocking(blocks.roll((2, 2), (-1, -2)), 4) < 0).all()
    assert np.abs(blocking(noise(50, 4), 4).mean()) < 0.05


def test_the_8_px_blocks_of_jpeg_are_left_out_where_latents_cannot_show_them():
    x = noise(3, 5)
    assert features(x, 2).shape == (3, 4 * (6 + 3 + 1))
    assert features(x, 8).shape == (3, 4 * (6 + 3))


def test_the_direction_is_that_of_ridge_regression_by_least_squares():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 5)) * [1, 2, 3, 4, 5] + 1, rng.normal(size=(40, 5)) * [1, 2, 3, 4, 5]
    x, y = np.concatenate([first, second]), np.repeat([1.0, -1.0], 40)
    x = (x - x.mean(0)) / x.std(0)
    stacked = np.concatenate([x, math.sqrt(80 * 0.05) * np.eye(5)])  # ridge as further rows of a least-squares problem
    expected = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(5)]), rcond=None)[0]
    assert ridge_direction(first, second) * np.concatenate([first, second]).std(0) == pytest.approx(expected, abs=1e-9)


def test_a_constant_feature_says_nothing():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 3)) + 1, rng.normal(size=(40, 3))
    first[:, 1] = second[:, 1] = 7.0
    assert ridge_direction(first, second)[1] == 0


# The probe on features


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_the_auc_of_shifted_normals_is_its_closed_form(shift):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(400, 1)) + shift, rng.normal(size=(400, 1))
    found = separability(first, second)
    assert found.low <= stats.norm.cdf(shift / math.sqrt(2)) <= found.high
    assert 0.02 < found.high - found.low < 0.14


def test_the_interval_holds_chance_where_there_is_nothing_and_is_no_point_where_all_is_told_apart():
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        content = rng.normal(size=(48, 12))
        found = separability(*(content + 0.5 * rng.normal(size=(2, 48, 12))), seed=seed)
        held += found.low <= 0.5 <= found.high
    assert held >= 93
    place = np.arange(32)[:, None] * 1e-3
    perfect = separability(place + 1, place)
    assert perfect.mean == perfect.high == 1 and 0.7 < perfect.low < 1


def test_the_auc_is_that_of_counting():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(40, 2)) + 0.7, rng.normal(size=(40, 2))
    fold = np.random.default_rng(0).permutation(40) % shortcuts.NUM_FOLDS
    wins = []
    for number in range(shortcuts.NUM_FOLDS):
        inside = fold == number
        w = ridge_direction(first[~inside], second[~inside])
        wins += [float(a @ w > b @ w) for a in first[inside] for b in second[inside]]
    assert separability(first, second).mean == pytest.approx(np.mean(wins), abs=1e-12)


def test_a_probe_is_not_asked_about_content_that_it_was_fitted_to():
    """Halves of a pair in different folds would be taken for their other half: an AUC far below 0.5."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        content = rng.normal(size=(32, 200))  # far more features than pairs: it could learn each by heart
        found.append(separability(content, content + 0.01 * rng.normal(size=(32, 200))).mean)
    assert np.mean(found) == pytest.approx(0.5, abs=0.03)


def test_equal_distributions_are_not_told_apart_over_many_draws():
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found.append(separability(rng.normal(size=(64, 20)), rng.normal(size=(64, 20))))
    assert np.mean([auc.mean for auc in found]) == pytest.approx(0.5, abs=0.04)  # 3 standard errors
    assert sum(auc.low <= 0.5 <= auc.high for auc in found) >= 30


# What it says


def said(passed, drawn, codec=None, round_trip=False) -> dict:
    return report(noise(128, 10), passed, codec, drawn, 8, round_trip)


def test_without_traces_it_is_quiet():
    found = said(noise(128, 11), noise(128, 12), noise(128, 13))
    assert found["state"] == "ok" and found["remedies"] == []
    assert all(auc["low"] <= 0.5 <= auc["high"] for auc in found["auc"].values())
    assert found["lines"][0].startswith("a linear probe finds no traces of the decoder (AUC ")


@pytest.mark.parametrize("trace", ["blur", "noise"])
def test_a_trace_of_the_decoder_names_the_round_trip(trace):
    def traced(x: torch.Tensor) -> torch.Tensor:
        return blurred(x, 0.1) if trace == "blur" else x + 0.5 * noise(len(x), 14)

    found = said(traced(noise(128, 10)), traced(noise(128, 12)))
    assert found["state"] == "warn" and found["remedies"] == ["--vae_round_trip true"]
    assert found["auc"]["decoder"]["mean"] > 0.9
    assert found["auc"]["content"]["low"] <= 0.55 and found["auc"]["codec"] is None
    assert "traces of the decoder (AUC " in found["lines"][0] and "--vae_round_trip true" in found["lines"][0]


def test_after_the_round_trip_the_decoder_is_no_reason_to_warn():
    plain = noise(128, 10)
    found = report(plain, blurred(plain), None, blurred(noise(128, 12)), 8, True)
    assert found["state"] == "ok" and found["auc"]["decoder"]["mean"] > 0.9
    assert found["auc"]["generated"] == found["auc"]["content"]
    assert "passed the VAE as generated ones did" in found["lines"][0]


def test_content_alone_is_no_shortcut():
    found = said(noise(128, 10) + 0, blurred(noise(128, 12)))
    assert found["state"] == "ok" and found["auc"]["generated"]["mean"] > 0.9
    assert found["auc"]["decoder"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_a_trace_of_the_codec_names_png_also_after_the_round_trip():
    plain = noise(128, 10)
    for round_trip in (False, True):
        found = said(plain, noise(128, 12), blurred(plain), round_trip)
        assert found["state"] == "warn" and found["remedies"] == ["--image_format png"]
        assert "of one pass of the codec" in found["lines"][0]


# On images


def real_and_drawn(game, pairs: int) -> tuple[list[Row], list[Row]]:
    real = list(game.real_rows(examples(pairs)))
    return real, game.generate(real, list(range(pairs)))


@pytest.mark.parametrize("round_trip", [False, True])
def test_it_looks_at_the_latents_that_scores_see(sdxl_dir, round_trip):
    game = make_game(sdxl_dir)
    game.images = replace(game.images, vae_round_trip=round_trip)
    game.sampling = replace(game.sampling, generation_batch_size=2)
    real, drawn = real_and_drawn(game, 5)
    probe = ShortcutProbe(game.pipeline.vae, game.images, ProbeSettings(), 2)
    seen = probe.encode(real, round_trip=round_trip)
    assert torch.equal(seen, game.encode(real)["latents"].float())
    assert torch.equal(probe.encode(drawn), game.encode(drawn)["latents"].float())
    assert not torch.equal(seen, probe.encode(real, round_trip=not round_trip))


def test_png_is_a_codec_without_a_trace(sdxl_dir):
    game = make_game(sdxl_dir)
    png = replace(game.images, image_format="png")
    game.images = png
    real, drawn = real_and_drawn(game, 4)
    probe = ShortcutProbe(game.pipeline.vae, png, ProbeSettings())
    assert torch.equal(probe.encode(real), probe.encode(real, codec=True))
    jpeg = replace(probe, images=ImageSettings())
    assert not torch.equal(probe.encode(real), jpeg.encode(real, codec=True))
    assert probe(real * 8, drawn * 8)["auc"]["codec"] is None


def test_an_untrained_vae_leaves_a_trace_that_the_round_trip_takes_away(sdxl_dir):
    game = make_game(sdxl_dir)
    real, drawn = real_and_drawn(game, 40)
    probe = ShortcutProbe(game.pipeline.vae, game.images, ProbeSettings())
    assert isinstance(probe, Probe)
    found = probe(real, drawn)
    assert found["state"] == "warn" and found["auc"]["decoder"]["low"] > 0.9
    again = replace(probe, images=replace(game.images, vae_round_trip=True))(real, drawn)
    assert again["auc"]["decoder"] == found["auc"]["decoder"] and "--vae_round_trip true" not in again["remedies"]
    assert probe(real, drawn) == found


# Settings


def test_settings_are_flags_and_too_few_samples_are_refused():
    config = parse_config(["--pretrained_model_name_or_path", "x", "--probe", "{action: stop}"])
    assert config.rounds.probe == ProbeSettings(256, "stop")
    for number in (-1, MIN_PAIRS - 1):
        with pytest.raises(InputError, match=f"--probe samples {number} must be 0 .off. or at least {MIN_PAIRS}"):
            ProbeSettings(number)
    assert ProbeSettings(0).samples == 0


# In a round


class Counting:
    """A probe that remembers what it was shown."""

    def __init__(self, samples: int = 256, state: str = "ok", stops: bool = False) -> None:
        self.samples, self.state, self.stops = samples, state, stops
        self.shown: list[tuple[list[Row], list[Row]]] = []

    def __call__(self, real: list[Row], generated: list[Row]) -> dict:
        self.shown.append((real, generated))
        return {"state": self.state, "lines": [f"seen {len(real)}"]}


def play_with(base, output_dir, probe, count: int = 10, **rounds) -> list[dict]:
    game = make_game(base)
    prepare_data(game, output_dir / "data", count)
    settings = replace(ROUNDS, **({"rounds": 1} | rounds))
    training = replace(TRAINING, max_train_steps=1)
    with drawing_for_all():
        return play(SelfPlay(game, output_dir / "data", output_dir, settings, training, game.accelerator, probe=probe))


def weights_of(output_dir) -> str:
    return file_hash(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_round_shows_pairs_before_it_is_trained(sdxl_dir, tmp_path, capsys):
    probe, few = Counting(), Counting(4)
    (record,) = play_with(sdxl_dir, tmp_path / "all", probe, num_generated=2)
    ((real, generated),) = probe.shown
    assert len(real) == 10 and [row["id"] for row in real] == [row["id"] for row in generated]
    assert not any(row["drawn"] for row in real) and all(row["drawn"] and row["k"] == 0 for row in generated)
    assert record["shortcut"] == {"state": "ok", "lines": ["seen 10"]} and "probed" in record["seconds"]
    assert "spin round 1, before training: seen 10" in capsys.readouterr().out
    play_with(sdxl_dir, tmp_path / "few", few, real_parts=2, rounds=2)
    for shown, part in zip(few.shown, (0, 1), strict=True):
        of_round = [row["id"] for start in (0, 4, 8) for row in real[start : start + 4][part::2]]
        places = [i * len(of_round) // 4 for i in range(4)]
        assert [row["id"] for row in shown[0]] == [of_round[place] for place in places]
        assert [row["id"] for row in shown[1]] == [row["id"] for row in shown[0]]


def test_the_probe_changes_no_bit_and_0_samples_do_nothing(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir)

    def probe(samples: int) -> ShortcutProbe:
        return ShortcutProbe(game.pipeline.vae, game.images, ProbeSettings(samples))

    (probed,) = play_with(sdxl_dir, tmp_path / "on", probe(32), count=33)
    (off,) = play_with(sdxl_dir, tmp_path / "off", probe(0), count=33)
    assert probed["shortcut"]["samples"] == 32 and "shortcut" not in off and "probed" not in off["seconds"]
    assert weights_of(tmp_path / "on") == weights_of(tmp_path / "off")


def test_too_few_pairs_are_not_judged_and_it_is_said(sdxl_dir, tmp_path, capsys):
    game = make_game(sdxl_dir)
    (record,) = play_with(sdxl_dir, tmp_path, ShortcutProbe(game.pipeline.vae, game.images, ProbeSettings()))
    assert record["shortcut"]["state"] == "not run" and record["shortcut"]["samples"] == 10
    assert "the shortcut probe was not run: 10 pairs of one size are fewer than 32" in capsys.readouterr().out
    assert record["state"] == "PROMOTED"


def test_a_round_without_generated_images_is_not_probed(sdxl_dir, tmp_path):
    probe = Counting()
    (record,) = play_with(sdxl_dir, tmp_path, probe, objective="sft")
    assert probe.shown == [] and "shortcut" not in record


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


def test_a_run_killed_between_probe_and_training_goes_on_with_the_same_record(sdxl_dir, tmp_path, monkeypatch):
    from spin_diffusion.selfplay import trained

    (unbroken,) = play_with(sdxl_dir, tmp_path / "unbroken", Counting())

    def dying(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trained, "train", dying)
        play_with(sdxl_dir, tmp_path / "killed", Counting())
    kept = read_json(tmp_path / "killed" / "round-1" / "round.json")
    assert kept["state"] == "CACHED" and kept["shortcut"] == unbroken["shortcut"]
    probe = Counting(state="asked twice")
    (record,) = play_with(sdxl_dir, tmp_path / "killed", probe)
    assert probe.shown == [] and record["shortcut"] == unbroken["shortcut"]
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "unbroken")


def test_a_run_killed_before_the_probes_commit_asks_again(sdxl_dir, tmp_path, monkeypatch):
    from spin_diffusion.selfplay import record as rounds

    def dying(path, content, **options):
        if "shortcut" in content:
            raise Killed
        write_json(path, content, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rounds, "write_json", dying)
        play_with(sdxl_dir, tmp_path, Counting())
    assert "shortcut" not in read_json(tmp_path / "round-1" / "round.json")
    probe = Counting()
    (record,) = play_with(sdxl_dir, tmp_path, probe)
    assert len(probe.shown) == 1 and record["shortcut"]["state"] == "ok"


def test_a_shortcut_stops_the_run_until_it_is_told_to_go_on(sdxl_dir, tmp_path):
    probe = Counting(state="warn", stops=True)
    for _ in range(2):  # the second time by the record
        with pytest.raises(InputError, match=r"spin round 1 is not trained .*: seen 10"):
            play_with(sdxl_dir, tmp_path, probe)
    assert len(probe.shown) == 1 and not (tmp_path / "round-1" / "unet").exists()
    (record,) = play_with(sdxl_dir, tmp_path, Counting(state="warn"))
    assert record["state"] == "PROMOTED"


def test_the_page_has_the_probes_aucs_by_round(tmp_path):
    found = said(noise(128, 11), noise(128, 12))
    for k, shortcut in ((1, found), (2, shortcuts.not_run(3))):
        record = {"state": "PLANNED", "round": k, "parent": k - 1, "data_hash": "0" * 64, "files": {}, "seconds": {}}
        write_json(tmp_path / f"round-{k}" / "round.json", record | {"shortcut": shortcut})
    flags = ["--pretrained_model_name_or_path", "base", "--max_train_steps", "1", "--rounds", "3"]
    shown = {measure["name"]: measure for measure in page_of(parse_config(flags), tmp_path)["measures"]}
    assert set(shown) == {"shortcut_generated", "shortcut_decoder"}
    assert {(measure["model"], measure["round"]) for measure in shown.values()} == {("spin round 1", 1)}
    assert shown["shortcut_generated"]["value"] == found["auc"]["generated"]["mean"]
    assert shown["shortcut_decoder"]["high"] == found["auc"]["decoder"]["high"]
