"""Pictures that are asked for: every model draws the same prompts with the same seeds into PNG files.

A folder of one model holds `guidance-3/00012-0.png` (prompt 12, image 0) and, beside them, index files that say shard
by shard which prompt and seed made which file. A shard is drawn whole by one process, and its index is written last.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any, TypedDict

from accelerate import Accelerator
from PIL import Image

from spin_diffusion.samples.photometry import measure_image
from spin_diffusion.samples.requests import Request, in_shards
from spin_diffusion.store.files import Made, Piece, build_together, read_json, read_json_lines, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of, known_hash
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import AGAIN, write_file


class GivenRow(TypedDict):
    """A row of an index, as far as a folder of pictures that somebody else gives needs it."""

    prompt: str
    file: str | None
    """None = there is no picture."""


class PictureRow(Request, GivenRow):
    """A row of an index: what was asked for, and the file that it made; `state` says why there is none."""

    sha256: str | None
    state: str


Draw = Callable[[list[str], list[int], float, Callable[[int], None]], list[Image.Image]]
"""(prompts, seeds, guidance scale, told the number drawn so far) -> images by the model."""


def folder_of(scale: float | None) -> str:
    """The folder's name of one guidance scale."""
    return "given" if scale is None else f"guidance-{scale:g}"


def draw_pictures(
    wanted: list[Request],
    directory: Path,
    protocol: dict[str, Any],
    draw: Draw,
    accelerator: Accelerator,
    bar: Callable[[float, int], Callable[[int, str], None]],
    drawn_by: str = "",
) -> None:
    """Draw what is `wanted` at every guidance scale of the protocol; what this very model drew already stays, picture
    for picture as it was drawn.

    Args:
        bar: (guidance scale, number of images) -> the function that is told how many are done.
        drawn_by: hash of the model, with all of its parts.

    Raises:
        InputError: the folder holds pictures of another protocol.
    """
    claim(directory, protocol, accelerator)
    for scale in protocol["guidance_scales"]:
        pieces = _pieces(wanted, directory / folder_of(scale), protocol, scale, drawn_by, draw)
        build_together(pieces, lambda piece: piece, accelerator, bar(scale, len(wanted)))


def are_drawn(wanted: list[Request], directory: Path, protocol: dict[str, Any], drawn_by: str) -> bool:
    """Whether `draw_pictures` would find nothing to do."""
    return all(
        piece.is_built
        for scale in protocol["guidance_scales"]
        for piece in _pieces(wanted, directory / folder_of(scale), protocol, scale, drawn_by, None)
    )


def _pieces(
    wanted: list[Request],
    folder: Path,
    protocol: dict[str, Any],
    scale: float | None,
    drawn_by: str,
    draw: Draw | None,
) -> list[Piece]:
    """The index files of a folder, whose pictures are drawn with them."""

    def piece_of(index: Path, rows: list[Request]) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            assert draw is not None and scale is not None
            pictures = _draw_all(draw, rows, scale, tell)
            return Made([save_picture(row, image, folder) for row, image in zip(rows, pictures, strict=True)])

        return index_piece(index, picture_key(protocol, scale, drawn_by), rows, make)

    return [piece_of(folder / f"{name}.jsonl", rows) for name, rows in in_shards(wanted)]


def picture_key(protocol: dict[str, Any], scale: float | None, drawn_by: str) -> str:
    """What all pictures of a model at a guidance scale depend on, beside what was asked for."""
    return key_of(protocol=protocol["id"], scale=scale, drawn_by=drawn_by)


def index_piece(index: Path, key: str, wanted: list[Request], make: Callable[[Callable[[int], None]], Made]) -> Piece:
    """An index file with the pictures beside it, which `make` writes."""
    return Piece(index, key, len(wanted), make, lambda: _has_pictures(index, wanted))


def _has_pictures(index: Path, wanted: list[Request]) -> bool:
    """Whether an index lists what is wanted, and its pictures are as they were drawn.

    That something is lost or damaged is said in a line.
    """
    try:
        rows = read_index(index)
        if [{name: row.get(name) for name in asked} for row, asked in zip(rows, wanted, strict=False)] != wanted:
            return False
        paths = [(index.parent / row["file"], row["sha256"]) for row in rows if row["file"] is not None]
        lost = [path for path, digest in paths if not path.is_file() or known_hash(path) != digest]
    except InputError as error:
        tell(f"{index} is damaged ({str(error)[:100]}): its pictures are made anew")
        return False
    if lost:
        tell(f"{lost[0]} is lost or damaged: it and the other pictures of {index.name} are made anew")
    return not lost


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


def _draw_all(draw: Draw, rows: list[Request], scale: float, told: Callable[[int], None]) -> list[Image.Image | None]:
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


def save_picture(row: Request, image: Image.Image | None, folder: Path) -> dict[str, Any]:
    """Write the PNG file of a request and return the request with its file, hash and photometry."""
    if image is None:
        return without_picture(row, "not finite")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return save_bytes(row, buffer.getvalue(), folder / f"{row['id']}-{row['k']}.png")


def save_bytes(row: Request, data: bytes, path: Path) -> dict[str, Any]:
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
        "file": path.name,
        "sha256": digest,
        "state": measured.state,
        "saturation": measured.saturation,
        "clipped": measured.clipped,
        "sharpness": measured.sharpness,
    }


def without_picture(row: Request, state: str, sha256: str | None = None) -> dict[str, Any]:
    """The request of a picture that there is not, and why."""
    nothing = dict.fromkeys(("file", "saturation", "clipped", "sharpness"))
    return row | nothing | {"sha256": sha256, "state": state}


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
