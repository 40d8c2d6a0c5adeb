"""A data set of the hub, or one written by `save_to_disk`, as a Source, through the datasets library."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa

from spin_diffusion.data.files import flatten_json, no_files
from spin_diffusion.data.rows import Bad, LeftOut, Row, Source, Values
from spin_diffusion.data.settings import SourceSettings
from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, one_line, read_bytes

ERRORS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
"""What the datasets library raises for an id, split or configuration that is not there, and for the network."""


def open_hub(name: str, settings: SourceSettings) -> Source:
    """Load or stream `name` from the hub. Raises InputError if it cannot be reached or has no such split."""
    try:
        dataset = datasets.load_dataset(
            name,
            settings.dataset_config_name,
            split=settings.dataset_split,
            revision=settings.dataset_revision,
            streaming=settings.streaming,
        )
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"{name!r} is no local file or folder, and the hub has it not or cannot be reached: {one_line(error)}; "
            "check the name and the connection, or give the path of a local copy"
        ) from error
    except ERRORS as error:
        raise InputError(
            f"data set {name!r}, split {settings.dataset_split!r}, cannot be loaded: {one_line(error)}"
        ) from error
    roots = [datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
    read_file = _cache_reader(name, [Path(root).resolve() for root in roots])
    return _source(f"{name}[{settings.dataset_split}]", dataset, read_file)


def open_saved(folder: Path, split: str) -> Source:
    """Open what `save_to_disk` wrote. Raises InputError if it is damaged or has no such split."""
    try:
        dataset = datasets.load_from_disk(str(folder))
    except ERRORS as error:
        raise InputError(f"{folder} is not a readable saved data set: {one_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise InputError(f"{folder} has no split {split!r} (--dataset_split); its splits are {', '.join(dataset)}")
        dataset = dataset[split]
    return _source(str(folder), dataset, no_files(str(folder)))


def _source(
    name: str, dataset: datasets.Dataset | datasets.IterableDataset, read_file: Callable[[str], bytes]
) -> Source:
    features = dataset.features
    if features is None:
        # A stream without declared columns: its first row has them.
        first = next(iter(dataset), None)
        if first is None:
            raise InputError(f"{name} has no rows")
        columns, documents = tuple(first), first.get("json")
    else:
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                # The bytes as they are: decoding and encoding again would change the image.
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        columns, documents = tuple(features), features.get("json")
    from_json = tuple(key for key in documents if key not in columns) if isinstance(documents, dict) else ()

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        needed = {"json" if column in from_json else column for column in wanted}
        chosen = dataset.select_columns([column for column in columns if column in needed])
        for index, values in enumerate(_values(chosen, name)):
            if from_json and not isinstance(values, LeftOut):
                values = dict(values)
                flatten_json(values, values.get("json"))
            yield Row.read(f"{name} row {index}", values, read_file)

    return Source(name, columns + from_json, rows)


def _values(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> Iterator[Values | LeftOut]:
    """The values of every row, or why they cannot be had. Raises InputError where a stream cannot go on."""
    if isinstance(dataset, datasets.IterableDataset):
        try:
            yield from dataset
        except UnicodeDecodeError as error:
            where = f"{name} holds text that is not UTF-8 ({one_line(error)})"
            raise InputError(f"{where}, at which its stream ends: leave --streaming away") from error
        return
    for index in range(len(dataset)):
        try:
            yield dataset[index]
        except UnicodeDecodeError as error:
            yield LeftOut(Bad.BROKEN_TEXT, one_line(error))


def _cache_reader(name: str, roots: list[Path]) -> Callable[[str], bytes]:
    """Reader of images that the datasets library gives by path: only from the hub, or from what it downloaded."""

    def read_file(path: str) -> bytes:
        is_remote = path.split("::")[-1].startswith("hf://")
        if not is_remote and not any(Path(path).resolve().is_relative_to(root) for root in roots):
            raise InputError(
                f"{name} names the file {path!r}, which is not part of it: the data set must hold its images"
            )
        if not is_remote:
            try:
                return read_bytes(path, MAX_PICTURE_BYTES)
            except InputError as error:
                raise LeftOut(Bad.MISSING_IMAGE_FILE, str(error)) from error
        try:
            storage = pa.array([{"bytes": None, "path": path}], type=datasets.Image().pa_type)
            encoded = datasets.Image().embed_storage(storage)[0].as_py()["bytes"]
        except OSError as error:
            raise LeftOut(Bad.MISSING_IMAGE_FILE, f"{path} cannot be read: {one_line(error)}") from error
        if encoded is None:
            raise LeftOut(Bad.MISSING_IMAGE_FILE, f"{path} cannot be read")
        return encoded

    return read_file
