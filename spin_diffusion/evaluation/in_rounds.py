"""Evaluation inside a run: the base and every round draw the same prompts with the same seeds and are scored alike."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from accelerate import Accelerator
from PIL import Image

from spin_diffusion.evaluation.comparison import Row as ScoreRow
from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.game import Row
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.run_dir import (
    commit,
    part_of,
    read_json,
    read_rows,
    seed_from,
    shard_name,
    write_file,
    write_json,
    write_rows,
)
from spin_diffusion.selfplay.samples import draw_shards, shards

Draw = Callable[[list[str], list[int], float, Callable[[int], None]], list[Image.Image]]
"""(prompts, seeds, guidance scale, told the number drawn so far) -> images by the player."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured after every round."""

    validation_prompts: str | None = None
    """File of held-out prompts: one per line, or JSON lines with a `prompt`. None = no evaluation."""
    max_validation_prompts: int | None = None
    """Only the first ones."""
    num_validation_images: int = 1
    """Images per prompt, each with a seed of its own that all models share."""
    validation_guidance_scales: list[float] | None = None
    """Guidance scales to evaluate at; default: --guidance_scale."""
    validation_num_inference_steps: int | None = None
    """Denoising steps per image; default: --num_inference_steps."""
    scorers: list[str] | None = None
    """Names of scorers, or paths of .py files with a `load(device)`."""
    num_gallery_prompts: int = 6
    """Prompts shown in samples.png."""


def read_prompts(path: str, limit: int | None) -> list[str]:
    """Prompts of a text file (one per line) or of JSON lines with a `prompt`; repeated ones once.

    Raises:
        InputError: no such file, a line without a prompt, no prompt at all.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--validation_prompts {path}: there is no such file")
    prompts: dict[str, None] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        prompt = line.strip()
        if file.suffix in (".jsonl", ".json"):
            try:
                prompt = json.loads(line)["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(
                    f'{path} line {number}: expected an object such as {{"prompt": "a red fox"}}'
                ) from None
        prompts[prompt] = None
    if len(kept := list(prompts)[:limit]) < 2:
        raise InputError(f"{path}: {len(kept)} prompts are too few to compare models, give 2 or more (200 say more)")
    return kept


def write_prompts(directory: Path, prompts: list[str], settings: EvaluationSettings, per_shard: int, seed: int) -> None:
    """The prompts as shards to be drawn, every prompt once per image, each with its seed."""
    if (directory / "samples").is_dir():
        return
    rows: list[Row] = [
        {"id": f"{number:05d}-{k}", "prompt": prompt, "seed": seed_from(seed, "evaluation", prompt, k)}
        for number, prompt in enumerate(prompts)
        for k in range(settings.num_validation_images)
    ]
    part = part_of(directory / "samples")
    part.mkdir(parents=True, exist_ok=True)
    chunks = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
    for number, chunk in enumerate(chunks):
        write_rows(part / f"{shard_name(number, len(chunks))}.parquet", chunk, {})
    commit(directory / "samples")


def evaluate(
    draw: Draw,
    encode_image: Callable[[Image.Image], bytes],
    decode_image: Callable[[bytes], Image.Image],
    prompts: Path,
    directory: Path,
    guidance_scales: list[float],
    scorers: list[str],
    accelerator: Accelerator,
    progress: Progress,
    title: str,
) -> dict[str, Any]:
    """Draw, store and score; return the mean of every scorer at every guidance scale. What is drawn already stays."""
    results_path = directory / "results.json"
    if results_path.is_file():
        return read_json(results_path)
    total = sum(len(read_rows(path, ["id"])) for path in shards(prompts / "samples", ".parquet"))
    for scale in guidance_scales:
        draw_shards(
            prompts,
            directory / f"images-guidance-{scale:g}",
            lambda rows, done, scale=scale: [
                row | {"image": encode_image(image)}
                for row, image in zip(
                    rows, draw([r["prompt"] for r in rows], [r["seed"] for r in rows], scale, done), strict=True
                )
            ],
            {"guidance_scale": f"{scale:g}"},
            accelerator,
            progress.phase(f"{title}: evaluate at guidance {scale:g}", total),
            columns=("id", "prompt", "seed"),
        )
    if accelerator.is_main_process:
        table = _score(directory, guidance_scales, scorers, decode_image)
        write_file(directory / "scores.parquet", lambda part: pq.write_table(pa.Table.from_pylist(table), part))
        means = {
            f"{scorer}@{scale:g}": float(
                np.mean([r["score"] for r in table if r["scorer"] == scorer and r["guidance_scale"] == scale])
            )
            for scorer in {r["scorer"] for r in table}
            for scale in guidance_scales
        }
        write_json(results_path, dict(sorted(means.items())))
    accelerator.wait_for_everyone()
    return read_json(results_path)


def _score(
    directory: Path, guidance_scales: list[float], scorers: list[str], decode_image: Callable[[bytes], Image.Image]
) -> list[dict[str, Any]]:
    table = []
    for scorer in [load_scorer(spec, "cpu") for spec in scorers]:
        for scale in guidance_scales:
            for path in shards(directory / f"images-guidance-{scale:g}", ".parquet"):
                rows = read_rows(path)
                scores = scorer([decode_image(row["image"]) for row in rows], [row["prompt"] for row in rows])
                table += [
                    {"id": row["id"], "prompt": row["prompt"], "seed": row["seed"], "guidance_scale": scale,
                     "scorer": scorer.name, "score": score}
                    for row, score in zip(rows, scores.tolist(), strict=True)
                ]  # fmt: skip
    return table


def models_of_run(output_dir: Path) -> dict[str, Path]:
    """The evaluated models of a run and their folders: base, every round, and the last round of each rival."""
    config = yaml.safe_load((output_dir / "config.yaml").read_text())
    folders = {"base": output_dir / "base"}
    for k in range(1, config["rounds"] + 1):
        folders[f"{config['objective']} round {k}"] = output_dir / f"round-{k}" / "evaluation"
    for rival in config["compare_with"] or []:
        if rival != config["objective"]:
            last = output_dir / f"compare-{rival}" / f"round-{config['rounds']}"
            folders[f"{rival}, same steps"] = last / "evaluation"
    return folders


def rows_of_runs(output_dirs: list[Path]) -> list[ScoreRow]:
    """The scores of all models of runs that differ in their seed alone, their images side by side.

    Raises:
        InputError: a folder that is not a finished run, or runs that are not of the same settings and prompts.
    """
    merged: dict[tuple[str, float, str], list[ScoreRow]] = {}
    for directory in output_dirs:
        if not (directory / "config.yaml").is_file():
            raise InputError(f"{directory} is not a run's folder: it has no config.yaml")
        images = yaml.safe_load((directory / "config.yaml").read_text())["num_validation_images"]
        for model, folder in models_of_run(directory).items():
            if not (folder / "scores.parquet").is_file():
                raise InputError(f"{directory} is not finished: {folder} has no scores; run its command again")
            for row in score_rows(model, folder, images):
                merged.setdefault((model, row.guidance_scale, row.scorer), []).append(row)
    for (model, *_), rows in merged.items():
        if len(rows) != len(output_dirs) or len({len(row.scores) for row in rows}) > 1:
            raise InputError(f"the runs differ in more than their seed: {model!r} is not alike in all of them")
    return [
        ScoreRow(model, scale, scorer, np.concatenate([row.scores for row in rows], axis=1))
        for (model, scale, scorer), rows in merged.items()
    ]


def score_rows(model: str, directory: Path, images_per_prompt: int) -> list[ScoreRow]:
    """The scores that `evaluate` stored, as (prompts, images) arrays for `comparison.compare`."""
    table = read_rows(directory / "scores.parquet")
    found = []
    for scorer, scale in sorted({(row["scorer"], row["guidance_scale"]) for row in table}):
        scores = [r["score"] for r in table if r["scorer"] == scorer and r["guidance_scale"] == scale]
        found.append(ScoreRow(model, scale, scorer, np.array(scores).reshape(-1, images_per_prompt)))
    return found
