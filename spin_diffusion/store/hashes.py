"""Hashes of many files, which the processes of a run share out: together they read each byte once."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import Accelerator

from spin_diffusion.store.run_dir import ELSEWHERE, Damaged, file_hash
from spin_diffusion.store.sharing import done_together


def file_hashes(paths: Iterable[Path], below: Path, accelerator: Accelerator | None = None) -> dict[str, str]:
    """SHA-256 of every file, and of every file in every folder, by its path relative to `below`.

    Args:
        accelerator: whose processes, which all call it, share the files out; None = this process reads all.
    """
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in found if file.is_file()]
    digests = done_together(file_hash, files, accelerator)
    return {file.relative_to(below).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def find_damage(hashes: Mapping[str, str], below: Path, accelerator: Accelerator | None = None) -> dict[str, str]:
    """The files that are missing, or whose SHA-256 is not the recorded one: name -> what is wrong with it.

    Args:
        accelerator: as of `file_hashes`.
    """

    def damage(name: str) -> str | None:
        if not (below / name).is_file():
            return "it is missing"
        is_other = file_hash(below / name) != hashes[name]
        return f"its SHA-256 is not the recorded {hashes[name][:12]}..." if is_other else None

    found = done_together(damage, list(hashes), accelerator)
    return {name: problem for name, problem in zip(hashes, found, strict=True) if problem is not None}


def verify_hashes(
    hashes: Mapping[str, str], below: Path, remedy: str = ELSEWHERE, accelerator: Accelerator | None = None
) -> None:
    """Check every file against its recorded hash; Damaged names the first that is missing or another.

    Args:
        accelerator: as of `file_hashes`.
    """
    for name, problem in find_damage(hashes, below, accelerator).items():
        raise Damaged(below / name, problem, remedy)
