"""Before training: can real and generated images be told apart by traces of codec and decoder alone?

Only generated images passed the decoder. If that leaves a trace in the latents that scores see, the player can win by
the trace and learn nothing about content. Controls of the same content separate the two: the real images against
themselves after one more pass of the VAE (decoder), or of the codec. What is left between real images that passed the
VAE and generated ones is content and style, which is what should be learnt.

A linear probe on features that say little of what a picture shows (spectrum, residual, blocks) is a lower bound: a UNet
may see what it does not.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.diffusion.images import MOST_ENCODED, latents_of, size_of
from spin_diffusion.diffusion.settings import MIN_PAIRS, ImageSettings, ProbeSettings
from spin_diffusion.evaluation.statistics import Interval, mean_interval
from spin_diffusion.samples.sample import Row

ALARMING_AUC = 0.6
"""A trace counts when its AUC is at least this and its interval lies above 0.5."""
NUM_BANDS, NUM_FOLDS, RIDGE = 6, 8, 0.05
SHARED_PAIRS = (1 + NUM_FOLDS / (NUM_FOLDS - 1)) ** 0.5
"""How much wider an interval over folds becomes by their probes having pairs in common (Nadeau and Bengio 2003)."""
JPEG_BLOCK_PX = 8

Latents = Float[Tensor, "batch channels height width"]
Features = Float[np.ndarray, "pairs features"]


# What is measured on latents


def band_edges() -> np.ndarray:
    """Edges of the bands of radial frequency in cycles per latent px; the last takes the corners."""
    return np.append(np.linspace(0.0, 0.5, NUM_BANDS + 1)[:-1], np.sqrt(0.5) + 1e-9)


def log_spectrum(latents: Latents) -> Float[np.ndarray, "batch channels bands"]:
    """Mean power in each band of radial frequency, in dB, of each channel without its mean under a Hann window.

    A band into which no frequency of this size falls is nan.
    """
    x = latents.double().cpu().numpy()
    height, width = x.shape[-2:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    spectrum = np.fft.fft2((x - x.mean(axis=(-2, -1), keepdims=True)) * window)
    power = np.abs(spectrum) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    band = np.digitize(radius, band_edges()) - 1
    band[0, 0] = -1  # the mean
    empty = np.full(power.shape[:-2], np.nan)
    means = [power[..., band == b].mean(axis=-1) if (band == b).any() else empty for b in range(NUM_BANDS)]
    return 10 * np.log10(np.stack(means, axis=-1) + 1e-12)


def residual_statistics(latents: Latents) -> Float[np.ndarray, "batch channels 3"]:
    """Log of the spread, log of the kurtosis (normal: log 3) and correlation of neighbours in the residual of each
    channel: what a 3 x 3 binomial blur takes away from it."""
    x = latents.double().cpu().numpy()
    rows = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    residual = x[..., 1:-1, 1:-1] - blurred
    residual = residual - residual.mean(axis=(-2, -1), keepdims=True)
    square = (residual**2).mean(axis=(-2, -1)) + 1e-24
    kurtosis = (residual**4).mean(axis=(-2, -1)) / square**2
    beside = (residual[..., 1:] * residual[..., :-1]).mean(axis=(-2, -1)) / square
    below = (residual[..., 1:, :] * residual[..., :-1, :]).mean(axis=(-2, -1)) / square
    return np.stack([np.log(square) / 2, np.log(kurtosis + 1e-12), (beside + below) / 2], axis=-1)


def blocking(latents: Latents, period: int) -> Float[np.ndarray, "batch channels"]:
    """Log of the mean jump across the borders of blocks of `period` latent px over that inside them; 0 = no blocks."""
    x = latents.double().cpu().numpy()
    border, inside = [], []
    for axis in (-2, -1):
        jumps = np.abs(np.diff(x, axis=axis))
        at_border = np.arange(jumps.shape[axis]) % period == period - 1
        border.append(np.compress(at_border, jumps, axis=axis).mean(axis=(-2, -1)))
        inside.append(np.compress(~at_border, jumps, axis=axis).mean(axis=(-2, -1)))
    return np.log(sum(border) + 1e-12) - np.log(sum(inside) + 1e-12)


def features(latents: Latents, latent_px: int) -> Features:
    """What the probe sees of an image: the measures above of every channel.

    Args:
        latent_px: image px to a latent px. From 8 px on, as in SD and SDXL, a block of the JPEG codec is at most one
            latent px, and `blocking` is left out.
    """
    spectrum = log_spectrum(latents)
    measures = [spectrum[..., ~np.isnan(spectrum[0, 0])], residual_statistics(latents)]
    period = JPEG_BLOCK_PX // latent_px
    if 2 <= period < min(latents.shape[-2:]):
        measures.append(blocking(latents, period)[..., None])
    return np.concatenate([values.reshape(len(values), -1) for values in measures], axis=1)


# The probe


def ridge_direction(first: Features, second: Features) -> Float[np.ndarray, " features"]:
    """Weights w of the features, such that `features @ w` is larger for `first`: ridge regression of the labels +1 and
    -1 on standardised features, (X'X/n + RIDGE) v = X'y/n with w = v / spread."""
    x = np.concatenate([first, second])
    y = np.repeat([1.0, -1.0], [len(first), len(second)])
    spread = x.std(axis=0)
    spread[spread < 1e-9 * (1 + np.abs(x).max(axis=0))] = np.inf  # a constant feature says nothing
    x = (x - x.mean(axis=0)) / spread
    return np.linalg.solve(x.T @ x / len(x) + RIDGE * np.eye(x.shape[1]), x.T @ y / len(x)) / spread


def separability(first: Features, second: Features, seed: int = 0) -> Interval:
    """AUC of a linear probe that tells `first` from `second`, on pairs that it was not fitted to; 0.5 = not at all.

    Row i of all is one pair and is in one fold, so the probe has never seen the content that it is asked about. Only
    images of one fold are compared, since each fold has its own probe. The 95 % interval is Student's over the
    jackknife's pseudo-values of the pairs, made wider because the probes share most of their pairs. In simulation (200
    to 600 sets each of 32, 64 and 256 pairs) it held the true AUC in 97 to 99.5 % of the sets, whether 0.5 or 0.7, and
    0.5 % of the sets of 32 pairs that do not differ would have warned, none of the others.
    """
    pairs = len(first)
    fold = np.random.default_rng(seed).permutation(pairs) % NUM_FOLDS
    of_first, of_second = np.empty(pairs), np.empty(pairs)
    for number in range(NUM_FOLDS):
        held_out = fold == number
        direction = ridge_direction(first[~held_out], second[~held_out])
        of_first[held_out], of_second[held_out] = first[held_out] @ direction, second[held_out] @ direction
    difference = of_first[:, None] - of_second[None, :]
    rounding = 1e-9 * (1 + np.abs(of_first).max())
    wins = np.where(np.abs(difference) <= rounding, 0.5, difference > 0)
    same = (fold[:, None] == fold[None, :]).astype(float)
    wins = wins * same

    # What is left without one pair: its row, its column, and what both share
    total, number = wins.sum(), same.sum()
    without = (total - wins.sum(axis=0) - wins.sum(axis=1) + np.diag(wins)) / (number - 2 * same.sum(axis=0) + 1)
    auc = float(total / number)
    spread = mean_interval(auc - 0.5 + (pairs - 1) * (without.mean() - without))
    low, high = (auc + SHARED_PAIRS * (end - spread.mean) for end in (spread.low, spread.high))
    return Interval(auc, max(low, 0.0), min(high, 1.0))


# On a round's samples


@dataclass(frozen=True)
class ShortcutProbe:
    """Asks about a round's images (`selfplay.rounds.Probe`)."""

    vae: AutoencoderKL
    images: ImageSettings
    settings: ProbeSettings
    batch_size: int = MOST_ENCODED
    """Images that are encoded at a time, at most."""

    @property
    def samples(self) -> int:
        """The most pairs that are looked at."""
        return self.settings.samples

    @property
    def stops(self) -> bool:
        """Whether a shortcut ends the run."""
        return self.settings.action == "stop"

    def __call__(self, real: list[Row], generated: list[Row]) -> dict[str, object]:
        """What the probe says of pairs of stored rows, of those of the most frequent size; see `report`."""
        sizes = [size_of(row) for row in real]
        most = max(sizes, key=sizes.count, default=None)
        real, generated = (
            [row for row, size in zip(rows, sizes, strict=True) if size == most] for rows in (real, generated)
        )
        if len(real) < MIN_PAIRS:
            return not_run(len(real))
        latent_px = 2 ** (len(self.vae.config.block_out_channels) - 1)
        plain, passed = (self.encode(real, round_trip=trip) for trip in (False, True))
        codec = None
        if self.images.image_format == "jpeg":  # png gives the same pixels again
            codec = self.encode(real, round_trip=self.images.vae_round_trip, codec=True)
        return report(plain, passed, codec, self.encode(generated), latent_px, self.images.vae_round_trip)

    def encode(self, rows: list[Row], *, round_trip: bool = False, codec: bool = False) -> Latents:
        """Latents of stored rows as scores see them (fp16 on the disk), fp32 on the CPU; the passes are those of
        `images.latents_of`."""
        latents = latents_of(self.vae, rows, self.images, self.batch_size, round_trip=round_trip, codec=codec)
        return torch.stack(latents).float()


def not_run(pairs: int) -> dict[str, object]:
    """What is said of too few pairs."""
    return {
        "state": "not run",
        "samples": pairs,
        "lines": [f"the shortcut probe was not run: {pairs} pairs of one size are fewer than {MIN_PAIRS}"],
    }


@dataclass(frozen=True)
class Separabilities:
    """How well a probe tells two sets of images apart, as AUCs."""

    decoder: Interval
    """The real images as stored, from themselves after a pass of the VAE."""
    codec: Interval | None
    """Those that are trained on, from themselves after a further pass of the codec; None = it is lossless."""
    generated: Interval
    """Those that are trained on, from the generated ones."""
    content: Interval
    """The real images after a pass of the VAE, from the generated ones."""


def report(
    plain: Latents, passed: Latents, codec: Latents | None, drawn: Latents, latent_px: int, round_trip: bool
) -> dict[str, object]:
    """What tells the images apart, as a JSON object: state ("ok" or "warn"), samples, remedies, lines to print and
    `auc` (`Separabilities`).

    Args:
        plain, passed: the real images as stored, and after a pass of the VAE.
        codec: those that are trained on, after a further pass of the codec before anything else; None = lossless.
        drawn: the generated images.
        round_trip: whether `passed` are trained on, not `plain`.
    """
    of_plain, of_passed, of_drawn = (features(latents, latent_px) for latents in (plain, passed, drawn))
    of_trained = of_passed if round_trip else of_plain
    auc = Separabilities(
        decoder=separability(of_plain, of_passed),
        codec=None if codec is None else separability(of_trained, features(codec, latent_px)),
        generated=separability(of_trained, of_drawn),
        content=separability(of_passed, of_drawn),
    )
    suspects = (
        ("the decoder", "--vae_round_trip true", None if round_trip else auc.decoder),
        ("one pass of the codec", "--image_format png", auc.codec),
    )
    traces = {
        f"{cause} ({_shown(trace)})": remedy
        for cause, remedy, trace in suspects
        if trace is not None and trace.mean >= ALARMING_AUC and trace.low > 0.5
    }
    if traces:
        verdict = (
            f"traces of {' and of '.join(traces)} tell images of the same content apart over {len(plain)} pairs, so "
            f"the player can win without learning content: pass {' and '.join(traces.values())}, in another "
            "--output_dir"
        )
    elif round_trip:
        verdict = (
            "real images passed the VAE as generated ones did; without that, traces of the decoder would have "
            f"{_shown(auc.decoder)} over {len(plain)} pairs"
        )
    else:
        verdict = (
            f"a linear probe finds {'weak' if auc.decoder.low > 0.5 else 'no'} traces of the decoder "
            f"({_shown(auc.decoder)} over {len(plain)} pairs; it warns from {ALARMING_AUC} on)"
        )
    after = "" if round_trip else f", after the VAE has passed both {_shown(auc.content)}"
    return {
        "state": "warn" if traces else "ok",
        "samples": len(plain),
        "remedies": [*traces.values()],
        "lines": [verdict, f"real from generated: {_shown(auc.generated)}{after}"],
        "auc": asdict(auc),
    }


def _shown(auc: Interval) -> str:
    return f"AUC {auc.mean:.2f} [{auc.low:.2f}, {auc.high:.2f}]"
