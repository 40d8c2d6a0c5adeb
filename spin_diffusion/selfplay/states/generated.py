"""GENERATED: the opponent's samples, and which of several candidates make the pairs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spin_diffusion.samples.candidates import Candidates, judge_shards, summary
from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.shards import draw_shards, merge_shards, rows_in, shards
from spin_diffusion.selfplay.one_round import RealSamples, Round, StepResult
from spin_diffusion.selfplay.opponents import describe, member
from spin_diffusion.selfplay.record import CHOICES, KEPT, SAMPLES, RoundFields, RoundRecord, find_record
from spin_diffusion.selfplay.train_settings import check_batch
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import seed_from

DRAWN_BY = "drawn_by"
"""Folder of what each member of a mixture drew by itself; removed when the round is finished."""


def generate(round_: Round, record: RoundRecord) -> StepResult:
    """The samples of every member of the opponent, in the order of the real ones; judged, where they are candidates."""
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
    worked_on = sum(_draw_set(round_, record, samples, metadata) for samples in round_.sets)
    fields: RoundFields = {"generated": round_.source, "drawn": _drawn_by_self(round_, record)}
    files = round_.hashes(SAMPLES) | round_.hashes(KEPT)
    if candidates is not None and judge is not None:
        for samples in round_.sets:
            title = f"{samples.title}: judge the candidates"
            judge_shards(
                samples.folder / SAMPLES,
                samples.folder / CHOICES,
                judge,
                metadata | {"judge": candidates.judge},
                round_.accelerator,
                round_.run.progress.phase(title, round_.num_drawn(samples)),
            )
        fields["candidates"] = _judged(round_, candidates)
        files |= round_.hashes(CHOICES)
    return StepResult(fields, files, worked_on)


def _draw_set(round_: Round, record: RoundRecord, samples: RealSamples, metadata: dict[str, str]) -> int:
    """The samples of all members for one set of real ones; how many this process drew."""
    target = samples.folder / SAMPLES
    if len(round_.mixture) == 1:
        return _draw(round_, record, samples, target, max(round_.mixture), metadata)
    by_member = {k: samples.folder / DRAWN_BY / str(k) for k in round_.mixture}
    drawn = sum(_draw(round_, record, samples, folder, k, metadata) for k, folder in by_member.items())
    merge_shards(list(by_member.values()), target, lambda row: (row["place"], row["k"]), metadata, round_.accelerator)
    return drawn


def _draw(
    round_: Round, record: RoundRecord, samples: RealSamples, target: Path, k: int, metadata: dict[str, str]
) -> int:
    """The samples that member k of the mixture draws; how many this process drew."""
    opponent, game = round_.seat(k, record), round_.game
    seed = round_.settings.seed

    def ask(real: list[Row]) -> list[Row]:
        return [
            row | {"place": place, "k": copy}
            for place, row in enumerate(real[samples.part.places])
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
    total = round(round_.num_drawn(samples) * round_.mixture[k])
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
        round_.accelerator.print(
            f"{round_.title}: candidates' best {chosen['mean_best']:+.4f}, worst {chosen['mean_worst']:+.4f} on "
            f"average ({ties})"
        )
    try:
        check_batch(chosen["pairs"], round_.run.training, round_.accelerator.num_processes)
    except InputError as error:
        raise InputError(f"round {round_.k}: {error} (candidates: {ties}, by {candidates.judge})") from None
    return {"num": candidates.num, "share": candidates.share, "judge": candidates.judge} | chosen
