"""From settings to cells: a cell is one training run, named by everything that it is trained with.

Two budgets that come to the same training settings share one cell, and a changed setting is another cell.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin_diffusion.comparing.settings import METHOD_KEYS, WORLD_KEYS, CompareSettings
from spin_diffusion.diffusion.base import Base, load_checkpoint, parts_hash
from spin_diffusion.diffusion.config import Config
from spin_diffusion.runs.start import quiet_libraries
from spin_diffusion.samples.sampling import Sampling, Sweep, precision_of
from spin_diffusion.selfplay.train_settings import TrainSettings, pairs_per_step
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import code_hash, key_of, place_hash
from spin_diffusion.store.parsing import build, sections_of, settings_of, types_of
from spin_diffusion.store.settings import harmless
from spin_diffusion.store.weights import config_of

_HARMLESS = harmless(sections_of(Config).values())
_SPLIT = ("train_batch_size", "gradient_accumulation_steps")

BASE = "base"

# The comparison scores by itself, and asks for nothing else of a run
QUIET: dict[str, object] = {
    "validation_prompts": None,
    "scorers": None,
    "validation_guidance_scales": None,
    "promote_if": "always",
    "compare_with": None,
    "report_to": "none",
    "push_to_hub": False,
}
_PLACES = ("dataset_name", "train_data_dir")
_SCORERS = ("candidates", "curation")
"""Settings with keys, one of which is a scorer."""


def _content(place: str | None) -> str | None:
    """What lies at a setting's path; of a scorer what is behind its NAME[=PATH]; a name that is no path stays."""
    if place is None:
        return None
    places = [Path(part) for part in str(place).split("=", 1)]
    found = [code_hash(path) if path.suffix == ".py" and path.is_file() else place_hash(path) for path in places]
    return "=".join(content or str(path) for content, path in zip(found, places, strict=True))


@functools.lru_cache
def _weights(base: Base, content: tuple[str | None, ...]) -> str:
    """What a base is known by, in a folder as in a single file: its weights and configurations.

    Args:
        content: what lies in its places now.
    """
    quiet_libraries()
    pipeline = load_checkpoint(base)[1]
    return key_of(unet=[weights_hash(pipeline.unet), config_of(pipeline.unet)], parts=parts_hash(pipeline))


@dataclass(frozen=True)
class Cell:
    """One training run; or the base alone, which is not trained."""

    world: str
    method: str
    """Its name, or "base"."""
    training: Mapping[str, Any]
    """All training settings that are not the defaults, without output_dir."""

    @property
    def seed(self) -> int:
        """The seed of the training run."""
        return self.training["seed"]

    @property
    def rounds(self) -> int:
        """0 = the base."""
        return 0 if self.method == BASE else self.training["rounds"]

    @property
    def key(self) -> str:
        """Hash of what it is trained with."""
        kept = {key: value for key, value in self.training.items() if key not in _HARMLESS or key == "rounds"}
        if self.method == BASE:
            kept = {key: kept.get(key) for key in ("resolution", "sampler", "seed")}
        else:  # how a step's pairs are split is harmless, their number is not
            given = {key: self.training[key] for key in _SPLIT if key in self.training}
            kept["pairs_per_step"] = pairs_per_step(TrainSettings(**given), 1)
        base = Base.of_settings(self.training)
        kept = {key: value for key, value in kept.items() if key not in Config.name_the_base}
        kept["base"] = _weights(base, tuple(place and place_hash(place) for place in base.places))
        # Data or a scorer may be replaced under its name
        kept |= {key: _content(kept[key]) for key in _PLACES if key in kept}
        kept |= {key: kept[key] | {"scorer": _content(kept[key].get("scorer"))} for key in _SCORERS if kept.get(key)}
        return key_of(**kept)

    @property
    def folder(self) -> str:
        """Below the comparison's cells/."""
        if self.method == BASE:
            return f"{self.world}/{BASE}-seed{self.seed}-{self.key[:8]}"
        steps, rate = self.training["max_train_steps"], self.training["learning_rate"]
        return f"{self.world}/{self.method}-{self.rounds}x{steps}-lr{rate:g}-seed{self.seed}-{self.key[:8]}"


@dataclass(frozen=True)
class Plan:
    """The training settings of every world and method, checked."""

    settings: CompareSettings
    shared: Mapping[str, Any]

    def worlds(self) -> list[str]:
        """In the file's order."""
        asked = self.settings.only_worlds
        return [name for name in self.settings.worlds or {} if asked is None or name in asked]

    def total_steps(self, world: str) -> int:
        """Optimizer steps of a run."""
        return self.settings.world(world).get("total_steps") or self.settings.total_steps

    def rates(self, world: str, method: str) -> list[float]:
        """The grid of a method in a world, from low to high: its own, or the world's, or everybody's."""
        of_method = self.settings.method(method).get("learning_rates")
        of_world = self.settings.world(world).get("learning_rates")
        return sorted(of_method or of_world or self.settings.learning_rates or [])

    def training_of(self, world: str, method: str) -> Mapping[str, Any]:
        """The file's settings under the shared ones under the world's under the method's."""
        given = {key: value for key, value in self.settings.world(world).items() if key not in WORLD_KEYS}
        if method != BASE:
            own = self.settings.method(method)
            given |= {key: value for key, value in own.items() if key not in METHOD_KEYS}
        return {**self.shared, **given, **QUIET}

    def cell(self, world: str, method: str, rate: float, seed: int, steps_per_round: int) -> Cell:
        """One training run."""
        own = {"learning_rate": rate, "max_train_steps": steps_per_round, "num_train_epochs": None, "seed": seed}
        return Cell(world, method, {**self.training_of(world, method), **own})

    def base(self, world: str, seed: int) -> Cell:
        """The base, drawn with the seeds of the runs of this seed."""
        return Cell(world, BASE, {**self.training_of(world, BASE), "seed": seed})

    def steps_per_round(self, world: str, method: str) -> int:
        """With total_steps over all rounds."""
        rounds = parsed(self.training_of(world, method)).rounds.rounds
        total = self.total_steps(world)
        if total % rounds:
            raise InputError(
                f"worlds: {world}: methods: {method}: total_steps {total} cannot be shared out evenly over {rounds} "
                f"rounds: give a multiple of {rounds}"
            )
        return total // rounds

    def usual(self, world: str) -> Sampling:
        """How people would draw: by the training settings of the world, whatever a method's are."""
        config, asked = parsed(self.training_of(world, BASE)), self.settings
        drawn = config.sampling.record(config.images.resolution, precision_of("no"))
        guidance = drawn.guidance_scale if asked.usual_guidance is None else asked.usual_guidance
        return replace(
            drawn,
            guidance_scale=guidance,
            num_inference_steps=asked.num_inference_steps or drawn.num_inference_steps,
        )

    def unguided(self, world: str) -> Sampling:
        """As usual, without guidance."""
        return replace(self.usual(world), guidance_scale=1.0)

    def guided(self, world: str) -> list[Sampling]:
        """As usual at every guidance scale of the sweep, with 1 and the usual one among them, from low to high."""
        scales = Sweep(guidance_scale=self.settings.sweep.guidance_scale)
        return sorted({self.unguided(world), *scales.around(self.usual(world))})

    def free(self, world: str) -> list[Sampling]:
        """All settings from which the best is chosen."""
        return sorted({*self.guided(world), *self.settings.sweep.around(self.usual(world))})


def about(given: Mapping[str, Any]) -> str:
    """What the file says of a world or a method."""
    found = given.get("about") or ""
    if isinstance(found, dict):  # the parser reads a text with a colon as names and values
        found = "; ".join(f"{key}: {value}" for key, value in found.items())
    return str(found)


def make_plan(settings: CompareSettings) -> Plan:
    """The plan; every setting of every method in every world is parsed once.

    Raises:
        InputError: a file that is not there, a setting that is unknown or out of range, with its world and method.
    """
    path = Path(str(settings.training_config))
    if not path.exists():
        raise InputError(f"--training_config {path} does not exist: give a YAML file of training settings")
    shared = settings_of(path, types_of(Config))
    plan = Plan(settings, shared | (settings.training or {}))
    for world in plan.worlds():
        _check(f"worlds: {world}", plan.training_of(world, BASE))
        base = Path(str(plan.training_of(world, BASE)["pretrained_model_name_or_path"]))
        if len(base.parts) > 2 and not base.is_file() and not (base / "model_index.json").is_file():
            raise InputError(f"worlds: {world}: {base} is not a pipeline's folder (it has no model_index.json)")
        if plan.total_steps(world) < 1:
            raise InputError(f"worlds: {world}: total_steps {plan.total_steps(world)} must be at least 1")
        for method in settings.methods_of(world):
            _check(f"worlds: {world}: methods: {method}", plan.training_of(world, method))
            plan.steps_per_round(world, method)
            if min(plan.rates(world, method)) <= 0:
                raise InputError(f"methods: {method}: learning_rates {plan.rates(world, method)} must be above 0")
    return plan


def _check(where: str, training: Mapping[str, Any]) -> None:
    try:
        parsed(training)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def parsed(training: Mapping[str, Any]) -> Config:
    """Training settings as the training command has them."""
    return _parsed(json.dumps(dict(training)))


@functools.lru_cache(maxsize=1024)  # a plan asks for the same settings again and again
def _parsed(training: str) -> Config:
    return build(Config, json.loads(training))
