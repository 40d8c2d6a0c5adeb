"""Scores of an evaluation's pictures: one scorer after the other, shard by shard, nothing twice."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from accelerate import Accelerator
from accelerate.utils import gather_object

from spin_diffusion.evaluation import specs as of_specs
from spin_diffusion.evaluation.drawing import folder_of, index_files, read_index
from spin_diffusion.evaluation.scorers import LoadedScorer, load_scorer, parse_spec
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.run_dir import AGAIN, has_rows, read_json, read_rows, write_json, write_rows
from spin_diffusion.store.pictures import read_picture

BATCH = 16
"""Pictures that a scorer gets at a time; the scores do not depend on it."""


@dataclass(frozen=True)
class ScoredFolder:
    """Where one model's pictures are, and where its scores go."""

    pictures: Path
    scores: Path


class ScorerRecord(TypedDict):
    """What is known of a scorer, or a judge, that was asked for, beside all of its ABOUT."""

    name: str
    state: Literal["run", "not run"]
    reason: str


def check_specs(specs: list[str]) -> None:
    """InputError when two scorers have one name, or one does not exist; no weights are read."""
    of_specs.check_specs(SCORERS, specs)


def score_pictures(
    folders: dict[str, ScoredFolder],
    guidance_scales: list[float | None],
    specs: list[str],
    accelerator: Accelerator,
    bar: Callable[[str, int], Callable[[int, str], None]],
) -> None:
    """Score every picture of every folder by every scorer; what is scored already stays.

    A scorer that cannot run leaves its reason in the folders' scores and nothing else: it has no score, not a score
    of 0. The models come in the inner loop, so that each scorer's weights are read once.

    Args:
        bar: (name of the scorer, number of pictures) -> the function that is told how many are done.
    """
    keeps_features = _keeper_of_features(specs)
    for spec in specs:
        name = parse_spec(spec)[0]
        shards = [
            (index, folder.scores / name / folder_of(scale) / f"{index.stem}.parquet")
            for folder in folders.values()
            for scale in guidance_scales
            for index in index_files(folder.pictures, scale)
        ]
        # Shared out before looking at what is there: another process may be writing already
        mine = shards[accelerator.process_index :: accelerator.num_processes]
        missing = [(index, out) for index, out in mine if not _is_scored(out, spec)]
        records = [folder.scores / name / "scorer.json" for folder in folders.values()]
        undescribed = accelerator.is_main_process and not all(path.is_file() for path in records)
        score = partial(_load_and_score, spec, missing, bar, accelerator, spec == keeps_features)
        run_and_record(
            of_specs.describe(SCORERS, spec), records, score if missing or undescribed else None, accelerator
        )


def run_and_record(
    described: dict[str, Any],
    records: list[Path],
    run: Callable[[], tuple[str, dict[str, str]]] | None,
    accelerator: Accelerator,
) -> None:
    """Run a scorer in every process, and write into `records` what is known of it: state, reason, source, checkpoint.

    Where one process could not run it, it has no score: not a score of 0, and not the scores of the others alone.

    Args:
        described: all of its ABOUT.
        run: scores what is missing and returns where the weights came from and what was loaded; an InputError is the
            reason why it was not run. None = this process has nothing to do.
    """
    said = []
    if run is not None:
        try:
            source, checkpoint = run()
            said = [described | {"source": source, "checkpoint": checkpoint, "reason": ""}]
        except InputError as error:
            said = [described | {"reason": str(error)}]
    if accelerator.num_processes > 1:
        said = gather_object(said)
    if said and accelerator.is_main_process:
        reason = "; ".join(dict.fromkeys(one["reason"] for one in said if one["reason"]))
        for path in records:
            write_json(path, said[0] | {"state": "not run" if reason else "run", "reason": reason})
        if reason:
            print(f"scorer {described['name']} was not run: {reason}")
    accelerator.wait_for_everyone()


def _load_and_score(
    spec: str,
    shards: list[tuple[Path, Path]],
    bar: Callable[[str, int], Callable[[int, str], None]],
    accelerator: Accelerator,
    with_features: bool,
) -> tuple[str, dict[str, str]]:
    """Where the weights came from, and what was loaded."""
    scorer = load_scorer(spec, str(accelerator.device))
    total = sum(len(read_index(index)) for index, _ in shards) * accelerator.num_processes
    _score_shards(scorer, spec, shards, bar(scorer.name, total), accelerator.num_processes, with_features)
    return scorer.source, scorer.checkpoint  # its memory is free before the next one's weights are read


def _is_scored(shard: Path, spec: str) -> bool:
    """Whether a shard is complete and by this very scorer."""
    return has_rows(shard, {"source": spec})


def _keeper_of_features(specs: list[str]) -> str | None:
    """The scorer whose image embeddings the diversity alarms use: one without a taste, if there is one."""
    preferred = ("clip_l14", "clip_h14", "openclip", "pickscore", "hps_v2_1", "hps_v2_0")
    by_name = {parse_spec(spec)[0]: spec for spec in specs}
    return next((by_name[name] for name in preferred if name in by_name), None)


def _score_shards(
    scorer: LoadedScorer,
    spec: str,
    shards: list[tuple[Path, Path]],
    progress: Callable[[int, str], None],
    num_processes: int,
    with_features: bool,
) -> None:
    done = 0
    for index, out in shards:
        rows = read_index(index)
        whole = [row for row in rows if row["file"] is not None]
        scored: list[dict[str, Any]] = []
        for start in range(0, len(whole), BATCH):
            part = whole[start : start + BATCH]
            images = [read_picture(index.parent / row["file"]) for row in part]
            prompts = [row["prompt"] for row in part]
            scores = scorer(images, prompts).tolist()
            truncated = scorer.truncated(prompts)
            features = scorer.features(images).tolist() if with_features and scorer.features else [None] * len(part)
            scored += [
                {"id": row["id"], "k": row["k"], "sha256": row["sha256"], "score": score, "truncated": cut,
                 "features": feature}
                for row, score, cut, feature in zip(part, scores, truncated, features, strict=True)
            ]  # fmt: skip
            progress((done + start + len(part)) * num_processes, "")
        write_rows(out, scored, {"source": spec})
        done += len(rows)
        progress(done * num_processes, "")


def read_scores(directory: Path, scorer: str, scale: float | None) -> list[dict[str, Any]]:
    """The rows of one scorer at one guidance scale: id, k, sha256, score, truncated, features."""
    return [
        row for path in sorted((directory / scorer / folder_of(scale)).glob("*.parquet")) for row in read_rows(path)
    ]


def read_scorer(directory: Path, scorer: str) -> dict[str, Any]:
    """What is known of a scorer that was asked for: state, reason, source, checkpoint and all of its ABOUT."""
    return read_json(directory / scorer / "scorer.json", ScorerRecord, AGAIN)
