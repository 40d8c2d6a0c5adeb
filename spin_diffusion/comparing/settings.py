"""What is compared: read from YAML and the command line, checked before anything is loaded or written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spin_diffusion.samples.sampling import Sweep
from spin_diffusion.store.input_error import InputError, nearest
from spin_diffusion.store.parsing import parse
from spin_diffusion.store.settings import Settings, setting

Budget = Literal["steps", "compute"]
Mode = Literal["guidance 1", "usual", "best"]
MODES: tuple[Mode, ...] = ("guidance 1", "usual", "best")
"""How pictures are drawn that are reported: without guidance, as usual, at each method's best free settings."""
SetName = Literal["validation", "test"]
"""Sets of prompts: the first ones choose, the others report."""
BUDGETS: tuple[Budget, ...] = ("steps", "compute")

WORLD_KEYS = ("about", "methods", "total_steps", "learning_rates")
"""Keys of a world that are not training settings."""
METHOD_KEYS = ("about", "learning_rates")
"""Keys of a method that are not training settings."""
OWN = {
    "learning_rate": "learning_rates",
    "max_train_steps": "total_steps",
    "num_train_epochs": "total_steps",
    "seed": "seeds",
    "output_dir": "--output_dir",
}
"""Training settings that the comparison gives each run -> what to give instead."""


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Worlds, methods, and how each method gets its learning rate, its guidance and its intervals."""

    training_config: str | None = None
    """YAML file of training settings that all runs share, as for training/train_spin_sdxl.py."""
    training: dict[str, Any] | None = None
    """Training settings over those of the file, for all runs."""
    worlds: dict[str, dict[str, Any]] | None = None
    """Name -> training settings of a base and its data; also `about`, `methods` (only these), `total_steps` and
    `learning_rates`."""
    methods: dict[str, dict[str, Any]] | None = None
    """Name -> training settings of a method; also `about` and `learning_rates` (its own grid)."""
    only_worlds: list[str] | None = None
    """Run and report these worlds alone."""
    only_methods: list[str] | None = None
    """Run and report these methods alone; the two references always run."""
    budget: Literal["steps", "compute", "both"] = "both"
    """steps = the same optimizer steps for all; compute = the same FLOPs, drawing the opponent's images included."""
    total_steps: int = setting(120, minimum=1)
    """Optimizer steps of a run, over all of its rounds."""
    reference: str = "sft"
    """Method that the others are compared with."""
    compute_reference: str = "spin"
    """Method whose FLOPs at total_steps are the budget of equal compute."""
    learning_rates: list[float] | None = setting(None, above=0)
    """Grid from which each method gets the rate that is best on validation prompts, with the first seed."""
    widen_rates: int = setting(2, minimum=0)
    """Where a method's best rate is the lowest or the highest of its grid, try the next one beyond, this many times."""
    seeds: list[int] | None = setting(None, minimum=0, below=2**32)
    """Seeds of training and pictures; the first one also chooses rates and settings of the sampler. Default: 0, 1,
    2."""
    prompts: str | None = None
    """File of held-out prompts or name of a set: the first ones choose, the next ones report."""
    num_validation_prompts: int = setting(40, minimum=2)
    """Prompts that choose rates, settings of the sampler and rounds."""
    num_test_prompts: int = setting(80, minimum=2)
    """Prompts that are reported."""
    images_per_prompt: int = setting(2, minimum=1)
    """Images of each test prompt and seed; 2 or more show diversity. Validation prompts get one."""
    sweep: Sweep = Sweep()
    """Settings of the sampler from which the base and each method get their best, beside the usual ones and guidance 1:
    "{guidance_scale: [1, 2, 3], num_inference_steps: [10, 40], prediction_scale: [1, 1.04]}". A combination costs a
    drawing of the validation prompts by the base and every method; rates are chosen over guidance alone. With `by: fd`
    the best are those whose pictures of validation prompts are nearest to real ones in --distribution_features."""
    usual_guidance: float | None = setting(None, minimum=0)
    """Scale that people would use; default: the training settings' guidance_scale."""
    num_inference_steps: int | None = setting(None, minimum=1)
    """Denoising steps of the pictures; default: the training settings'."""
    every_round: bool = True
    """Score every round on validation prompts at the usual guidance, and the best one on test prompts too."""
    test_rounds: list[int] | None = setting(None, minimum=1)
    """Rounds that are scored on test prompts too, as each method's last round is: a table round by round, against the
    reference after as many rounds if it has as many, else after its last."""
    scorers: list[str] | None = None
    """NAME[=PATH] of scorers; the first one chooses."""
    distribution_features: str | None = None
    """NAME[=PATH] of an embedding (dinov2, clip_l14), or path of a .py file: compare the distribution of each method's
    test pictures with that of the real ones of its world. It takes 100 pictures of each seed."""
    jobs: int = setting(1, minimum=0)
    """Processes, each on one GPU, which they take in turns, or with one thread on a CPU. 0 = in this process."""
    retry_failed: bool = False
    """Run again what diverged or was refused; what was killed is always run again."""
    max_hours: float | None = setting(None, above=0)
    """Start no run after this time; the same command goes on."""
    output_dir: str = "runs/comparison"
    """Everything is written here; the same command again resumes."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("training_config", "worlds", "methods", "learning_rates", "prompts", "scorers"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing: give it in the --config file or on the command line")
        for name in ("learning_rates", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise InputError(f"--{name} {values} must have at least one value, and none twice")
        if self.sweep.by == "fd" and self.distribution_features is None:
            raise InputError("--sweep by fd needs the features whose distance it is: give --distribution_features")
        methods, worlds = list(self.methods or {}), list(self.worlds or {})
        for flag, names, known in (
            ("reference", [self.reference], methods),
            ("compute_reference", [self.compute_reference] if "compute" in self.budgets else [], methods),
            ("only_methods", self.only_methods or [], methods),
            ("only_worlds", self.only_worlds or [], worlds),
            *((f"worlds: {name}: methods", self.world(name).get("methods") or [], methods) for name in worlds),
        ):
            for name in names:
                if name not in known:
                    dashes = "" if ":" in flag else "--"
                    raise InputError(f"{dashes}{flag} {name}: no such name{nearest(name, known)}")
        for kind, named in (("worlds", self.worlds or {}), ("methods", self.methods or {})):
            for name, given in named.items():
                if not name.replace("-", "").replace("_", "").isalnum():
                    raise InputError(f"{kind}: {name!r}: give a name of letters, digits, - and _")
                for key in OWN:
                    if key in (given or {}):
                        raise InputError(f"{kind}: {name}: {key} is the comparison's to give: use {OWN[key]}")

    def world(self, name: str) -> Mapping[str, Any]:
        """What is given of a world."""
        return (self.worlds or {})[name] or {}

    def method(self, name: str) -> Mapping[str, Any]:
        """What is given of a method."""
        return (self.methods or {})[name] or {}

    def images_of(self, prompts: SetName) -> int:
        """Images of each prompt of a set: those that choose need one."""
        return self.images_per_prompt if prompts == "test" else 1

    @property
    def budgets(self) -> list[Budget]:
        """Those that are asked for."""
        return list(BUDGETS) if self.budget == "both" else [self.budget]

    @property
    def all_seeds(self) -> list[int]:
        """The first one chooses."""
        return self.seeds or [0, 1, 2]

    def methods_of(self, world: str) -> list[str]:
        """Names of the methods that play in a world, in the file's order; the references always do."""
        asked = self.world(world).get("methods") or list(self.methods or {})
        wanted = [name for name in asked if self.only_methods is None or name in self.only_methods]
        wanted.append(self.reference)
        if "compute" in self.budgets:
            wanted.append(self.compute_reference)
        return [name for name in self.methods or {} if name in wanted]


def parse_settings(argv: Sequence[str]) -> CompareSettings:
    """The settings on the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    lists = ("scorers", "only_worlds", "only_methods")
    return parse(CompareSettings, argv, listed=lists)
