"""Keys: a stored file belongs to exactly what made it.

A key is the SHA-256 of all that decides a file's content, bytes rather than names. It stands in the file's own
metadata, and a file that has another key is made anew. Here is how a key is made, and the hashes that go into it: of a
file, of a folder, of a repository of the hub, and of a Python file with what it imports and names.
"""

import ast
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from spin_diffusion.store.input_error import open_regular

KEY = "key"
"""Its name in the metadata of a file."""
BESIDE = (
    "config.json open_clip_config.json model.safetensors pytorch_model.bin tokenizer.json tokenizer_config.json "
    "special_tokens_map.json vocab.json vocab.txt merges.txt chat_template.jinja"
).split()
"""What a loader that is given one file of weights may read beside it: backbone, configuration, tokenizer."""


def key_of(**decides: Any) -> str:
    """SHA-256, hexadecimal, over canonical JSON of everything that decides a file's content.

    Raises:
        TypeError: something JSON has no form for: its text would depend on more than its value.
    """
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def known_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hexadecimal; read once in a process, unless the file changes.

    Raises:
        InputError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
    return _hash_once(str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=100_000)
def _hash_once(path: str, *state: int) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_hash(place: Path | str) -> str | None:
    """What is behind the name of some weights or data, as a hash; None when nothing is there (yet).

    Args:
        place: a file: its bytes, and the files beside it that loaders of weights look for. A folder: every file below
            it whose name does not begin with a dot. A hub id: the commit that this machine's cache has.

    Raises:
        InputError: a file cannot be read.
    """
    path = Path(place).expanduser()
    if path.is_file() and not path.name.endswith(".index.json"):  # an index names files beside it as it likes
        beside = {name: known_hash(path.with_name(name)) for name in BESIDE if path.with_name(name).is_file()}
        return key_of(file=known_hash(path), beside=beside)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return key_of(files={name: known_hash(folder / name) for name in sorted(_files_below(folder))})
    return _cached_commit(str(place))


def _files_below(folder: Path) -> Iterator[str]:
    for below, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and (Path(below) / name).is_file():
                yield (Path(below) / name).relative_to(folder).as_posix()


def _cached_commit(hub_id: str) -> str | None:
    """The commit of a model's main branch that the cache of the hub's client holds."""
    if hub_id.count("/") > 1 or hub_id.startswith((".", "/", "~")):
        return None
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else None


# Code


def code_files(path: Path, root: Path | None = None) -> list[Path]:
    """A Python file; the files that it imports and that lie below `root`; and files that its text names.

    What is imported from elsewhere is a library: its version is for whoever makes the key. A file is named by a string
    such as "world.py", or by strings joined with `/`, and lies beside the one that names it, or at that very path.

    Args:
        root: by default the file's folder.
    """
    root = (root or path.parent).resolve()
    files: set[Path] = set()
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file in files:
            continue
        files.add(file)
        if file.suffix == ".py":
            waiting += sorted(_reached_from(file, root))
    return sorted(files)


def code_hash(path: Path, root: Path | None = None) -> str:
    """SHA-256 over the names and bytes of `code_files`.

    Raises:
        InputError: a file cannot be read.
    """
    return key_of(files=[(file.name, known_hash(file)) for file in code_files(path, root)])


def _reached_from(file: Path, root: Path) -> set[Path]:
    try:
        imports, strings = _spelled_in(file, known_hash(file))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return set()  # it cannot be run either
    modules = (_modules(dotted, level, file, root) for dotted, level in imports)
    return set().union(*modules, *(_named(string, file) for string in strings))


@functools.lru_cache(maxsize=10_000)
def _spelled_in(file: Path, _content_hash: str) -> tuple[set[tuple[str, int]], set[str]]:
    """The modules that a Python file imports, by dotted name and level, and the strings in it that may name a file."""
    imports, strings = set(), set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            imports |= {(alias.name, 0) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imports.add((module, node.level))
            imports |= {(f"{module}.{alias.name}".lstrip("."), node.level) for alias in node.names}
        elif (string := _joined(node)) is not None:
            strings.add(string)
    return imports, strings


def _modules(dotted: str, level: int, file: Path, root: Path) -> set[Path]:
    """The files of a module by its dotted name, as far as they lie below `root`."""
    # Thousands of names that mostly lie elsewhere: strings, since making a Path takes longer than asking for the file
    starts = [file.parents[level - 1]] if level else [file.parent, *root.parents]
    places = [os.path.join(start, *dotted.split(".")) if dotted else str(start) for start in starts]
    options = [option for place in places for option in (f"{place}.py", os.path.join(place, "__init__.py"))]
    found = [Path(option).resolve() for option in options if os.path.isfile(option)]
    return {path for path in found if path.is_relative_to(root)}


def _joined(node: ast.AST) -> str | None:
    """The string of a constant, or the strings at the end of `a / "b" / "c"`, joined."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        right = _joined(node.right)
        left = _joined(node.left)
        return right if left is None or right is None else f"{left}/{right}"
    return None


def _named(name: str, file: Path) -> set[Path]:
    if not 0 < len(name) < 1000 or "\0" in name or "\n" in name:
        return set()
    try:
        places = [os.path.join(file.parent, name), os.path.expanduser(name)]
        return {Path(place).resolve() for place in places if os.path.isfile(place)}
    except (OSError, RuntimeError, ValueError):
        return set()
