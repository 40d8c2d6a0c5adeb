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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.evaluation.drawing import ROWS_PER_SHARD
from spin_diffusion.evaluation.judges import Answer, LogLikelihood, load_judge
from spin_diffusion.evaluation.judges import __name__ as JUDGES
from spin_diffusion.evaluation.prompt_sets import prompts_hash
from spin_diffusion.evaluation.scoring import ScorerRecord, run_and_record
from spin_diffusion.evaluation.specs import check_specs, describe, parse_spec
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.run_dir import (
    AGAIN,
    has_rows,
    is_shard,
    read_json,
    read_rows,
    rows_metadata,
    seed_from,
    shard_name,
    write_rows,
)
from spin_diffusion.selfplay.sharing import shared_out

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
    rows = [dict(row) for row in requests]
    chunks = [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]
    paths = [folder / "answers" / f"{shard_name(number, len(chunks))}.parquet" for number in range(len(chunks))]
    told, done = progress.phase(f"{model}: answer" if model else "answer", len(rows)), 0
    for chunk, path in shared_out(list(zip(chunks, paths, strict=True)), accelerator):
        belongs = {"protocol": protocol["id"], "requests": _hash(chunk), "weights": weights_sha256}
        if not has_rows(path, belongs):
            answered = _answered(chunk, draw(chunk, partial(_tell, told, done, accelerator.num_processes)))
            write_rows(path, answered, belongs | {"texts": _hash([row["sha256"] for row in answered])})
        done += len(chunk)
        told(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in set((folder / "answers").glob("*-of-*.parquet")) - set(paths):
            if is_shard(path.name):
                path.unlink()  # of a protocol with more or fewer requests
    accelerator.wait_for_everyone()


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
    for spec in specs:
        name = parse_spec(spec)[0]
        shards = [
            (model, path, folder / "scores" / name / path.name)
            for model, folder in folders.items()
            for path in answer_files(folder)
        ]
        # Shared out before looking at what is there: another process may be writing already
        mine = shards[accelerator.process_index :: accelerator.num_processes]
        missing = [(model, path, out) for model, path, out in mine if not has_rows(out, score_belongs(path, spec))]
        records = [folder / "scores" / f"{name}.json" for folder in folders.values()]
        undescribed = accelerator.is_main_process and not all(path.is_file() for path in records)
        judge = partial(_load_and_judge, spec, missing, log_likelihood, accelerator, progress)
        run_and_record(describe(JUDGES, spec), records, judge if missing or undescribed else None, accelerator)


def _load_and_judge(
    spec: str,
    shards: list[tuple[str, Path, Path]],
    log_likelihood: LogLikelihood | Mapping[str, LogLikelihood] | None,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[str, dict[str, str]]:
    """Where the weights came from, and what was loaded."""
    judge = load_judge(spec, str(accelerator.device))
    total = sum(int(rows_metadata(path)["rows"]) for _, path, _ in shards) * accelerator.num_processes
    models = ", ".join(dict.fromkeys(model for model, *_ in shards))
    told, done = progress.phase(f"{models}: score by {judge.name}", total), 0
    for model, path, out in shards:
        answers = read_answers(path)
        scores = judge([of_row(row) for row in answers], _likelihood_of(model, log_likelihood))
        truncated = judge.truncated([of_row(row) for row in answers])
        scored = [
            {"id": row["id"], "k": row["k"], "sha256": row["sha256"], "score": score, "truncated": cut}
            for row, score, cut in zip(answers, scores, truncated, strict=True)
        ]
        write_rows(out, scored, score_belongs(path, spec))
        done += len(answers)
        told(done * accelerator.num_processes, "")
    return judge.source, judge.checkpoint


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
    return [
        row
        for path in answer_files(folder)
        if _belongs(scores := folder / "scores" / name / path.name, score_belongs(path, spec))
        for row in read_rows(scores)
    ]


def read_judge(folder: Path, name: str) -> dict[str, Any]:
    """What is known of a judge that was asked for: state, reason, source, checkpoint and all of its ABOUT."""
    return read_json(folder / "scores" / f"{name}.json", ScorerRecord, AGAIN)


def score_belongs(answers: Path, spec: str) -> dict[str, str]:
    """What the scores of a file of answers belong to: some judges read the model itself, and the real answers."""
    said = rows_metadata(answers)
    return {"source": spec} | {f"answers {key}": said.get(key, "") for key in ("requests", "weights", "texts")}


def _belongs(path: Path, metadata: Mapping[str, str]) -> bool:
    return path.is_file() and metadata.items() <= rows_metadata(path).items()


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


def _tell(told: Callable[[int, str], None], done: int, num_processes: int, answers: int) -> None:
    told((done + answers) * num_processes, "")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
