"""Made-up evaluations: results.json, scores.parquet, images.parquet and tiny pictures, as an evaluation leaves them."""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from spin_diffusion.evaluation.comparison import compare_others
from spin_diffusion.evaluation.statistics import (
    Interval,
    best_by_average,
    best_of_k,
    holm,
    mean_interval,
    paired_difference,
    sign_test_p,
    win_tie_loss,
)
from spin_diffusion.evaluation.verdicts import rank

SCRIPT = "</script><script>window.injected = 1</script>"
NASTY_PROMPTS = [
    SCRIPT,
    '<img src=x onerror="window.injected = 2"> & \'quotes\' "both" `ticks` {{ 7 * 7 }} {% raw %}',
    "\u202eright to left override and no end, \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "an astronaut \U0001f468\u200d\U0001f680 riding \U0001f984\ufe0f, \u732b, Z\u0351\u036b\u0343\u036aa\u0342lgo",
    "a very long prompt, " + "x" * 10_000,
    "control \x00 \x07 \x1b[31m \x7f \x85 \ud800 \ufffe characters",
    "",
    "]]> <!-- --> </style></textarea></title> $\\frac{1}{2}$ ${window.injected=3} javascript:alert(1)",
]
_COLOURS = ["red", "blue", "green", "orange", "white", "purple", "teal"]
_SHAPES = ["circle", "square", "triangle"]
CATEGORIES = ["animals", "people", "\u05d0\u05d1\u05d2 <b>world</b>", "food & drink"]

SCORERS: dict[str, dict[str, Any]] = {
    "hps_v2_1": {"title": "HPS v2.1", "role": "held-out", "scale": "100 cos, usually 25 to 32", "level": 28.0,
                 "spread": 1.2, "gain": 0.45},
    "pickscore": {"title": "PickScore", "role": "in-domain", "scale": "100 cos, usually 18 to 24", "level": 21.0,
                  "spread": 1.0, "gain": 0.6},
    "clip_l14": {"title": "CLIP score", "role": "alignment", "scale": "100 cos", "level": 26.0, "spread": 2.0,
                 "gain": -0.02},
    "sharpness": {"title": "Sharpness", "role": "drift", "scale": "mean absolute Laplacian", "level": 0.08,
                  "spread": 0.01, "gain": 0.02},
}  # fmt: skip


def prompts(number: int, nasty: bool = True) -> list[str]:
    """That many prompts; the nasty ones come first."""
    tame = [
        f"a {_COLOURS[i % 7]} {_SHAPES[i % 3]} above a {_COLOURS[(i + 2) % 7]} {_SHAPES[(i + 1) % 3]}, no. {i}"
        for i in range(number)
    ]
    return ((NASTY_PROMPTS if nasty else []) + tame)[:number]


def write_evaluation(
    directory: Path,
    *,
    models: Iterable[tuple[str, str, int | None]] = (
        ("base", "baseline", 0),
        ("round 1", "round", 1),
        ("round 2", "round", 2),
        ("round 3", "round", 3),
        ("SFT <rival> & co", "rival", None),
    ),
    headline: str | None = "round 3",
    scales: Iterable[float | None] = (3.0, 7.5),
    scorers: Iterable[str] = ("hps_v2_1", "pickscore", "sharpness"),
    num_prompts: int = 40,
    images_per_prompt: int = 2,
    side_px: int = 48,
    with_pictures: bool = True,
    ties: bool = False,
    nasty: bool = True,
) -> dict[str, Any]:
    """Write an evaluation into `directory` and return its results. `ties`: every model scores the same."""  # fmt: skip
    models, scales, scorers = list(models), list(scales), list(scorers)
    rng = np.random.default_rng(0)
    texts = prompts(num_prompts, nasty)
    ids = [f"{i:05d}" for i in range(num_prompts)]
    # As a reader of prompt files leaves them: parquet cannot hold half of a surrogate pair
    stored = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    images, scores, arrays = [], [], {}
    for scale in scales:
        easy = {s: rng.normal(size=(num_prompts, images_per_prompt)) for s in scorers}
        for place, (model, role, _) in enumerate(models):
            folder = f"models/{place}/{'given' if scale is None else f'guidance-{scale:g}'}"
            for s in scorers:
                about = SCORERS[s]
                strength = {"baseline": 0.0, "rival": 0.4}.get(role, min(place, 3) / 3)
                noise = rng.normal(size=easy[s].shape)
                values = about["level"] + about["spread"] * (easy[s] + 0.5 * noise + 1.6 * about["gain"] * strength)
                if about["role"] == "drift":
                    values = about["level"] + about["spread"] * (easy[s] + 0.3 * noise + strength)
                arrays[model, s, scale] = np.full_like(values, about["level"]) if ties else values
            for i, id_ in enumerate(ids):
                for k in range(images_per_prompt):
                    seed = int.from_bytes(hashlib.sha256(f"{id_} {k}".encode()).digest()[:8], "big") >> 1
                    data = picture(i, k, place, side_px) if with_pictures else None
                    file = f"{folder}/{id_}-{k}.png" if data else None
                    if data:
                        (directory / folder).mkdir(parents=True, exist_ok=True)
                        (directory / file).write_bytes(data)
                    row = {"model": model, "guidance_scale": scale, "id": id_, "k": k, "prompt": stored[i],
                           "category": CATEGORIES[i % 4], "seed": seed, "file": file,
                           "sha256": hashlib.sha256(data).hexdigest() if data else None}  # fmt: skip
                    state = "ok" if data else "not finite"
                    images.append(row | {"state": state, "saturation": 0.5, "clipped": 0.0, "sharpness": 0.08})
                    scores += [
                        row | {"scorer": s, "score": float(arrays[model, s, scale][i, k]), "truncated": False}
                        for s in scorers
                    ]
    results = _results(models, headline, scales, scorers, texts, arrays, images_per_prompt)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1))
    types = {"guidance_scale": pa.float64(), "file": pa.string(), "sha256": pa.string(), "score": pa.float64()}
    for name, rows in (("images", images), ("scores", scores)):
        table = pa.Table.from_pylist(rows) if rows else pa.table({"model": pa.array([], pa.string())})
        for column, type_ in types.items():
            if column in table.column_names:
                place = table.column_names.index(column)
                table = table.set_column(place, column, table[column].cast(type_))
        pq.write_table(table, directory / f"{name}.parquet")
    return results


def picture(number: int, k: int, place: int, side_px: int) -> bytes:
    """A shape that depends on the prompt and the seed, sharper with each model."""
    image = Image.new("RGB", (side_px, side_px), (34 + 8 * place, 38, 52 + 12 * k))
    pen = ImageDraw.Draw(image)
    inset = side_px // 4 + (3 - min(place, 3)) * side_px // 24
    box = (inset, inset, side_px - inset, side_px - inset)
    if number % 3 == 0:
        pen.ellipse(box, fill=_COLOURS[number % 7])
    elif number % 3 == 1:
        pen.rectangle(box, fill=_COLOURS[number % 7])
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (side_px // 2, box[1])], fill=_COLOURS[number % 7])
    if side_px > 128:  # texture, so that it does not compress to nothing
        noise = np.random.default_rng([number, k, place]).integers(0, 90, (side_px, side_px, 3), dtype=np.uint8)
        image = Image.fromarray(np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _results(
    models: list[tuple[str, str, int | None]],
    headline: str | None,
    scales: list[float | None],
    scorers: list[str],
    texts: list[str],
    arrays: dict[tuple[str, str, float | None], np.ndarray],
    images_per_prompt: int,
) -> dict[str, Any]:
    baseline = models[0][0]
    results, comparisons, verdicts, alarms, breakdowns = [], [], [], [], []
    lengths = np.argsort([len(text) for text in texts])
    for scale in scales:
        for model, role, _ in models:
            of_model = {s: arrays[model, s, scale] for s in scorers}
            for s in scorers:
                aggregates = {"mean": of_model[s].mean(axis=1), "best_of_k": best_of_k(of_model[s])}
                aggregates["best_by_average"] = best_by_average(of_model)[s]
                for aggregate, values in aggregates.items():
                    results.append(
                        {"model": model, "scorer": s, "guidance_scale": scale, "aggregate": aggregate,
                         "num_prompts": len(values), "sd": float(values.std()),
                         **_interval(mean_interval(values))}
                    )  # fmt: skip
            if role == "baseline":
                continue
            found = []
            for s in scorers:
                ours, theirs = of_model[s], arrays[baseline, s, scale]
                wins, tied, losses = win_tie_loss(ours, theirs)
                found.append(
                    {"model": model, "baseline": baseline, "scorer": s, "guidance_scale": scale,
                     "num_prompts": len(ours), **_difference(paired_difference(ours, theirs)),
                     "wins": wins, "ties": tied, "losses": losses, "win_rate": (wins + tied / 2) / len(ours),
                     "p": sign_test_p(wins, losses)}
                )  # fmt: skip
                for part in range(4):
                    places = np.arange(len(texts)) % 4 == part
                    for by, value, chosen in (
                        ("category", CATEGORIES[part], np.flatnonzero(places)),
                        ("prompt length", f"quarter {part + 1}", np.array_split(lengths, 4)[part]),
                    ):
                        if len(chosen) < 2:
                            continue
                        # Some parts have an interval, some are too few for one
                        low = {"low": None, "high": None}
                        difference = paired_difference(ours[chosen], theirs[chosen])
                        breakdowns.append(
                            {"by": by, "value": value, "model": model, "scorer": s, "guidance_scale": scale,
                             "num_prompts": 12 + 7 * part, **_difference(difference), **(low if part == 0 else {})}
                        )  # fmt: skip
            for row, p in zip(found, holm([row["p"] for row in found]).tolist(), strict=True):
                sure = p < 0.05 and (row["low"] > 0) - (row["high"] < 0)
                verdict = "drift" if SCORERS[row["scorer"]]["role"] == "drift" else (
                    {1: "improved", -1: "regressed"}.get(int(sure), "inconclusive"))  # fmt: skip
                comparisons.append(row | {"p_holm": p, "verdict": verdict})
            won = any(row["verdict"] == "improved" for row in comparisons if row["model"] == model)
            verdicts.append(
                {"model": model, "guidance_scale": scale, "verdict": "improved" if won else "inconclusive",
                 "reason": "The model is better than the baseline by HPS v2.1, not trained on the same preferences, "
                           "and worse by no scorer that counts." if won else "No scorer sees a difference."}
            )  # fmt: skip
            for number, (id_, state, value) in enumerate(
                [("goodhart", "ok", 0.12), ("diversity_seed", "warn", -0.083), ("photometry", "alarm", 3.412),
                 ("memorisation", "not run", None), ("broken_images", "ok", 0.0)]
            ):  # fmt: skip
                alarms.append(
                    {"id": id_, "model": model, "guidance_scale": scale, "state": state, "value": value,
                     "threshold": None if value is None else 0.05 * (number + 1),
                     "explanation": f"What {id_} found, in plain words. " + ("Training captions are not known."
                                    if value is None else "Look at the pictures that changed most.")}
                )  # fmt: skip
    asked = len(texts) * images_per_prompt
    counts = [
        {"model": model, "guidance_scale": scale, "asked": asked, "missing": 0, "unscored": 0, "broken": 0,
         "prompts_lost": 0}
        for scale in scales
        for model, *_ in models
    ]  # fmt: skip
    compared = {(model, scale, s): arrays[model, s, scale] for scale in scales for model, *_ in models for s in scorers}
    more = {}
    if others := compare_others(compared, baseline, {s: SCORERS[s]["role"] for s in scorers}, {}):
        names, known = [model for model, *_ in models], [{"name": s, "state": "run", **SCORERS[s]} for s in scorers]
        ranking = [rank(names, scale, [*comparisons, *others], known, verdicts) for scale in scales]
        more = {"between_others": others, "ranking": [place for place in ranking if place]}
    return more | {
        "schema_version": 1,
        "samples": counts,
        "title": "Toy world, SPIN after three rounds",
        "protocol": {
            "id": hashlib.sha256(repr(texts).encode()).hexdigest(),
            "prompt_set": {"name": "toy prompts", "sha256": hashlib.sha256(b"prompts").hexdigest(),
                           "num_prompts": len(texts), "licence": "CC0-1.0", "source": "assets/toy_world"},
            "images_per_prompt": images_per_prompt, "seed": 0,
            "seed_rule": "SHA-256 of (seed, 'evaluation', prompt, number of the image), the same for every model",
            "sampler": "DDIMScheduler, eta 1", "num_inference_steps": 50, "guidance_scales": scales, "resolution": 64,
        },
        "baseline": baseline,
        "headline": {"model": headline, "guidance_scale": scales[0]},
        "models": [
            {"name": name, "role": role, "round": round_, "source": f"runs/toy/{name}",
             "kind": "round" if role == "round" else "pipeline", "base": "assets/toy_world/sloppy" if place else None,
             "weights_sha256": hashlib.sha256(name.encode()).hexdigest()}
            for place, (name, role, round_) in enumerate(models)
        ],
        "scorers": [
            {"name": s, "title": SCORERS[s]["title"], "state": "run", "reason": "", "scale": SCORERS[s]["scale"],
             "role": SCORERS[s]["role"], "source": f"somewhere/{s}", "checkpoint": {"model.safetensors": "ab" * 32},
             "preprocessing": "224 px, bicubic", "text": "77 tokens", "licence": "MIT", "citation": "arXiv 2306.09341",
             "truncated_prompts": 1}
            for s in scorers
        ] + [
            {"name": "imagereward", "title": "ImageReward", "state": "not run",
             "reason": "its weights are not here: give imagereward=PATH <b>\"now\"</b>", "scale": "",
             "role": "held-out", "source": "", "checkpoint": {}, "preprocessing": "", "text": "",
             "licence": "Apache-2.0", "citation": "", "truncated_prompts": 0}
        ],
        "results": results,
        "comparisons": comparisons,
        "verdicts": verdicts,
        "alarms": alarms,
        "breakdowns": breakdowns,
        "failures": [
            {"model": models[-1][0], "guidance_scale": scales[0], "id": f"{i:05d}", "prompt": texts[i],
             "what": "constant"}
            for i in range(min(3, len(texts)))
        ],
        "environment": {"torch": "2.13.0", "python": "3.11.7", "machine": "x86_64", "gpu": "none"},
    }  # fmt: skip


def _interval(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _difference(interval: Interval) -> dict[str, float]:
    return {"difference": interval.mean, "low": interval.low, "high": interval.high}
