"""What scorers of images and judges of answers share: what they say of themselves, and how NAME[=PATH] finds them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from spin_diffusion.evaluation.records import Role
from spin_diffusion.store.input_error import InputError, file_name
from spin_diffusion.store.keys import code_hash, key_of, place_hash
from spin_diffusion.store.named import load_module, load_named, raised

_T = TypeVar("_T")


@dataclass(frozen=True)
class About:
    """What a reader of a score must know."""

    title: str
    """As papers call it."""
    scale: str
    """Formula, unit and usual values."""
    role: Role = "held-out"
    """All but "drift" are better when higher."""
    checkpoint: str | None = None
    """Hub id that is loaded when no path is given."""
    preprocessing: str = ""
    """How pixels reach the model."""
    text: str = ""
    """How prompts and answers reach the model, and how much of them it reads."""
    licence: str = ""
    """The licence of the weights."""
    citation: str = ""
    """arXiv id or address."""

    def place(self, path: str | None) -> str:
        """Where the weights are: at `path`, or without one at `checkpoint`, which a score without weights has not."""
        place = path or self.checkpoint
        assert place is not None, f"{self.title} has no checkpoint"
        return place


@dataclass(eq=False)
class Part:
    """A scorer or judge, loaded."""

    kind: ClassVar[str]
    """What it is, for errors."""
    name: str
    about: About
    score: Callable[..., Any]
    source: str
    """Where its weights came from; empty = it has none."""
    checkpoint: dict[str, str] = field(default_factory=dict)
    """What was loaded: file -> SHA-256, say."""

    @property
    def who(self) -> str:
        """Its kind and name, for errors."""
        return f"{self.kind} {self.name}"

    def truncated(self, samples: Sequence[Any]) -> list[bool]:
        """Which prompts, or answers with their prompts, are longer than what it reads."""
        truncated = getattr(self.score, "truncated", None)
        return guarded(self.who, truncated, samples) if truncated else [False] * len(samples)


_Part = TypeVar("_Part", bound=Part)


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Name of the score, module to load, and where its weights are, of `NAME[=PATH]` or `FILE.py[=PATH]`."""
    module, _, path = spec.partition("=")
    return Path(module).stem if module.endswith(".py") else module, module, path or None


def about_part(package: str, spec: str) -> About:
    """What it says of itself, without loading its weights; InputError when `package` has no such module."""
    name, module, _ = parse_spec(spec)
    return getattr(load_module(package, module), "ABOUT", About(title=name, scale="as its file says"))


def describe(package: str, spec: str) -> dict[str, object]:
    """The entry for results.json, as far as it is known without its weights."""
    name, _, path = parse_spec(spec)
    entry = asdict(about_part(package, spec))
    checkpoint = entry.pop("checkpoint")
    return {"name": name, **entry, "source": path or checkpoint or "", "checkpoint": {}}


def part_key(package: str, spec: str) -> str:
    """Hash of all that decides what a scorer or judge says of a sample: of its code, with what that imports and names
    beside it, and of its weights, wherever they lie. Devices and versions of libraries, which change the last digits,
    are not in it, but for packages that it names in `PACKAGES`.

    Weights on the hub are those that this machine's cache has: after a scorer was loaded they may be others.

    Raises:
        InputError: there is no such module, or a file cannot be read.
    """
    _, name, path = parse_spec(spec)
    module = load_module(package, name)
    file, is_own = Path(str(module.__file__)), not name.endswith(".py")
    place = path or about_part(package, spec).checkpoint
    places = module.places(place) if hasattr(module, "places") else [place] if place else []
    return key_of(
        code=code_hash(file, Path(__file__).parent if is_own else None),
        version=version("spin-diffusion"),
        packages={name: _version(name) for name in getattr(module, "PACKAGES", ())},
        # What is no file, folder or repository may be an option: its text decides
        weights=[place_hash(place) or place for place in [*places, *getattr(module, "BESIDE", ())]],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load_part(part: type[_Part], package: str, spec: str, device: str) -> _Part:
    """What `load(device, path)` of the module returns; a file outside of `package` may have `load(device)` alone.

    Raises:
        InputError: there is no such module, or its weights cannot be used.
    """
    name, module, path = parse_spec(spec)
    load = load_named(package, module, "load")
    call = load(device, path) if path or not module.endswith(".py") else load(device)
    if not callable(call):
        raise InputError(f"{part.kind} {name}: load({device!r}) must return a function, got {type(call).__name__}")
    about = about_part(package, spec)
    return part(name, about, call, path or about.checkpoint or "", getattr(call, "checkpoint", {}))


def guarded(who: str, run: Callable[..., _T], *arguments: Any) -> _T:
    """`run(*arguments)` of a scorer or judge, which may be anybody's code: what it raises is why it cannot run.

    Raises:
        InputError: it raised; the type, the file and the line are named.
    """
    try:
        return run(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the latter would end the whole command, with whatever code it says
        raise InputError(f"{who} failed: {raised(error)}") from error


def check_specs(package: str, specs: Sequence[str], flag: str = "--scorers") -> None:
    """InputError when two specs of a flag have one name, or one does not exist; no weights are read."""
    names = [parse_spec(spec)[0] for spec in specs]
    for name in names:
        file_name(name, flag)
        if names.count(name) > 1:
            raise InputError(f"{flag} has {name!r} twice: one result could not be told from the other")
    for spec in specs:
        load_named(package, parse_spec(spec)[1], "load")


def check_finite(who: str, scores: Sequence[float], prompts: Sequence[str]) -> None:
    """InputError that names the first prompt whose score is not finite."""
    for score, prompt in zip(scores, prompts, strict=True):
        if not math.isfinite(score):
            raise InputError(f"{who} returned {score} for the prompt {shortened(prompt)}")


def shortened(prompt: str, length: int = 80) -> str:
    """The prompt in quotes, in one line of an error."""
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
