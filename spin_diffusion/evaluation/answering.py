"""The answers of an evaluation: every model answers the same prompts with the same seeds, and judges score them.

A folder of one model holds

    answers/00000-of-00002.parquet         id, k, prompt, category, seed, reference, text, finish, num_tokens, sha256
    scores/NAME/00000-of-00002.parquet     id, k, sha256, score, truncated: of the answers in the file of the same name
    scores/NAME.json                       what is known of the judge NAME: whether it was run, or why not

A file is written whole by one process. Beside the rows it says what they belong to (protocol, requests and weights; the
judge and the answers), and what belongs to something else is made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.evaluation.drawing import in_shards
from spin_diffusion.evaluation.judges import Answer, LoadedJudge, LogLikelihood, load_judge
from spin_diffusion.evaluation.judges import __name__ as JUDGES
from spin_diffusion.evaluation.prompt_sets import prompts_hash
from spin_diffusion.evaluation.scoring import SCORER, ScorerRecord, Scoring, Shard, is_recorded, run_and_record
from spin_diffusion.evaluation.specs import check_specs, parse_spec
from spin_diffusion.store.build import Made, Piece, build_together
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import (
    AGAIN,
    is_shard,
    read_json,
    read_rows,
    rows_metadata,
    seed_from,
)

SEED_RULE = "SHA-256 of (seed, 'evaluation', prompt, number of the answer), the same for every model"

DrawAnswers = Callable[[list[dict[str, Any]], Callable[[int], None]], list[dict[str, Any]]]
"""(requests, told the number drawn so far) -> {"text", "finish": "stop" or "length", "num_tokens"} of each."""


def answer_requests(prompts: Sequence[Mapping[str, Any]], answers_per_prompt: int, seed: int) -> list[dict[str, Any]]:
    """What every model is asked: each prompt `answers_per_prompt` times, each time with a seed of its own.

    Args:
        prompts: {"prompt"}, and where they are known "id", "category" and "reference", the real answer.
    """
    return [
        {"id": str(row.get("id", f"{place:05d}")), "k": k, "prompt": _storable(row["prompt"]),
         "category": _storable(row.get("category") or ""), "seed": seed_from(seed, "evaluation", row["prompt"], k),
         "reference": None if row.get("reference") is None else _storable(row["reference"])}
        for place, row in enumerate(prompts)
        for k in range(answers_per_prompt)
    ]  # fmt: skip


def answer_protocol(
    requests: Sequence[Mapping[str, Any]],
    *,
    name: str,
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    max_new_tokens: int,
    licence: str = "",
    source: str = "",
    **more: str | int | float | bool | None,
) -> dict[str, Any]:
    """What must be equal for two results to be comparable, with its hash as `id`.

    Args:
        name: of the prompt set.
        top_k: None = all tokens.
        more: whatever else changes the answers, such as the hash of a chat template.

    Raises:
        InputError: prompts without a request for each number of answers.
    """
    ids: dict[str, list[int]] = {}
    for row in requests:
        ids.setdefault(row["id"], []).append(row["k"])
    wanted = list(range(max((len(ks) for ks in ids.values()), default=0)))
    if odd := next((id_ for id_, ks in ids.items() if sorted(ks) != wanted), None):
        raise InputError(f"the prompt {odd} is asked for the answers {sorted(ids[odd])}, others for {wanted}")
    firsts = [row for row in requests if row["k"] == 0]
    prompt_set = {
        "name": name,
        "sha256": prompts_hash([row["prompt"] for row in firsts]),
        "num_prompts": len(firsts),
        "licence": licence,
        "source": source,
    }
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens, **more}
    rest = {
        "prompt_set": prompt_set,
        "answers_per_prompt": len(wanted),
        "seed": seed,
        "seed_rule": SEED_RULE,
        "sampling": sampling,
        "references_sha256": _hash([row["reference"] for row in firsts]),
    }
    # The same prompts from another place are the same prompts
    compared = rest | {"prompt_set": prompt_set["sha256"]}
    return {"id": hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()} | rest


def draw_answers(
    requests: Sequence[Mapping[str, Any]],
    folder: Path,
    protocol: Mapping[str, Any],
    draw: DrawAnswers,
    accelerator: Accelerator,
    progress: Progress,
    *,
    weights_sha256: str = "",
    model: str = "",
) -> None:
    """Let a model answer what is asked into `folder`/answers; what is there already stays.

    Args:
        requests: rows {id, k, prompt, category, seed, reference}, the same for every model.
        draw: answers a whole shard at a time, so that no answer depends on the number of processes.
        weights_sha256: of the model; answers of other weights are drawn again.
        model: its name, for the progress.

    Raises:
        ValueError: `draw` returns anything but one answer per request.
    """
    pieces = _pieces(requests, folder, protocol, weights_sha256, draw)
    bar = progress.phase(f"{model}: answer" if model else "answer", len(requests))
    build_together(pieces, lambda piece: piece, accelerator, bar)
    if accelerator.is_main_process:
        for path in set((folder / "answers").glob("*-of-*.parquet")) - {piece.path for piece in pieces}:
            if is_shard(path.name):
                path.unlink()  # of a protocol with more or fewer requests
    accelerator.wait_for_everyone()


def are_answered(
    requests: Sequence[Mapping[str, Any]], folder: Path, protocol: Mapping[str, Any], weights_sha256: str
) -> bool:
    """Whether `draw_answers` would find nothing to do."""
    return all(piece.is_built for piece in _pieces(requests, folder, protocol, weights_sha256, None))


def _pieces(
    requests: Sequence[Mapping[str, Any]],
    folder: Path,
    protocol: Mapping[str, Any],
    weights_sha256: str,
    draw: DrawAnswers | None,
) -> list[Piece]:
    """The files of a model's answers."""

    def piece_of(path: Path, asked: list[dict[str, Any]]) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            assert draw is not None
            answered = _answered(asked, draw(asked, tell))
            texts = _hash([row["sha256"] for row in answered])
            return Made(answered, {"protocol": protocol["id"], "weights": weights_sha256, "texts": texts})

        return Piece(path, answer_key(protocol, asked, weights_sha256), len(asked), make)

    shards = in_shards([dict(row) for row in requests])
    return [piece_of(folder / "answers" / f"{name}.parquet", asked) for name, asked in shards]


def answer_key(protocol: Mapping[str, Any], requests: list[dict[str, Any]], weights_sha256: str) -> str:
    """What a file of answers depends on."""
    return key_of(protocol=protocol["id"], requests=requests, weights=weights_sha256)


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


def answer_files(folder: Path) -> list[Path]:
    """The files of a model's answers, in order; InputError when some are missing."""
    found = sorted((folder / "answers").glob("*-of-*.parquet"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{folder / 'answers'} is incomplete: {AGAIN}")
    return found


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of one file of answers; InputError when it is damaged."""
    return read_rows(path)


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


def _answered(requests: list[dict[str, Any]], drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(drawn) != len(requests):
        raise ValueError(f"{len(drawn)} answers do not match {len(requests)} requests")
    for row in drawn:
        if row["finish"] not in ("stop", "length"):
            raise ValueError(f'finish must be "stop" or "length", got {row["finish"]!r}')
    texts = [_storable(row["text"]) for row in drawn]
    return [
        request | {"text": text, "finish": row["finish"], "num_tokens": int(row["num_tokens"]),
                   "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for request, row, text in zip(requests, drawn, texts, strict=True)
    ]  # fmt: skip


def _storable(text: str) -> str:
    """Parquet cannot hold half of a surrogate pair, which JSON can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
