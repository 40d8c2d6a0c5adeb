"""Scores of an evaluation's pictures: one scorer after the other, shard by shard, nothing twice."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from spin_diffusion.evaluation import specs as of_specs
from spin_diffusion.evaluation.scorers import LoadedScorer, load_scorer, parse_spec
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.samples.pictures import folder_of, index_files, read_index
from spin_diffusion.store.files import (
    Made,
    Piece,
    Tell,
    build_pieces,
    is_built,
    read_json,
    read_rows,
    rows_metadata,
    write_json,
)
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.pictures import read_picture
from spin_diffusion.store.run_dir import AGAIN, Damaged

SCORER = "scorer"
"""In the metadata of a file of scores: the key of the scorer alone."""
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
    for scoring in _scorings(folders, guidance_scales, specs, str(accelerator.device), bar):
        run_and_record(scoring, accelerator)


def is_scored(folder: ScoredFolder, guidance_scales: list[float | None], specs: list[str]) -> bool:
    """Whether every picture has the scores of the scorers as they are now, but of those that could not be run."""
    return all(map(is_recorded, _scorings({"": folder}, guidance_scales, specs)))


def _scorings(
    folders: dict[str, ScoredFolder],
    guidance_scales: list[float | None],
    specs: list[str],
    device: str = "cpu",
    bar: Callable[[str, int], Tell] = lambda name, total: lambda done, text: None,
) -> Iterator["Scoring"]:
    """What each scorer is to do."""
    keeps_features = _keeper_of_features(specs)
    for spec in specs:
        name = parse_spec(spec)[0]
        shards = [
            (index, folder.scores / name / folder_of(scale) / f"{index.stem}.parquet")
            for folder in folders.values()
            for scale in guidance_scales
            for index in index_files(folder.pictures, scale)
        ]
        yield Scoring(
            package=SCORERS,
            spec=spec,
            records=[folder.scores / name / "scorer.json" for folder in folders.values()],
            shards=shards,
            piece=partial(_piece, with_features=spec == keeps_features),
            load=partial(load_scorer, spec, device),
            bar=partial(bar, name),
        )


Shard = tuple[Path, Path]
"""A file of samples, and the file of their scores."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """What one scorer or judge is to do.

    Attributes:
        package, spec: which it is.
        records: where is written what is known of it: one file for each model.
        shards: the files of samples of all models, each with the file of its scores.
        piece: (shard, key of the scorer, the loaded scorer) -> the file of scores; None for the scorer where it is only
            asked whether the file is built.
        load: reads the scorer's weights.
        bar: (number of samples) -> the function that is told how many are done.
    """

    package: str
    spec: str
    records: list[Path]
    shards: list[Shard]
    piece: Callable[[Shard, str, Any], Piece]
    load: Callable[[], Any]
    bar: Callable[[int], Tell]

    def missing(self, shards: list[Shard], key: str) -> list[Shard]:
        """Those without scores, or with scores by another scorer or of other samples."""
        return [shard for shard in shards if not self.piece(shard, key, None).is_built]

    def score(self, scorer: Any, key: str, shards: list[Shard], num_processes: int) -> None:
        """Score these shards, which fall to this process."""
        pieces = [self.piece(shard, key, scorer) for shard in shards]
        build_pieces(pieces, self.bar(sum(piece.size for piece in pieces) * num_processes), num_processes)


def run_and_record(scoring: Scoring, accelerator: Accelerator) -> None:
    """Let the processes score what is missing, and write into the records what is known of the scorer: state, reason,
    source, checkpoint, key.

    Where one process could not run it, it has no score: not a score of 0, and not the scores of the others alone.
    Scores that are all there already, by one and the same scorer, stay when it cannot be run any more.
    """
    described = of_specs.describe(scoring.package, scoring.spec)
    known = _one_key(scoring) if accelerator.is_main_process else None
    # Shared out before looking at what is there: another process may be writing already
    mine = scoring.shards[accelerator.process_index :: accelerator.num_processes]
    said = []
    try:
        key = of_specs.part_key(scoring.package, scoring.spec)
        missing = scoring.missing(mine, key)
        if missing or accelerator.is_main_process and not all(says(path, key) for path in scoring.records):
            loaded = scoring.load()
            if (now := of_specs.part_key(scoring.package, scoring.spec)) != key:  # the hub had another version
                key, missing = now, scoring.missing(mine, now)
            scoring.score(loaded, key, missing, accelerator.num_processes)
            said = [described | {"source": loaded.source, "checkpoint": loaded.checkpoint, "key": key, "reason": ""}]
            del loaded  # its memory is free before the next one's weights are read
    except InputError as error:
        said = [described | {"reason": str(error)}]
    if accelerator.num_processes > 1:
        said = gather_object(said)
    if said and accelerator.is_main_process:
        reason = "; ".join(dict.fromkeys(one["reason"] for one in said if one["reason"]))
        if reason and known is not None and _one_key(scoring) == known:
            print(f"scorer {described['name']} cannot be run now ({reason}): the scores that it gave before stay")
        else:
            for path in scoring.records:
                write_json(path, said[0] | {"state": "not run" if reason else "run", "reason": reason})
            if reason:
                print(f"scorer {described['name']} was not run: {reason}")
    accelerator.wait_for_everyone()


def says(record: Path, key: str) -> bool:
    """Whether a record is that of this very scorer, which was run."""
    return is_built(record, key) and read_json(record)["state"] == "run"


def is_recorded(scoring: Scoring) -> bool:
    """Whether all samples have the scores of the scorer as it is now, or the records say that it could not be run."""
    key = of_specs.part_key(scoring.package, scoring.spec)
    if all(says(record, key) for record in scoring.records):
        return not scoring.missing(scoring.shards, key)
    known = [read_json(path, ScorerRecord, AGAIN) for path in scoring.records if path.is_file()]
    return len(known) == len(scoring.records) and all(record["state"] == "not run" for record in known)


def _one_key(scoring: Scoring) -> str | None:
    """The key of the scorer by which all shards of all models were scored; None = there is none."""
    try:
        keys = {read_json(path).get(KEY) for path in scoring.records}
    except Damaged:  # or missing
        return None
    key = keys.pop() if len(keys) == 1 else None
    return key if key is not None and not scoring.missing(scoring.shards, key) else None


def _keeper_of_features(specs: list[str]) -> str | None:
    """The scorer whose image embeddings the diversity alarms use: one without a taste, if there is one."""
    preferred = ("clip_l14", "clip_h14", "openclip", "pickscore", "hps_v2_1", "hps_v2_0")
    by_name = {parse_spec(spec)[0]: spec for spec in specs}
    return next((by_name[name] for name in preferred if name in by_name), None)


def _piece(shard: Shard, key: str, scorer: LoadedScorer | None, *, with_features: bool) -> Piece:
    """The scores of a shard of pictures, by the scorer of this key."""
    index, out = shard
    rows = [row for row in read_index(index) if row["file"] is not None]

    def make(tell: Callable[[int], None]) -> Made:
        assert scorer is not None
        scored: list[dict[str, Any]] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            images = [read_picture(index.parent / row["file"]) for row in part]
            prompts = [row["prompt"] for row in part]
            scores = scorer(images, prompts).tolist()
            truncated = scorer.truncated(prompts)
            features = scorer.features(images).tolist() if with_features and scorer.features else [None] * len(part)
            scored += [
                {
                    "id": row["id"],
                    "k": row["k"],
                    "sha256": row["sha256"],
                    "score": score,
                    "truncated": cut,
                    "features": feature,
                }
                for row, score, cut, feature in zip(part, scores, truncated, features, strict=True)
            ]
            tell(len(scored))
        return Made(scored, {SCORER: key})

    pictures = [[row["id"], row["k"], row["prompt"], row["sha256"]] for row in rows]
    return Piece(out, key_of(scorer=key, pictures=pictures, features=with_features), len(rows), make)


def score_images(scorer: LoadedScorer, images: Iterable[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The score of each image for its prompt; no more than a batch of the images is taken at a time."""
    scores: list[float] = []
    images = iter(images)
    while part := list(islice(images, BATCH)):
        scores += scorer(part, list(prompts[len(scores) : len(scores) + len(part)])).tolist()
    return scores


def read_scores(directory: Path, scorer: str, scale: float | None) -> list[dict[str, Any]]:
    """The rows of one scorer at one guidance scale, as far as the scorer of the record gave them: id, k, sha256, score,
    truncated, features."""
    paths = sorted((directory / scorer / folder_of(scale)).glob("*.parquet"))
    return rows_by(read_scorer(directory, scorer), paths)


def rows_by(record: dict[str, Any], paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of those files of scores that the scorer of a record gave."""
    key = record.get(KEY)
    return [
        row for path in paths if key is not None and rows_metadata(path).get(SCORER) == key for row in read_rows(path)
    ]


def read_scorer(directory: Path, scorer: str) -> dict[str, Any]:
    """What is known of a scorer that was asked for: state, reason, source, checkpoint and all of its ABOUT."""
    return read_json(directory / scorer / "scorer.json", ScorerRecord, AGAIN)
