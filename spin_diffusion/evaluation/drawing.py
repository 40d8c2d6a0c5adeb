"""The pictures of an evaluation: every model draws the same prompts with the same seeds into PNG files.

A folder of one model holds `guidance-3/00012-0.png` (prompt 12, image 0) and, beside them, index files that say shard
by shard which prompt and seed made which file. A shard is drawn whole by one process, and its index is written last.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, TypedDict

from accelerate import Accelerator
from PIL import Image

from spin_diffusion.evaluation.alarms import measure_image
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.run_dir import (
    AGAIN,
    read_json,
    read_json_lines,
    seed_from,
    shard_name,
    write_file,
    write_json,
)
from spin_diffusion.selfplay.sharing import shared_out
from spin_diffusion.store.pictures import open_picture

SEED_RULE = "SHA-256 of (seed, 'evaluation', prompt, number of the image), the same for every model"
ROWS_PER_SHARD = 64


class GivenRow(TypedDict):
    """A row of an index, as far as a folder of pictures that somebody else gives needs it."""

    prompt: str
    file: str | None
    """None = there is no picture."""


class PictureRow(GivenRow):
    """A row of an index: what was asked for, and the file that it made; `state` says why there is none."""

    id: str
    k: int
    category: str
    seed: int
    sha256: str | None
    state: str


Draw = Callable[[list[str], list[int], float, Callable[[int], None]], list[Image.Image]]
"""(prompts, seeds, guidance scale, told the number drawn so far) -> images by the model."""


def requests(prompts: PromptSet, images_per_prompt: int, seed: int) -> list[dict[str, Any]]:
    """What every model is asked to draw: each prompt `images_per_prompt` times, each time with a seed of its own."""
    return [
        {"id": row.id, "k": k, "prompt": row.prompt, "category": row.category or "",
         "seed": seed_from(seed, "evaluation", row.prompt, k)}
        for row in prompts.rows
        for k in range(images_per_prompt)
    ]  # fmt: skip


def protocol_of(
    prompts: PromptSet,
    *,
    images_per_prompt: int,
    seed: int,
    sampler: str,
    num_inference_steps: int | None,
    guidance_scales: Sequence[float | None],
    resolution: int | None,
) -> dict[str, Any]:
    """What must be equal for two results to be comparable, with its hash as `id`."""
    rest = {
        "prompt_set": {
            "name": prompts.name,
            "sha256": prompts.sha256,
            "num_prompts": len(prompts.rows),
            "licence": prompts.licence,
            "source": prompts.source,
        },
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "seed_rule": SEED_RULE,
        "sampler": sampler,
        "num_inference_steps": num_inference_steps,
        "guidance_scales": list(guidance_scales),
        "resolution": resolution,
    }
    # The same prompts from another place are the same prompts
    compared = rest | {"prompt_set": prompts.sha256}
    return {"id": hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()} | rest


def folder_of(scale: float | None) -> str:
    """The folder's name of one guidance scale."""
    return "given" if scale is None else f"guidance-{scale:g}"


def draw_pictures(
    wanted: list[dict[str, Any]],
    directory: Path,
    protocol: dict[str, Any],
    draw: Draw,
    accelerator: Accelerator,
    bar: Callable[[float, int], Callable[[int, str], None]],
) -> None:
    """Draw what is `wanted` at every guidance scale of the protocol; what is there already stays.

    Args:
        bar: (guidance scale, number of images) -> the function that is told how many are done.

    Raises:
        InputError: the folder holds pictures of another protocol.
    """
    claim(directory, protocol, accelerator)
    chunks = [wanted[start : start + ROWS_PER_SHARD] for start in range(0, len(wanted), ROWS_PER_SHARD)]
    for scale in protocol["guidance_scales"]:
        folder = directory / folder_of(scale)
        progress, done = bar(scale, len(wanted)), 0
        for number, rows in shared_out(list(enumerate(chunks)), accelerator):
            index = folder / f"{shard_name(number, len(chunks))}.jsonl"
            if not index.is_file():
                told = partial(_tell, progress, done, accelerator.num_processes)
                pictures = _draw_all(draw, rows, scale, told)
                write_index(
                    index, [save_picture(row, image, folder) for row, image in zip(rows, pictures, strict=True)]
                )
            done += len(rows)
            progress(done * accelerator.num_processes, "")
        accelerator.wait_for_everyone()


def _tell(progress: Callable[[int, str], None], done: int, num_processes: int, images: int) -> None:
    progress((done + images) * num_processes, "")


def claim(directory: Path, protocol: dict[str, Any], accelerator: Accelerator) -> None:
    """Mark the folder as one of this protocol; InputError when it is one of another."""
    path = directory / "protocol.json"
    if path.is_file():
        if (old := read_json(path)) != protocol:
            differing = [key for key in protocol if key != "id" and old.get(key) != protocol[key]]
            raise InputError(
                f"{directory} holds pictures of another protocol ({', '.join(differing)}): give another --output_dir"
            )
    elif accelerator.is_main_process:
        write_json(path, protocol)
    accelerator.wait_for_everyone()


def _draw_all(
    draw: Draw, rows: list[dict[str, Any]], scale: float, told: Callable[[int], None]
) -> list[Image.Image | None]:
    """The pictures of a shard; None for one that is not finite."""
    try:
        return list(draw([row["prompt"] for row in rows], [row["seed"] for row in rows], scale, told))
    except FloatingPointError:
        pictures: list[Image.Image | None] = []
        for row in rows:  # one by one, to lose no more than what is broken
            try:
                pictures += draw([row["prompt"]], [row["seed"]], scale, lambda images: None)
            except FloatingPointError:
                pictures.append(None)
            told(len(pictures))
        return pictures


def save_picture(row: dict[str, Any], image: Image.Image | None, folder: Path) -> dict[str, Any]:
    """Write the PNG file of a request and return the request with its file, hash and photometry."""
    if image is None:
        return without_picture(row, "not finite")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return save_bytes(row, buffer.getvalue(), folder / f"{row['id']}-{row['k']}.png")


def save_bytes(row: dict[str, Any], data: bytes, path: Path) -> dict[str, Any]:
    """Write an encoded picture as it is and return the request with its file, hash and photometry.

    A picture that cannot be shown is kept out: its row has no file, and a state that says why.
    """
    digest = hashlib.sha256(data).hexdigest()
    try:
        measured = measure_image(open_picture(data))
    except InputError as error:
        return without_picture(row, f"cannot be shown: {error}", digest)
    write_file(path, lambda part: part.write_bytes(data))
    return row | {
        "file": path.name, "sha256": digest, "state": measured.state, "saturation": measured.saturation,
        "clipped": measured.clipped, "sharpness": measured.sharpness,
    }  # fmt: skip


def without_picture(row: dict[str, Any], state: str, sha256: str | None = None) -> dict[str, Any]:
    """The request of a picture that there is not, and why."""
    nothing = dict.fromkeys(("file", "saturation", "clipped", "sharpness"))
    return row | nothing | {"sha256": sha256, "state": state}


def write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the index of a shard; the shard is complete from now on."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def index_files(directory: Path, scale: float | None) -> list[Path]:
    """The index files of one guidance scale, in order; InputError when some are missing."""
    found = sorted((directory / folder_of(scale)).glob("*-of-*.jsonl"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{directory / folder_of(scale)} is incomplete: {AGAIN}")
    return found


def read_index(path: Path, kind: type = PictureRow, remedy: str = AGAIN) -> list[dict[str, Any]]:
    """The rows of one index file; Damaged when it is not what was written, InputError when it names a file that is not
    beside it."""
    rows = read_json_lines(path, kind, remedy)
    folder = path.parent.resolve()
    for row in rows:
        # An index of somebody else's must not show any file of this machine, not through a link either
        name = row["file"]
        if name is not None and not (PureWindowsPath(name).name == name and (folder / name).resolve().parent == folder):
            raise InputError(f"{path} names {name!r}, which does not lie beside it: nothing of it is read")
    return rows
