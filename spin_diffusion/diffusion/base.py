"""What a run starts from, and what whoever goes on with the run must load again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Base:
    """A base checkpoint. All four are its identity: with another variant, or another VAE, it is another base.

    Attributes:
        name: local folder or hub id.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as fp16.
        vae: local folder or hub id of a VAE in place of the checkpoint's own.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None

    @classmethod
    def of(cls, base: "Base | str") -> "Base":
        """Itself; or the base of this name without options."""
        return base if isinstance(base, Base) else cls(base)

    @classmethod
    def of_settings(cls, flat: Mapping[str, Any]) -> "Base":
        """The base that a run's settings name, by their flags."""
        vae = flat.get("pretrained_vae_model_name_or_path")
        return cls(str(flat.get("pretrained_model_name_or_path")), flat.get("revision"), flat.get("variant"), vae)

    def as_dict(self) -> dict[str, str | None]:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        """The name, and in brackets what it is loaded with."""
        given = {"revision": self.revision, "variant": self.variant, "VAE": self.vae}
        options = ", ".join(f"{option} {value}" for option, value in given.items() if value is not None)
        return f"{self.name} ({options})" if options else self.name


def python_arguments(name: str, **options: str | bool | None) -> str:
    """The arguments of a call in Python that loads something by its name; options that are None or False are left
    out."""
    given = [f"{option}={_quoted(value)}" for option, value in options.items() if value]
    return ", ".join([_quoted(name), *given])


def _quoted(value: str | bool) -> str:
    """As Python reads it: in the quotes of formatted code where nothing in it needs an escape."""
    if isinstance(value, bool):
        return str(value)
    return f'"{value}"' if value.isprintable() and '"' not in value and "\\" not in value else ascii(value)
