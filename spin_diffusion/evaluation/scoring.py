"""Scores of an evaluation's samples: one scorer of pictures or judge of answers after the other, nothing twice.

Beside a model's samples, shard by shard, lie the scores of each: id, k, sha256, score, truncated. What is known of a
scorer, whether it was run or why not, is its record. A scorer that cannot run has no score, not a score of 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from spin_diffusion.evaluation import judges, scorers, specs
from spin_diffusion.evaluation.evaluated import SCORER, SampleFolder, Score, WasRun, answer_key, answer_of
from spin_diffusion.evaluation.judges import LoadedJudge, LogLikelihood
from spin_diffusion.evaluation.scorers import LoadedScorer
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.samples.drawn import read_index
from spin_diffusion.store.files import (
    Made,
    Piece,
    Tell,
    build_pieces,
    is_built,
    read_if_whole,
    read_json,
    read_rows,
    rows_metadata,
    write_json,
)
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.pictures import read_picture
from spin_diffusion.store.run_dir import Damaged

BATCH = 16
"""Pictures that a scorer gets at a time; the scores do not depend on it."""


def check_specs(specs_: Sequence[str]) -> None:
    """InputError when two scorers have one name, or one does not exist; no weights are read."""
    specs.check_specs(scorers.__name__, specs_)


def score_samples(
    folders: Mapping[str, SampleFolder],
    scales: Sequence[float | None],
    specs_: Sequence[str],
    accelerator: Accelerator,
    bar: Callable[[str, int], Tell],
    log_likelihoods: Mapping[str, LogLikelihood] | None = None,
) -> None:
    """Score every sample of every model by every scorer; what is scored already stays.

    The models come in the inner loop, so that each scorer's weights are read once.

    Args:
        folders: name of the model -> its samples, of one modality.
        specs_: NAME[=PATH] of scorers, or of judges.
        bar: (name of the scorer, number of samples) -> the function that is told how many are done.
        log_likelihoods: by the name of the model, which must have the weights that gave the answers. Judges that ask a
            model which is not among them are not run.

    Raises:
        InputError: samples that are incomplete, or a scorer that does not exist.
    """
    package = _package(folders)
    specs.check_specs(package, specs_)
    for spec in specs_:
        scoring = _Scoring(folders, scales, spec, spec == _keeper_of_features(specs_), log_likelihoods or {})
        _run_and_record(scoring, accelerator, partial(bar, scoring.name))


def are_scored(folder: SampleFolder, scales: Sequence[float | None], specs_: Sequence[str]) -> bool:
    """Whether every sample has the scores of the scorers as they are now, but of those that could not be run."""
    keeper = _keeper_of_features(specs_)
    return all(_is_recorded(_Scoring({"": folder}, scales, spec, spec == keeper, {})) for spec in specs_)


def _package(folders: Mapping[str, SampleFolder]) -> str:
    return (judges if any(folder.of_answers for folder in folders.values()) else scorers).__name__


@dataclass(frozen=True)
class _Shard:
    """A file of samples, and the file of their scores."""

    model: str
    samples: Path
    scores: Path


class _Scoring:
    """What one scorer or judge is to do."""

    def __init__(
        self,
        folders: Mapping[str, SampleFolder],
        scales: Sequence[float | None],
        spec: str,
        with_features: bool,
        log_likelihoods: Mapping[str, LogLikelihood],
    ) -> None:
        self.spec, self.name, self.package = spec, parse_spec(spec)[0], _package(folders)
        self.with_features, self.log_likelihoods = with_features, log_likelihoods
        self.records = [folder.record(self.name) for folder in folders.values()]
        self.shards = [
            _Shard(model, file, folder.scored(file, self.name))
            for model, folder in folders.items()
            for scale in scales
            for file in folder.files(scale)
        ]

    @property
    def key(self) -> str:
        """The key of the scorer as it is now."""
        return specs.part_key(self.package, self.spec)

    def load(self, device: str) -> LoadedScorer | LoadedJudge:
        """The scorer with its weights."""
        load = judges.load_judge if self.package == judges.__name__ else scorers.load_scorer
        return load(self.spec, device)

    def piece(self, shard: _Shard, key: str, scorer: LoadedScorer | LoadedJudge | None) -> Piece:
        """The file of scores of a shard; None for the scorer where it is only asked whether the file is built."""
        if self.package == judges.__name__:
            log_likelihood = self.log_likelihoods.get(shard.model) or _refusing(shard.model)
            return _answer_piece(shard, key, scorer, log_likelihood)
        return _picture_piece(shard, key, scorer, self.with_features)

    def missing(self, shards: list[_Shard], key: str) -> list[_Shard]:
        """Those without scores, or with scores by another scorer or of other samples."""
        return [shard for shard in shards if not self.piece(shard, key, None).is_built]

    def one_key(self) -> str | None:
        """The key of the scorer by which all shards of all models were scored; None = there is none."""
        try:
            keys = {read_json(path).get(KEY) for path in self.records}
        except Damaged:  # or missing
            return None
        key = keys.pop() if len(keys) == 1 else None
        return key if key is not None and not self.missing(self.shards, key) else None


def _run_and_record(scoring: _Scoring, accelerator: Accelerator, bar: Callable[[int], Tell]) -> None:
    """Let the processes score what is missing, and write into the records what is known of the scorer: state, reason,
    source, checkpoint, key.

    Where one process could not run it, it has no score: not a score of 0, and not the scores of the others alone.
    Scores that are all there already, by one and the same scorer, stay when it cannot be run any more.
    """
    described = specs.describe(scoring.package, scoring.spec)
    known = scoring.one_key() if accelerator.is_main_process else None
    # Shared out before looking at what is there: another process may be writing already
    mine = scoring.shards[accelerator.process_index :: accelerator.num_processes]
    said = []
    try:
        key = scoring.key
        missing = scoring.missing(mine, key)
        if missing or accelerator.is_main_process and not all(_says(path, key) for path in scoring.records):
            loaded = scoring.load(str(accelerator.device))
            if (now := scoring.key) != key:  # the hub had another version
                key, missing = now, scoring.missing(mine, now)
            pieces = [scoring.piece(shard, key, loaded) for shard in missing]
            total = sum(piece.size for piece in pieces) * accelerator.num_processes
            build_pieces(pieces, bar(total), accelerator.num_processes)
            said = [described | {"source": loaded.source, "checkpoint": loaded.checkpoint, "key": key, "reason": ""}]
            del loaded, pieces  # the memory is free before the next one's weights are read
    except InputError as error:
        said = [described | {"reason": str(error)}]
    if accelerator.num_processes > 1:
        said = gather_object(said)
    if said and accelerator.is_main_process:
        reason = "; ".join(dict.fromkeys(str(one["reason"]) for one in said if one["reason"]))
        if reason and known is not None and scoring.one_key() == known:
            print(f"scorer {described['name']} cannot be run now ({reason}): the scores that it gave before stay")
        else:
            for path in scoring.records:
                write_json(path, said[0] | {"state": "not run" if reason else "run", "reason": reason})
            if reason:
                print(f"scorer {described['name']} was not run: {reason}")
    accelerator.wait_for_everyone()


def _says(record: Path, key: str) -> bool:
    """Whether a record is that of this very scorer, which was run."""
    return is_built(record, key) and read_json(record)["state"] == "run"


def _is_recorded(scoring: _Scoring) -> bool:
    """Whether all samples have the scores of the scorer as it is now, or the records say that it could not be run."""
    key = scoring.key
    if all(_says(record, key) for record in scoring.records):
        return not scoring.missing(scoring.shards, key)
    known = [read_if_whole(path, WasRun) for path in scoring.records]
    return all(record is not None and record["state"] == "not run" for record in known)


def _keeper_of_features(specs_: Sequence[str]) -> str | None:
    """The scorer whose image embeddings the diversity alarms use: one without a taste, if there is one."""
    preferred = ("clip_l14", "clip_h14", "openclip", "pickscore", "hps_v2_1", "hps_v2_0")
    by_name = {parse_spec(spec)[0]: spec for spec in specs_}
    return next((by_name[name] for name in preferred if name in by_name), None)


def _picture_piece(shard: _Shard, key: str, scorer: Any, with_features: bool) -> Piece:
    """The scores of a shard of pictures, by the scorer of this key."""
    rows = [row for row in read_index(shard.samples) if row["file"] is not None]

    def make(tell: Callable[[int], None]) -> Made:
        scored: list[Score] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            images = [read_picture(shard.samples.parent / row["file"]) for row in part]
            prompts = [row["prompt"] for row in part]
            scores = _score_rows(part, scorer(images, prompts).tolist(), scorer.truncated(prompts))
            features = scorer.features(images).tolist() if with_features and scorer.features else [None] * len(part)
            scored += [Score(**score, features=feature) for score, feature in zip(scores, features, strict=True)]
            tell(len(scored))
        return Made(scored, {SCORER: key})

    pictures = [[row["id"], row["k"], row["prompt"], row["sha256"]] for row in rows]
    return Piece(shard.scores, key_of(scorer=key, pictures=pictures, features=with_features), len(rows), make)


def _answer_piece(shard: _Shard, key: str, judge: Any, log_likelihood: LogLikelihood) -> Piece:
    """The scores of a shard of answers, by the judge of this key."""

    def make(tell: Callable[[int], None]) -> Made:
        rows = read_rows(shard.samples)
        answers = [answer_of(row) for row in rows]
        return Made(_score_rows(rows, judge(answers, log_likelihood), judge.truncated(answers)), {SCORER: key})

    size = int(rows_metadata(shard.samples)["rows"])
    return Piece(shard.scores, answer_key(shard.samples, key), size, make)


def _score_rows(rows: Sequence[Mapping[str, Any]], scores: list[float], truncated: list[bool]) -> list[Score]:
    return [
        Score(id=row["id"], k=row["k"], sha256=row["sha256"], score=score, truncated=cut)
        for row, score, cut in zip(rows, scores, truncated, strict=True)
    ]


def _refusing(model: str) -> LogLikelihood:
    def refuse(prompts: list[str], completions: list[str]) -> list[float]:
        raise InputError(f"it asks the model {model}, which is not loaded here")

    return refuse


def score_images(scorer: LoadedScorer, images: Iterable[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The score of each image for its prompt; no more than a batch of the images is taken at a time."""
    scores: list[float] = []
    images = iter(images)
    while part := list(islice(images, BATCH)):
        scores += scorer(part, list(prompts[len(scores) : len(scores) + len(part)])).tolist()
    return scores
