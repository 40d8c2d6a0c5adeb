"""CACHED: samples as tensors, and the opponent's scores where they are kept."""

from typing import Any

from spin_diffusion.samples.candidates import chosen_samples
from spin_diffusion.samples.scores import KeepsScores, mix_scores, score_draws, score_shards
from spin_diffusion.samples.shards import Part, encode_shards
from spin_diffusion.selfplay.game import FixedDraws
from spin_diffusion.selfplay.one_round import RealSamples, Round, StepResult, mixture_hash
from spin_diffusion.selfplay.record import CHOICES, ENCODED, SAMPLES, SCORES, RoundRecord

SCORED_BY = "scored_by"
"""Folder of the scores by each member of a mixture; removed when the round is finished."""


def cache(round_: Round, record: RoundRecord) -> StepResult:
    """The samples' tensors, and the opponent's scores where they do not change while the player is trained."""
    encoded = 0
    for samples in round_.sets:
        if round_.source == "opponent":
            encoded += _encode(round_, samples)
        if isinstance(round_.game, KeepsScores):
            _score(round_, round_.game, record, samples)
        elif isinstance(round_.game, FixedDraws) and round_.game.fixed_draws:
            _score_draws(round_, round_.game, record, samples)
    files = round_.hashes(ENCODED) | (round_.hashes(SCORES) if round_.scores_kept else {})
    return StepResult(files=files, worked_on=encoded)


def _encode(round_: Round, samples: RealSamples) -> int:
    """The tensors of the opponent's samples that take part in a pair; how many this process encoded."""
    wanted: dict[str, Any] = {}
    if round_.candidates is not None:
        choices = samples.folder / CHOICES
        wanted = {"rows_of": lambda path: chosen_samples(path, choices / path.name), "beside": choices}
    bar = round_.run.progress.phase(f"{samples.title}: encode", round_.num_drawn(samples))
    source, target = samples.folder / SAMPLES, samples.folder / ENCODED
    return encode_shards(source, target, round_.game, round_.accelerator, bar, **wanted)


def _score(round_: Round, game: KeepsScores, record: RoundRecord, samples: RealSamples) -> None:
    """The opponent's scores of both sides, each a number of its own."""
    sides = {"real": (samples.data / ENCODED, samples.part, "")}
    if round_.source == "opponent":
        sides["generated"] = (samples.folder / ENCODED, Part(), "")
    elif round_.source == "data":
        sides["generated"] = (samples.data / ENCODED, samples.part, "loser_")
    single = len(round_.anchors) == 1
    for k in round_.anchors:
        opponent = round_.seat(k, record)
        for side, (source, part, prefix) in sides.items():
            target = samples.folder / (SCORES if single else f"{SCORED_BY}/{k}") / side
            total = samples.part.count(samples.data) * (round_.settings.num_generated if side == "generated" else 1)
            bar = round_.run.progress.phase(f"{samples.title}: score the {side} samples", total)
            score_shards(source, target, game, part, prefix, opponent, round_.accelerator, bar)
    for side in sides if not single else ():
        by_member = {samples.folder / SCORED_BY / str(k) / side: weight for k, weight in round_.anchors.items()}
        mix_scores(
            by_member, samples.folder / SCORES / side, mixture_hash(record["opponent"]["anchors"]), round_.accelerator
        )


def _score_draws(round_: Round, game: FixedDraws, record: RoundRecord, samples: RealSamples) -> None:
    """The opponent's scores of all pairs at their fixed draws."""
    opponent = round_.seat(max(round_.anchors), record)
    title = f"{samples.title}: score {game.fixed_draws} draws of each pair"
    score_draws(
        samples.data / "samples",
        samples.folder / SCORES,
        round_.pairs(record, samples, scored=False),
        samples.part,
        game,
        round_.settings.seed,
        round_.k,
        round_.run.training.train_batch_size,
        opponent,
        round_.accelerator,
        round_.run.progress.phase(title, samples.part.count(samples.data)),
    )
