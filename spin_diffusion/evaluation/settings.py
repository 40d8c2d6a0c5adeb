"""What a run measures after every round."""

from dataclasses import dataclass
from typing import Literal

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import Settings, setting

PromoteIf = Literal["always", "not_regressed", "improved"]


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What is measured after every round."""

    validation_prompts: str | None = setting(None, first=True)
    """File of held-out prompts (text, JSON lines, TSV, CSV, parquet), or the name of a prompt set. None = no
    evaluation."""
    max_validation_prompts: int | None = setting(None, minimum=1)
    """Only the first ones."""
    num_validation_images: int = setting(1, minimum=1)
    """Images per prompt, each with a seed of its own that all models share. Diversity needs 2 or more."""
    validation_guidance_scales: list[float] | None = None
    """Guidance scales to evaluate at; default: --guidance_scale."""
    validation_num_inference_steps: int | None = setting(None, minimum=1)
    """Denoising steps per image; default: --num_inference_steps."""
    scorers: list[str] | None = None
    """NAME[=PATH] of scorers, or paths of .py files with a `load(device)`."""
    eval_every_round: bool = True
    """Evaluate after every round; otherwise the base and the last round only."""
    promote_if: PromoteIf = "always"
    """Promote a round's player always; when no truth, held-out or alignment score fell against its opponent
    (not_regressed); or only when it is improved. Otherwise the round is rejected and its opponent plays on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.promote_if == "always":
            return
        if not self.validation_prompts or not self.scorers:
            raise InputError(f"--promote_if {self.promote_if} needs --validation_prompts and --scorers")
        if not self.eval_every_round:
            raise InputError(f"--promote_if {self.promote_if} needs --eval_every_round true")
