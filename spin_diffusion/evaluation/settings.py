"""The settings of a run of any kind, and what it measures after every round."""

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.round_settings import RoundSettings, objectives_of, source_of
from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class AnyEvaluationSettings(Settings):
    """What is measured after every round."""

    eval_every_round: bool = True
    """Evaluate after every round; otherwise the base and the last round only."""
    promote_if: Literal["always", "not_regressed", "improved"] = "always"
    """Promote a round's player always; when no truth, held-out or alignment score fell against its opponent
    (not_regressed); or only when it is improved. Otherwise the round is rejected and its opponent plays on."""


@dataclass(frozen=True)
class EvaluationSettings(AnyEvaluationSettings):
    """What is measured after every round."""

    preview_every: int | None = setting(None, minimum=0, harmless=True)
    """Every so many optimizer steps, from step 0 on, the player draws four pictures, of validation prompts or held-out
    captions, as the opponent draws: in the round's folder, in the trackers and on the page. 0 = never. Default: at step
    0, after a 16th, a quarter and the whole of a round, which is 16 pictures, where there are such prompts."""
    validation_prompts: str | None = setting(None, first=True)
    """File of held-out prompts (text, JSON lines, TSV, CSV, parquet), or the name of a prompt set. None = no
    evaluation."""
    max_validation_prompts: int | None = setting(None, minimum=1)
    """Only the first ones."""
    num_validation_images: int = setting(1, minimum=1)
    """Images of each prompt, each with a seed of its own that all models share. Diversity needs 2 or more."""
    validation_guidance_scales: list[float] | None = setting(None, minimum=0)
    """Guidance scales to evaluate at; default: --guidance_scale. All else is as the opponent draws."""
    scorers: list[str] | None = None
    """NAME[=PATH] of scorers, or paths of .py files with a `load(device)`."""
    distribution_features: str | None = None
    """NAME[=PATH] of an embedding (dinov2, clip_l14), or path of a .py file: compare the distribution of each model's
    images with that of the real ones (those held out, if there are 100, else those trained on). It takes 100 images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.promote_if == "always":
            return
        if not self.validation_prompts or not self.scorers:
            raise InputError(f"--promote_if {self.promote_if} needs --validation_prompts and --scorers")
        if not self.eval_every_round:
            raise InputError(f"--promote_if {self.promote_if} needs --eval_every_round true")


def check_selection(config: "RunConfig", holds_out: bool) -> None:
    """InputError where there is nothing to select a step by."""
    every, by = config.training.select_every, config.training.select_by
    if every is None:
        if by != "gap":
            raise InputError(f"--select_by {by} needs --select_every, the steps from one judgement to the next")
    elif not holds_out:
        raise InputError(f"--select_every {every} judges the player on held-out samples: give --num_held_out")
    elif by == "gap" and config.needs_losers:
        raise InputError(
            "--select_by gap needs generated samples that are not trained on, and the data set's own worse ones, of "
            "--objective dpo say, all are: leave --select_every out"
        )


class RunConfig:
    """All settings of a run, by section; a kind of run is a dataclass that adds sections of its own."""

    rounds: RoundSettings
    training: TrainSettings
    evaluation: AnyEvaluationSettings
    run: RunSettings

    name_the_base: ClassVar[tuple[str, ...]] = ()
    """Settings that only name the base, which a begun run knows by the hashes of all its parts."""

    def flat(self) -> dict[str, object]:
        """Every setting by its flag."""
        return {key: value for section in vars(self).values() for key, value in asdict(section).items()}

    @property
    def rivals(self) -> list[str]:
        """The objectives that the run is compared with, without its own."""
        return [name for name in self.run.compare_with or [] if [name] != objectives_of(self.rounds)]

    @property
    def needs_losers(self) -> bool:
        """Whether some objective takes its generated side from the data set."""
        return "data" in {source_of(self.rounds, name) for name in (*objectives_of(self.rounds), *self.rivals)}

    @property
    def titles(self) -> str:
        """The objectives of the run, as its header and its card call them."""
        return ", ".join(title_of(name) for name in objectives_of(self.rounds))
