"""Scores of answers by judges: one judge after the other, file by file, nothing twice.

A folder of one model holds, beside its answers (`samples.answers`),

    scores/NAME/00000-of-00002.parquet     id, k, sha256, score, truncated: of the answers in the file of the same name
    scores/NAME.json                       what is known of the judge NAME: whether it was run, or why not
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.evaluation.judges import Answer, LoadedJudge, LogLikelihood, load_judge
from spin_diffusion.evaluation.judges import __name__ as JUDGES
from spin_diffusion.evaluation.scoring import SCORER, ScorerRecord, Scoring, Shard, is_recorded, run_and_record
from spin_diffusion.evaluation.specs import check_specs, parse_spec
from spin_diffusion.samples.answers import answer_files, read_answers
from spin_diffusion.store.files import Made, Piece, read_json, read_rows, rows_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import AGAIN


def judge_answers(
    folders: Mapping[str, Path],
    specs: Sequence[str],
    log_likelihood: LogLikelihood | Mapping[str, LogLikelihood] | None,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Score every answer of every folder by every judge; what is scored already stays.

    A judge that cannot run leaves its reason in `folder`/scores/NAME.json and nothing else: it has no score, not a
    score of 0. The models come in the inner loop, so that each judge's weights are read once.

    Args:
        folders: name of the model -> its folder.
        specs: NAME[=PATH] of judges.
        log_likelihood: of the one model in `folders`, or by its name for several. It must be the model with the weights
            that gave the answers. None = none of them is at hand: judges that ask it are not run.

    Raises:
        InputError: answers that are incomplete, or a judge that does not exist.
        ValueError: one log-likelihood for several models.
    """
    check_specs(JUDGES, specs)
    if callable(log_likelihood) and len(folders) > 1:
        raise ValueError(f"one log-likelihood cannot be that of {len(folders)} models: give a dict by their names")
    for scoring in _scorings(folders, specs, log_likelihood, str(accelerator.device), progress):
        run_and_record(scoring, accelerator)


def are_judged(folder: Path, specs: Sequence[str]) -> bool:
    """Whether every answer has the scores of the judges as they are now, but of those that could not be run."""
    return all(map(is_recorded, _scorings({"": folder}, specs)))


def _scorings(
    folders: Mapping[str, Path],
    specs: Sequence[str],
    log_likelihood: LogLikelihood | Mapping[str, LogLikelihood] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Iterator[Scoring]:
    """What each judge is to do."""
    progress = progress or Progress()
    model_of = {path: model for model, folder in folders.items() for path in answer_files(folder)}
    for spec in specs:
        name = parse_spec(spec)[0]

        def piece(shard: Shard, key: str, judge: LoadedJudge | None) -> Piece:
            return _score_piece(shard, key, judge, _likelihood_of(model_of[shard[0]], log_likelihood))

        yield Scoring(
            package=JUDGES,
            spec=spec,
            records=[folder / "scores" / f"{name}.json" for folder in folders.values()],
            shards=[(path, path.parents[1] / "scores" / name / path.name) for path in model_of],
            piece=piece,
            load=partial(load_judge, spec, device),
            bar=partial(progress.phase, f"{', '.join(folders)}: score by {name}"),
        )


def _score_piece(shard: Shard, key: str, judge: LoadedJudge | None, log_likelihood: LogLikelihood) -> Piece:
    """The scores of a file of answers, by the judge of this key."""
    path, out = shard

    def make(tell: Callable[[int], None]) -> Made:
        assert judge is not None
        rows = read_answers(path)
        answers = [of_row(row) for row in rows]
        scored = [
            {"id": row["id"], "k": row["k"], "sha256": row["sha256"], "score": score, "truncated": cut}
            for row, score, cut in zip(rows, judge(answers, log_likelihood), judge.truncated(answers), strict=True)
        ]
        return Made(scored, {SCORER: key})

    return Piece(out, _score_key(path, key), int(rows_metadata(path)["rows"]), make)


def _score_key(answers: Path, judge: str) -> str:
    """What the scores of a file of answers depend on: some judges read the model itself, and the real answers."""
    written = rows_metadata(answers)
    return key_of(judge=judge, answers=written.get(KEY), texts=written.get("texts"))


def _likelihood_of(model: str, given: LogLikelihood | Mapping[str, LogLikelihood] | None) -> LogLikelihood:
    found = given.get(model) if isinstance(given, Mapping) else given
    if found is not None:
        return found

    def refuse(prompts: list[str], completions: list[str]) -> list[float]:
        raise InputError(f"it asks the model {model}, which is not loaded here")

    return refuse


# Reading


def of_row(row: Mapping[str, Any]) -> Answer:
    """The answer of a row."""
    names = ("id", "k", "prompt", "text", "reference", "finish", "num_tokens")
    return Answer(**{name: row[name] for name in names})


def read_answer_scores(folder: Path, spec: str) -> list[dict[str, Any]]:
    """The rows of one judge (id, k, sha256, score, truncated) that belong to the answers and to the judge."""
    name = parse_spec(spec)[0]
    judge = read_judge(folder, name).get(KEY)
    shards = [(path, folder / "scores" / name / path.name) for path in answer_files(folder)]
    return [
        row
        for path, out in shards
        if judge is not None and out.is_file() and rows_metadata(out).get(KEY) == _score_key(path, judge)
        for row in read_rows(out)
    ]


def read_judge(folder: Path, name: str) -> dict[str, Any]:
    """What is known of a judge that was asked for: state, reason, source, checkpoint and all of its ABOUT."""
    return read_json(folder / "scores" / f"{name}.json", ScorerRecord, AGAIN)
