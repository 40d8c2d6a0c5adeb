"""Parts that are found by the name of their file: a scorer, a family, a data layout. To add one, add a file."""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import code_files, code_hash, key_of


def load_named(package: str, name: str, attribute: str) -> Any:
    """The `attribute` of module `name` in `package`, or of the file `name` if that ends in ".py" (which is executed).

    Raises:
        InputError: no such module or file, it cannot be imported, or it does not define `attribute`.
    """
    module = load_module(package, name)
    if not hasattr(module, attribute):
        raise InputError(f"{module.__file__} must define `{attribute}`, see the docstring of {package}")
    return getattr(module, attribute)


def load_module(package: str, name: str) -> ModuleType:
    """Module `name` of `package`, or the file `name` if that ends in ".py" (which is executed).

    Raises:
        InputError: no such module or file, or the file cannot be imported.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    folder = importlib.import_module(package).__path__
    existing = sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))
    if name not in existing:
        nearest = difflib.get_close_matches(name, existing, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(
            f"there is no {name!r} in {package}: {hint}It has {', '.join(existing)}; the path of a .py file works too"
        )
    return importlib.import_module(f"{package}.{name}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    # Path and content are part of the module's name: two files of one name, or one named like a library, can coexist,
    # and a file that has changed is another module.
    unique_name = f"{path.stem}_{key_of(path=str(path.resolve()), code=code_hash(path))[:12]}"
    if unique_name in sys.modules:
        return sys.modules[unique_name]
    beside = {str(file) for file in code_files(path)}
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in beside]:
        del sys.modules[name]  # what the file imports may have changed, too
    spec = importlib.util.spec_from_file_location(unique_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique_name] = module  # dataclasses and pickling look their module up here
    # Python takes a compiled file for that of the source by its time, to the second, and its length: none is kept of a
    # file that may be edited
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[unique_name]
        if isinstance(error, InputError) or not isinstance(error, Exception | SystemExit):
            raise
        raise InputError(f"{path} cannot be imported: {raised(error)}") from error
    finally:
        sys.dont_write_bytecode = written
    return module


def raised(error: BaseException) -> str:
    """In one line, what was raised and where: type, file, line and message."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" at {Path(error.filename).name} line {error.lineno}"
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{where}{': ' if message else ''}{message}"
