"""What of an evaluation cannot be read any more is removed before it goes on: all of it can be made anew.

Nothing else is: other files in its folder are its user's."""

import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from spin_diffusion.evaluation.evaluated import WasRun
from spin_diffusion.samples.drawn import read_index
from spin_diffusion.store.files import read_json, read_rows
from spin_diffusion.store.run_dir import AGAIN, Damaged, find_damage, tell_remade


class _Protocol(TypedDict):
    id: str


class ModelRecord(TypedDict):
    """Whose samples lie in a folder (`model.json`)."""

    weights_sha256: str | None
    files: NotRequired[dict[str, str]]
    """SHA-256 of the evaluation's records when it came to its end."""


def remove_damaged(folder: Path) -> None:
    """Remove the files of an evaluation below `folder` that are not what was written, each with a line that says so.

    An evaluation of a run that lacks something is begun again where it lacks it (its `model.json` is removed as well).
    Where whose pictures they are, or by which protocol they were drawn, is not known any more, they are drawn anew.
    """
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_ours(path)]:
        try:
            _read(path)
        except Damaged as error:
            tell_remade(error)
            if path.name in ("model.json", "protocol.json"):
                for index in filter(_is_ours, list(path.parent.rglob("*-of-*.jsonl"))):
                    index.unlink()
            path.unlink(missing_ok=True)
            (folder / "model.json").unlink(missing_ok=True)
    if (folder / "model.json").is_file():
        listed = read_json(folder / "model.json").get("files", {})
        for name, problem in find_damage(listed, folder).items():
            tell_remade(Damaged(folder / name, problem, AGAIN))
            (folder / name).unlink(missing_ok=True)
            (folder / "model.json").unlink(missing_ok=True)


def records_in(folder: Path) -> list[Path]:
    """The files of an evaluation that its end is recorded with: not its media, whose hashes they hold, nor what is
    written from them."""
    found = [path for path in sorted(folder.rglob("*")) if _is_ours(path)]
    return [path for path in found if path.parent != folder or path.name == "held_out.json"]


def _is_ours(path: Path) -> bool:
    """Whether an evaluation writes a file of that name at that place."""
    return (
        path.name in ("model.json", "protocol.json", "held_out.json", "scorer.json", *_TABLES)
        or re.fullmatch(r"\d{5}-of-\d{5}\.(jsonl|parquet)", path.name) is not None
        or path.suffix == ".json"  # of a judge
        and path.parent.name == "scores"
    )


_TABLES = ("images.parquet", "answers.parquet", "scores.parquet")


def _read(path: Path) -> Any:
    """Read one file as its reader will; Damaged when it cannot."""
    if path.suffix == ".parquet":
        return read_rows(path)
    if path.suffix == ".jsonl":
        return read_index(path)
    if path.suffix != ".json" or path.name == "results.json":  # the results are written from the rest each time
        return None
    types = {"model.json": ModelRecord, "protocol.json": _Protocol, "held_out.json": dict[str, Any]}
    kind = types.get(path.name, WasRun if "scores" in path.parts[-4:] else dict[str, Any])
    return read_json(path, kind, AGAIN)
