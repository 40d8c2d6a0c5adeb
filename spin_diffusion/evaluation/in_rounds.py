"""Evaluation inside a run: base, rounds and rivals draw the same prompts with the same seeds and are judged alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.modalities import modality_of
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.results import EvaluatedModel, conclude
from spin_diffusion.evaluation.scoring import ScoredFolder, is_scored, score_pictures
from spin_diffusion.evaluation.settings import EvaluationSettings, PromoteIf
from spin_diffusion.samples.pictures import Draw, are_drawn, draw_pictures
from spin_diffusion.samples.requests import Request
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress


@dataclass
class RunEvaluation:
    """The evaluations of one run: `OUTPUT_DIR/base`, `round-1/evaluation`, ... and the page that compares them."""

    settings: EvaluationSettings
    prompts: PromptSet
    output_dir: Path
    accelerator: Accelerator
    progress: Progress
    protocol: dict[str, Any]
    headline_scale: float

    def evaluate(self, model: EvaluatedModel, draw: Draw, drawn_by: str) -> None:
        """Draw and score the pictures of a model; what is there already stays.

        Args:
            drawn_by: hash of the model, with all of its parts.
        """
        draw_pictures(
            self.wanted, model.folder.pictures, self.protocol, draw, self.accelerator,
            lambda scale, total: self.progress.phase(f"{model.name}: draw at guidance {scale:g}", total), drawn_by,
        )  # fmt: skip
        self.score(model)

    @property
    def wanted(self) -> list[Request]:
        """What every model is asked to draw."""
        return self.prompts.requests(self.settings.num_validation_images, self.protocol["seed"])

    def is_drawn(self, model: EvaluatedModel, drawn_by: str) -> bool:
        """Whether all pictures of a model are there, as it drew them."""
        return are_drawn(self.wanted, model.folder.pictures, self.protocol, drawn_by)

    def is_scored(self, model: EvaluatedModel) -> bool:
        """Whether all pictures of a model have the scores of the scorers as they are now."""
        return is_scored(model.folder, self.protocol["guidance_scales"], self.settings.scorers or [])

    def score(self, model: EvaluatedModel) -> None:
        """Score the pictures of a model that have no score, or one by another scorer."""
        score_pictures(
            {model.name: model.folder}, self.protocol["guidance_scales"], self.settings.scorers or [],
            self.accelerator, lambda scorer, total: self.progress.phase(f"{model.name}: score by {scorer}", total),
        )  # fmt: skip

    def conclude(
        self, root: Path, models: list[EvaluatedModel], title: str, **more: Any
    ) -> tuple[dict[str, Any], list[Comparison]]:
        """The results of these models, the first of which is the baseline, written below `root`; main process only.

        Args:
            more: of `results.conclude`: training_captions, curves, measures, events, ledger, in_domain.
        """
        return conclude(
            root, models, self.protocol, self.settings.scorers or [], title=title,
            headline_scale=self.headline_scale, **more,
        )  # fmt: skip


def run_evaluation(
    settings: EvaluationSettings,
    prompts: PromptSet,
    output_dir: Path,
    accelerator: Accelerator,
    progress: Progress,
    *,
    seed: int,
    sampler: str,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int,
    eta: float,
    precision: str,
) -> RunEvaluation:
    """The evaluation of a run by its settings; unset ones are those of the opponent's samples."""
    scales = settings.validation_guidance_scales or [guidance_scale]
    protocol = protocol_of(
        prompts,
        images_per_prompt=settings.num_validation_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=settings.validation_num_inference_steps or num_inference_steps,
        guidance_scales=scales,
        resolution=resolution,
        eta=eta,
        precision=precision,
    )
    headline = guidance_scale if guidance_scale in scales else scales[-1]
    return RunEvaluation(settings, prompts, output_dir, accelerator, progress, protocol, headline)


def model_of(name: str, folder: Path, role: str, round_: int | None, **more: Any) -> EvaluatedModel:
    """A model whose pictures and scores lie in `folder`."""
    return EvaluatedModel(name, role, ScoredFolder(folder / "images", folder / "scores"), round_, **more)


def metrics_of(results: dict[str, Any], model: str) -> dict[str, Any]:
    """Means, differences and verdicts of one model, as numbers for trackers and for the round's record."""
    at_key = modality_of(results["protocol"]).at_key

    def name(entry: dict[str, Any]) -> str:
        return entry["scorer"] + at_key.format(_key(entry["guidance_scale"]))

    metrics: dict[str, Any] = {}
    for entry in results["results"]:
        if entry["model"] == model and entry["aggregate"] == "mean":
            metrics[name(entry)] = entry["mean"]
    for entry in results["comparisons"]:
        if entry["model"] == model:
            metrics[f"{name(entry)}/difference"] = entry["difference"]
            metrics[f"{name(entry)}/win_rate"] = entry["win_rate"]
    return metrics


def _key(scale: float | None) -> str:
    return "given" if scale is None else f"{scale:g}"


def promotion(results: dict[str, Any], promote_if: PromoteIf) -> tuple[bool, str]:
    """Whether a player is promoted by its comparison with its opponent, and why.

    It counts at every guidance scale: one where the player fell is enough to reject it; to be improved it must be at
    one at least.
    """
    if promote_if == "always":
        return True, ""
    lacking = [scorer["name"] for scorer in results["scorers"] if scorer["state"] != "run"]
    if lacking:
        raise InputError(f"--promote_if {promote_if} cannot be decided: {', '.join(lacking)} could not be run")
    roles = {scorer["name"]: scorer["role"] for scorer in results["scorers"]}
    at = modality_of(results["protocol"]).at
    fell = [
        f"{entry['scorer']} fell by {-entry['difference']:.3g}" + at.format(f"guidance {_key(entry['guidance_scale'])}")
        for entry in results["comparisons"]
        if entry["verdict"] == "regressed" and roles[entry["scorer"]] in ("truth", "held-out", "alignment")
    ]
    if fell:
        return False, "; ".join(fell)
    if promote_if == "improved" and not any(v["verdict"] == "improved" for v in results["verdicts"]):
        return False, "; ".join(dict.fromkeys(v["reason"] for v in results["verdicts"]))
    return True, ""
