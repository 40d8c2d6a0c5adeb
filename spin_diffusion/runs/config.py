"""What the settings of every kind of run have."""

from typing import Any, Protocol, runtime_checkable

from spin_diffusion.evaluation.settings import PromoteIf
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.round_settings import RoundSettings, objectives_of, source_of
from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.selfplay.train_settings import TrainSettings


@runtime_checkable
class EvaluatesRounds(Protocol):
    """What every kind of run sets of its evaluations."""

    @property
    def eval_every_round(self) -> bool:
        """Whether every round is evaluated, and not the base and the last one alone."""
        ...

    @property
    def promote_if(self) -> PromoteIf:
        """By which outcome of its evaluation a round's player is promoted."""
        ...


@runtime_checkable
class AnyConfig(Protocol):
    """The settings of a run of any kind."""

    @property
    def evaluation(self) -> EvaluatesRounds:
        """What is measured after the rounds."""
        ...

    @property
    def rounds(self) -> RoundSettings:
        """The game that is played."""
        ...

    @property
    def training(self) -> TrainSettings:
        """How a round is trained."""
        ...

    @property
    def run(self) -> RunSettings:
        """Where the run lies and what it is compared with."""
        ...

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag."""
        ...


def rivals(config: AnyConfig) -> list[str]:
    """The objectives that the run is compared with, without its own."""
    return [name for name in config.run.compare_with or [] if [name] != objectives_of(config.rounds)]


def needs_losers(config: AnyConfig) -> bool:
    """Whether some objective takes its generated side from the data set."""
    return "data" in {source_of(config.rounds, name) for name in (*objectives_of(config.rounds), *rivals(config))}


def titles_of(config: AnyConfig) -> str:
    """The objectives of a run, as its header and its card call them."""
    return ", ".join(title_of(name) for name in objectives_of(config.rounds))
