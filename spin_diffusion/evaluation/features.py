"""Features of the pictures of models and of real ones, kept beside the scores; what results.json says of their
distributions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image

from spin_diffusion.evaluation import distribution
from spin_diffusion.evaluation.distribution import (
    LOWER_IS_BETTER,
    METRICS,
    Features,
    Replicates,
    believable,
    interval,
    measure,
    of_row,
)
from spin_diffusion.evaluation.embeddings import LoadedEmbedding, load_embedding
from spin_diffusion.evaluation.embeddings import __name__ as EMBEDDINGS
from spin_diffusion.evaluation.evaluated import EvaluatedModel, SampleFolder
from spin_diffusion.evaluation.records import AlarmEntry, DistanceEntry, DistributionEntry, Metric, Scale
from spin_diffusion.evaluation.specs import about_part, check_specs, parse_spec, part_key
from spin_diffusion.evaluation.statistics import Interval
from spin_diffusion.samples.drawn import folder_of, read_index
from spin_diffusion.store.files import Made, Piece, Tell, build, build_together, read_tensors, tensors_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, code_hash, key_of
from spin_diffusion.store.pictures import open_picture, read_picture

BATCH = 16
"""Pictures that an embedding gets at a time; the features do not depend on it."""
MAX_REAL = 5000
"""Real pictures that are embedded, evenly spaced among all."""
FEATURES = "features"
_SOURCE = "source"


def check_embedding(spec: str) -> None:
    """InputError when there is no such embedding; no weights are read."""
    check_specs(EMBEDDINGS, [spec], "--distribution_features")


@dataclass(frozen=True)
class Comparison:
    """With which real pictures those of models are compared, and in which features.

    Attributes:
        spec: NAME[=PATH] of the embedding.
        real: encoded real pictures.
        said: which ones they are, in words.
        content: hash of all that decides them.
        crop: to the frame in which models draw.
        folder: where their features are kept.
    """

    spec: str
    real: Sequence[bytes]
    said: str
    content: str
    crop: Callable[[Image.Image], Image.Image]
    folder: Path

    @property
    def name(self) -> str:
        """The name of the embedding."""
        return parse_spec(self.spec)[0]

    @property
    def key(self) -> str:
        """The key of the embedding as it is now."""
        return part_key(EMBEDDINGS, self.spec)

    @property
    def path(self) -> Path:
        """The file of the real pictures' features."""
        return self.folder / f"{self.name}.safetensors"

    def pictures(self) -> Iterator[Image.Image]:
        """The real pictures, at most MAX_REAL, in the frame in which models draw; InputError for a damaged one."""
        for place in np.linspace(0, len(self.real) - 1, min(len(self.real), MAX_REAL)).round().astype(int):
            try:
                picture = open_picture(self.real[place])
            except InputError as error:
                at = f"{place + 1} of the {len(self.real)} real pictures in their order ({self.said})"
                raise InputError(f"number {at}: {error}: repair it, or take it out") from error
            yield self.crop(picture)

    def real_features(self, device: str) -> Features:
        """The features of the real pictures, made where they are not kept already."""
        piece = self.piece(lambda: load_embedding(self.spec, device))
        build(piece.path, piece.key, lambda: piece.make(lambda done: None))
        return _read(self.path)

    def piece(self, load: Callable[[], LoadedEmbedding]) -> Piece:
        """The file of the real pictures' features."""
        key = key_of(embedding=self.key, real=self.content)
        return _piece(self.path, key, min(len(self.real), MAX_REAL), load, self.pictures)


def embed(
    compared: Comparison,
    folders: Mapping[str, SampleFolder],
    scales: Sequence[Scale],
    accelerator: Accelerator,
    bar: Callable[[int], Tell],
) -> None:
    """Keep the features of the real pictures and of every picture of every model; what is there already stays.

    Args:
        folders: name of the model -> its pictures.
        bar: number of pictures -> the function that is told how many are done.

    Raises:
        InputError: the embedding cannot be run.
    """
    key = compared.key
    load = cache(lambda: load_embedding(compared.spec, str(accelerator.device)))
    real = compared.piece(load)
    shards = [
        (file, place / file.with_suffix(".safetensors").name)
        for folder in folders.values()
        for scale in scales
        for place in [_place(compared, folder, scale)]
        for file in folder.files(scale)
    ]
    pieces = [real, *(_of_shard(file, path, key, load) for file, path in shards)]
    build_together(pieces, lambda piece: piece, accelerator, bar(sum(piece.size for piece in pieces)))


def _place(compared: Comparison, folder: SampleFolder, scale: Scale) -> Path:
    """Where the features of a model's pictures at a guidance scale are."""
    return folder.scores / f"{compared.name}-features" / folder_of(scale)


def _of_shard(file: Path, path: Path, key: str, load: Callable[[], LoadedEmbedding]) -> Piece:
    rows = [row for row in read_index(file) if row["file"] is not None]
    pictures = [[row["id"], row["k"], row["sha256"]] for row in rows]

    def images() -> Iterator[Image.Image]:
        return (read_picture(file.parent / row["file"]) for row in rows)

    return _piece(path, key_of(embedding=key, pictures=pictures), len(rows), load, images)


def _piece(
    path: Path,
    key: str,
    size: int,
    load: Callable[[], LoadedEmbedding],
    images: Callable[[], Iterator[Image.Image]],
) -> Piece:
    def make(tell: Callable[[int], None]) -> Made:
        embedding, left = load(), images()
        rows: list[Features] = []
        while part := list(islice(left, BATCH)):
            rows.append(embedding(part))
            tell(sum(map(len, rows)))
        features = torch.from_numpy(np.concatenate(rows))
        return Made({FEATURES: features}, {_SOURCE: embedding.source, **embedding.checkpoint})

    return Piece(path, key, size, make)


def _read(path: Path) -> Features:
    return read_tensors(path)[FEATURES].numpy()


# What is said of them


_MISSED: dict[Metric, str] = {
    "recall": "fewer of the real pictures are within the reach of the model's own (a baseline whose pictures stray "
    "reaches far: read it beside coverage)",
    "coverage": "more of the real pictures have none of the model's near them",
}
"""What it means when the share of the real pictures that is covered falls."""


def missed(compared: DistributionEntry) -> list[AlarmEntry]:
    """Alarms where recall or coverage fell against the baseline, beyond the interval of the difference."""
    return [
        AlarmEntry(
            id=entry["metric"],
            model=entry["model"],
            guidance_scale=entry["guidance_scale"],
            state="alarm" if entry["difference_high"] < 0 else "ok",
            value=entry["difference"],
            threshold=0.0,
            explanation=f"{entry['metric'].capitalize()} is {entry['value']:.3f}, "
            + Interval(entry["difference"], entry["difference_low"], entry["difference_high"]).signed(3)
            + " against the baseline"
            + (
                f": {_MISSED[entry['metric']]}. It may draw fewer kinds of pictures, and scores of single pictures do "
                "not see that."
                if entry["difference_high"] < 0
                else ", which is no fall beyond chance."
            ),
        )
        for entry in compared["distances"]
        if entry["metric"] in _MISSED and "difference" in entry
    ]


def distances(
    compared: Comparison, models: Sequence[EvaluatedModel], complete: Mapping[Scale, Sequence[str]], per_prompt: int
) -> DistributionEntry:
    """The entry of results.json.

    Args:
        models: the baseline first; `embed` has seen them all.
        complete: guidance scale -> ids of the prompts that count, of each of which every model has all pictures.
        per_prompt: pictures of each.
    """
    real, about = _read(compared.path), about_part(EMBEDDINGS, compared.spec)
    prompts = min(map(len, complete.values()))
    metrics, left_out = believable(prompts, per_prompt, len(real), real.shape[1])
    entries: list[DistanceEntry] = []
    for scale, ids in complete.items() if metrics else ():
        of = {model.name: measured(compared, model.folder, scale, ids, per_prompt) for model in models}
        for model in models:
            baseline = None if model is models[0] else of[models[0].name]
            entries += [_entry(model.name, scale, metric, of[model.name], baseline) for metric in metrics]
    checkpoint = {name: value for name, value in tensors_metadata(compared.path).items() if name != KEY}
    return DistributionEntry(
        embedding=compared.name,
        title=about.title,
        source=checkpoint.pop(_SOURCE),
        checkpoint=checkpoint,
        width=real.shape[1],
        real=compared.said,
        num_real=len(real),
        num_images=prompts * per_prompt,
        left_out=left_out,
        distances=entries,
    )


def measured(
    compared: Comparison, folder: SampleFolder, scale: Scale, ids: Sequence[str], per_prompt: int, part: str = ""
) -> dict[Metric, Replicates]:
    """What is measured of a model's pictures of these prompts, all of which `embed` has seen; kept beside their
    features.

    Args:
        part: of the prompts, what is measured of which is kept by itself.
    """
    place = _place(compared, folder, scale)
    files = {file: place / file.with_suffix(".safetensors").name for file in folder.files(scale)}

    def drawn() -> Float[np.ndarray, "prompts images width"]:
        of_picture: dict[tuple[str, int], Float[np.ndarray, " width"]] = {}
        for index, file in files.items():
            rows = [row for row in read_index(index) if row["file"] is not None]
            of_picture |= {(row["id"], row["k"]): each for row, each in zip(rows, _read(file), strict=True)}
        return np.stack([[of_picture[id_, k] for k in range(per_prompt)] for id_ in ids])

    decides = [tensors_metadata(compared.path)[KEY], *(tensors_metadata(file)[KEY] for file in files.values())]
    key = key_of(features=decides, prompts=list(ids), per_prompt=per_prompt)
    return keep_measured(place.with_name(f"{place.name}{part}.safetensors"), key, drawn, _read(compared.path))


def keep_measured(
    path: Path, key: str, drawn: Callable[[], Float[np.ndarray, "prompts images width"]], real: Features
) -> dict[Metric, Replicates]:
    """What is measured of drawn pictures against real ones, kept in a file.

    Args:
        key: of all that decides the features of both.
    """

    def make() -> Made:
        found = measure(drawn(), real)
        return Made({name: torch.from_numpy(replicates.row) for name, replicates in found.items()})

    build(path, key_of(code=code_hash(Path(distribution.__file__)), decides=key), make)
    kept = read_tensors(path)
    return {name: of_row(kept[name].numpy()) for name in METRICS}


def _entry(
    model: str,
    scale: Scale,
    metric: Metric,
    measured: Mapping[Metric, Replicates],
    baseline: Mapping[Metric, Replicates] | None,
) -> DistanceEntry:
    value = interval(metric, measured[metric])
    entry = DistanceEntry(
        model=model,
        guidance_scale=scale,
        metric=metric,
        better="lower" if metric in LOWER_IS_BETTER else "higher",
        value=value.mean,
        low=value.low,
        high=value.high,
    )
    if baseline is not None:
        apart = interval(metric, measured[metric], baseline[metric])
        entry["difference"] = apart.mean
        entry["difference_low"], entry["difference_high"] = apart.low, apart.high
    return entry
