"""The real pictures that those of models are compared with: of a run, or in a place that the user names."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from PIL import Image

from spin_diffusion.data.image_folder import is_image
from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.rows import ReadReport
from spin_diffusion.data.settings import DataSettings
from spin_diffusion.data.sources import list_files
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.images import crop
from spin_diffusion.evaluation.distribution import MIN_PICTURES
from spin_diffusion.evaluation.features import MAX_REAL, Comparison
from spin_diffusion.samples.pairs import Column
from spin_diffusion.samples.real import data_manifest
from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, printable, read_bytes
from spin_diffusion.store.keys import key_of, place_hash

FOLDER = "real"
"""Where their features lie in the folder of a run or an evaluation."""


def of_run(config: Config, held_out: Path | None) -> Comparison | None:
    """Those of a run: held out, if there are enough of them, else trained on; None where none are asked for."""
    spec, output_dir = config.evaluation.distribution_features, Path(config.run.output_dir)
    if spec is None:
        return None
    if held_out is not None and data_manifest(held_out)["rows"] >= MIN_PICTURES:
        return of_data(spec, held_out, "images held out", output_dir)
    return of_data(spec, output_dir / "data", "images trained on", output_dir)


def of_data(spec: str, data: Path, said: str, output_dir: Path) -> Comparison:
    """Those of prepared data.

    Args:
        said: which ones they are, in words.
        output_dir: where their features go.
    """
    manifest = data_manifest(data)
    real, resolution = cast(Sequence[bytes], Column(data, "image")), cast(int, manifest["settings"]["resolution"])
    content = key_of(data=manifest["hash"], resolution=resolution)
    return Comparison(spec, real, said, content, _to_square(resolution), output_dir / FOLDER)


class _Pictures(Sequence[bytes]):
    """Files of pictures, read when they are asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return read_bytes(self.paths[index], MAX_PICTURE_BYTES)


def check_place(place: str) -> None:
    """InputError when there is no such folder or file."""
    if not Path(place).expanduser().exists():
        raise InputError(f"--reference_images {printable(place)} does not exist: give a folder of pictures or a file")


def of_place(spec: str, place: str, resolution: int | None, output_dir: Path) -> Comparison:
    """Those of a folder of pictures, or of a data set, whose first MAX_REAL are read.

    Args:
        resolution: of the drawn pictures, px; None = the real ones stay as they are.

    Raises:
        InputError: there is nothing in it that can be read.
    """
    path = Path(place).expanduser()
    files = [file for file in list_files(path).files if is_image(file)] if path.is_dir() else []
    real, report = cast(Sequence[bytes], _Pictures(files)), ReadReport()
    if not files:
        examples = read_examples(DataSettings(dataset_name=str(path), one_image_per_prompt=False), report=report)
        real = [example.image for example in islice(examples, MAX_REAL)]
    said = printable(path.name) + (f" ({report.bad} damaged left out)" if report.bad else "")
    content = key_of(place=place_hash(path), resolution=resolution)
    to_frame = (lambda image: image) if resolution is None else _to_square(resolution)
    return Comparison(spec, real, said, content, to_frame, output_dir / FOLDER)


def _to_square(resolution: int) -> Callable[[Image.Image], Image.Image]:
    """The crop to the middle square, as images are cropped for training."""
    return lambda image: crop(image, (resolution, resolution))[0]
