"""The states of a round before training: who plays the opponent, its samples, and the tensors and scores of these.

OPPONENT    which earlier selves play the opponent, with the hashes of their weights
GENERATED   the opponent's samples, and which of several candidates make the pairs
CACHED      samples as tensors, and the opponent's scores where they are kept

A state is a function: (the round, its record so far) -> what it has done. To add one, write it and name it in
`rounds.STEPS_BEFORE_TRAINING` and `record.State`.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from spin_diffusion.samples.candidates import Candidates, chosen_samples, judge_shards, summary
from spin_diffusion.samples.pairs import Visited
from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.scores import KeepsScores, mix_scores, score_draws, score_shards
from spin_diffusion.samples.shards import (
    Part,
    count_rows,
    draw_shards,
    encode_shards,
    merge_shards,
    rows_in,
    shards,
)
from spin_diffusion.selfplay.game import FixedDraws
from spin_diffusion.selfplay.one_round import RealSamples, Round, StepResult, mixture_hash
from spin_diffusion.selfplay.opponents import Mixture, describe, member
from spin_diffusion.selfplay.record import (
    CHOICES,
    ENCODED,
    SAMPLES,
    SCORES,
    RoundFields,
    RoundRecord,
    SelfRecord,
    find_record,
)
from spin_diffusion.selfplay.train_settings import check_batch
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import seed_from

DRAWN_BY = "drawn_by"
"""Folder of what each member of a mixture drew by itself; removed when the round is finished."""
SCORED_BY = "scored_by"
"""Folder of the scores by each member of a mixture; removed when the round is finished."""


def choose_opponent(round_: Round, record: RoundRecord) -> StepResult:
    """The selves that draw and those that anchor the scores, with the hashes of their weights."""
    hashes = {k: round_.run.seat_opponent(k) for k in sorted({*round_.mixture, *round_.anchors})}

    def described(selves: Mixture) -> list[SelfRecord]:
        return [{"round": k, "weight": weight, "hash": hashes[k]} for k, weight in sorted(selves.items())]

    members = described(round_.mixture)
    return StepResult(
        {
            "opponent": {
                "rule": round_.settings.opponent,
                "round": max(round_.anchors),
                "hash": mixture_hash(members),
                "members": members,
                "anchors": described(round_.anchors),
            }
        }
    )


def generate(round_: Round, record: RoundRecord) -> StepResult:
    """The samples of every member of the opponent, in the order of the real ones that the round visits; judged, where
    they are candidates."""
    if round_.source != "opponent":
        return StepResult({"generated": round_.source})
    metadata = {
        "opponent": record["opponent"]["hash"],
        "data": record["data_hash"],
        "round": str(round_.k),
        "sampler": round_.game.sampler_settings,
    }
    candidates, judge = round_.candidates, None
    if candidates is not None:
        metadata |= candidates.metadata
        _check_judge(round_, candidates.judge)
        judge = candidates.load_judge()  # before the drawing: what it lacks is said now, not hours later
    visits = round_.visits()
    worked_on = sum(
        _draw_set(round_, record, samples, round_.visited(samples, visits), metadata) for samples in round_.sets
    )
    fields: RoundFields = {
        "generated": round_.source,
        "visits": visits,
        "drawn": _drawn_by_self(round_, record),
    }
    files = round_.hashes(SAMPLES)
    if candidates is not None and judge is not None:
        for samples in round_.sets:
            title = f"{samples.title}: judge the candidates"
            judge_shards(
                samples.folder / SAMPLES,
                samples.folder / CHOICES,
                judge,
                metadata | {"judge": candidates.judge},
                round_.accelerator,
                round_.run.progress.phase(title, count_rows(samples.folder / SAMPLES)),
            )
        fields["candidates"] = _judged(round_, candidates)
        files |= round_.hashes(CHOICES)
    return StepResult(fields, files, worked_on)


def _draw_set(
    round_: Round, record: RoundRecord, samples: RealSamples, visited: Visited, metadata: dict[str, str]
) -> int:
    """The samples of all members for one set of real ones; how many this process drew."""
    target = samples.folder / SAMPLES
    if len(round_.mixture) == 1:
        return _draw(round_, record, samples, visited, target, max(round_.mixture), metadata)
    by_member = {k: samples.folder / DRAWN_BY / str(k) for k in round_.mixture}
    drawn = sum(_draw(round_, record, samples, visited, folder, k, metadata) for k, folder in by_member.items())
    merge_shards(list(by_member.values()), target, lambda row: (row["place"], row["k"]), metadata, round_.accelerator)
    return drawn


def _draw(
    round_: Round,
    record: RoundRecord,
    samples: RealSamples,
    visited: Visited,
    target: Path,
    k: int,
    metadata: dict[str, str],
) -> int:
    """The samples that member k of the mixture draws; how many this process drew."""
    opponent, game = round_.seat(k, record), round_.game
    seed = round_.settings.seed

    def ask(shard: int, real: list[Row]) -> list[Row]:
        rows = real[samples.part.places]
        return [
            row | {"place": place, "k": copy}
            for place, row in ((place, rows[place]) for place in visited.places[shard])
            for copy in range(_copies(round_, row["id"]))
            if member(round_.mixture, seed, round_.k, row["id"], copy) == k
        ]

    def draw(rows: list[Row], done: Callable[[int], None]) -> list[Row]:
        seeds = [seed_from(seed, round_.k, row["id"], row["k"]) for row in rows]
        drawn = game.generate(rows, seeds, done) if rows else []
        return [
            sample | {"place": row["place"], "k": row["k"], "opponent": opponent}
            for sample, row in zip(drawn, rows, strict=True)
        ]

    share = f" by {describe({k: 1.0})}" if len(round_.mixture) > 1 else ""
    each = round_.candidates.drawn_on_average if round_.candidates is not None else round_.settings.num_generated
    total = round(visited.number * each * round_.mixture[k])
    bar = round_.run.progress.phase(f"{samples.title}: generate{share}", total)
    return draw_shards(samples.data, target, ask, draw, metadata, game.prompt_columns, round_.accelerator, bar)


def _copies(round_: Round, id_: str) -> int:
    """Samples that the opponent draws for a real one."""
    if round_.candidates is None:
        return round_.settings.num_generated
    return round_.candidates.drawn_for(round_.settings.seed, round_.k, id_)


def _drawn_by_self(round_: Round, record: RoundRecord) -> dict[str, int]:
    """How many of the samples to train on each self drew, by its round; the samples name their own."""
    drawn = Counter(
        row["opponent"]
        for path in shards(round_.sets[0].folder / SAMPLES, ".parquet")
        for row in (read_rows(path, columns=["opponent"]) if rows_in(path) else [])
    )
    return {str(entry["round"]): drawn[entry["hash"]] for entry in record["opponent"]["members"]}


def _check_judge(round_: Round, judge: str) -> None:
    """One judge for all rounds: InputError when an earlier one was played with another."""
    for earlier in range(1, round_.k):
        record = find_record(round_.run.output_dir / f"round-{earlier}")
        before = record.get("candidates", {}).get("judge", judge) if record is not None else judge
        if before != judge:
            raise InputError(
                f"round {round_.k} would have another judge of candidates than round {earlier} (then {before}, now "
                f"{judge}): restore the file, or start in another --output_dir"
            )


def _judged(round_: Round, candidates: Candidates) -> dict[str, Any]:
    """What the choices for the pairs to train on come to; InputError when too few are left."""
    chosen = summary(round_.directory / CHOICES)
    ties = f"{chosen['ties_left_out']:.0%} of {chosen['self_labelled']} left out, all of one score"
    if chosen["self_labelled"]:
        tell(
            f"{round_.title}: candidates' best {chosen['mean_best']:+.4f}, worst {chosen['mean_worst']:+.4f} on "
            f"average ({ties})",
            round_.accelerator,
        )
    try:
        check_batch(chosen["pairs"], round_.run.training, round_.accelerator.num_processes)
    except InputError as error:
        raise InputError(f"round {round_.k}: {error} (candidates: {ties}, by {candidates.judge})") from None
    return {"num": candidates.num, "share": candidates.share, "judge": candidates.judge} | chosen


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
    source, target, choices = samples.folder / SAMPLES, samples.folder / ENCODED, samples.folder / CHOICES
    bar = round_.run.progress.phase(f"{samples.title}: encode", count_rows(source))
    if round_.candidates is None:
        return encode_shards(source, target, round_.game, round_.accelerator, bar)

    def chosen(path: Path) -> list[Row]:
        return chosen_samples(path, choices / path.name)

    return encode_shards(source, target, round_.game, round_.accelerator, bar, chosen, choices)


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
            drawn = side == "generated" and round_.source == "opponent"
            total = count_rows(samples.folder / SAMPLES) if drawn else samples.part.count(samples.data)
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
    pairs = round_.pairs(record, samples, scored=False)

    def scores_at(indices: list[int], draw: int) -> tuple[Tensor, Tensor]:
        return game.scores_at_draws(pairs.at_draws(indices, [draw] * len(indices), round_.settings.seed, round_.k))

    score_draws(
        samples.data / "samples",
        samples.folder / SCORES,
        samples.part,
        scores_at,
        pairs.draws,
        round_.settings.seed,
        round_.k,
        round_.run.training.train_batch_size,
        opponent,
        round_.accelerator,
        round_.run.progress.phase(title, samples.part.count(samples.data)),
    )
