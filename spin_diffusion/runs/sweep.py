"""evaluate.py --sweep: each model at every combination of free settings. The best one is chosen on every other prompt
and shown on the rest, so that its gain is not that of having been chosen."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from spin_diffusion.diffusion.model_sources import ModelSource
from spin_diffusion.evaluation.evaluated import EvaluatedModel, SampleFolder, read_scores, scorer_record
from spin_diffusion.evaluation.prompt_sets import PromptSet, prompts_hash
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.records import DifferenceEntry, Protocol, SweepEntry
from spin_diffusion.evaluation.scorers import about
from spin_diffusion.evaluation.scoring import score_samples
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.evaluation.statistics import paired_difference
from spin_diffusion.runs.drawer import Drawer
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.samples.drawn import draw_samples, picture_shards
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import Tell
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress

Scores = dict[str, list[float]]
"""Id of a prompt -> the scores of its pictures, all of them."""
SELECTION, HELD_OUT = "selection", "held-out"


def check_sweep(settings: EvaluateSettings, sources: Sequence[ModelSource], prompts: PromptSet) -> None:
    """InputError where a sweep has no model that draws, too few prompts, or nothing to choose by."""
    if given := [source.name for source in sources if source.kind == "images"]:
        raise InputError(f"--sweep draws with every model, and {given[0]} of --models is a folder of pictures")
    if len(prompts.rows) < 4:
        raise InputError(f"--sweep needs 4 prompts or more, 2 that choose and 2 that show, got {len(prompts.rows)}")
    spec = (settings.scorers or [])[0]
    if about(spec).role == "drift":
        raise InputError(
            f"--sweep chooses by the first of --scorers, and {parse_spec(spec)[0]} is better neither up nor down: give "
            "another one first"
        )


def halves(prompts: PromptSet) -> dict[str, PromptSet]:
    """Every other prompt: those that choose a setting, and those that show what it gains."""
    rows = {SELECTION: prompts.rows[::2], HELD_OUT: prompts.rows[1::2]}
    return {
        name: replace(prompts, name=name, rows=part, sha256=prompts_hash([row.prompt for row in part]))
        for name, part in rows.items()
    }


def sweep_models(
    settings: EvaluateSettings,
    models: Mapping[ModelSource, EvaluatedModel],
    prompts: PromptSet,
    protocol: Protocol,
    drawer: Drawer,
    accelerator: Accelerator,
    progress: Progress,
) -> list[SweepEntry]:
    """What the settings of the sweep come to for every model; on all processes the same.

    Args:
        models: the baseline first; evaluated by `protocol`, whose last guidance scale is the default's.

    Raises:
        InputError: the scorer that chooses cannot be run, or fewer than 2 prompts of a half have all of their pictures.
    """
    default = Sampling.of_protocol(protocol, float(protocol["guidance_scales"][-1] or 0))
    samplings = settings.sweep.around(default)
    parts = halves(prompts)
    passes, usual = sum(sampling.passes for sampling in samplings[1:]), default.passes
    accelerator.print(
        f"Sweep: {len(samplings)} settings of {len(models)} models on {len(parts[SELECTION].rows)} prompts, up to "
        f"{passes / usual:.3g} times the drawing of these prompts by the default ({default.in_words})"
    )
    sweeper = _Sweeper(settings, models, protocol, drawer, accelerator, progress)
    choosing = sweeper.scores(parts[SELECTION], dict.fromkeys(models, samplings))
    means = {source: _means(choosing[source]) for source in models}
    best = {source: max(samplings, key=lambda sampling: means[source][sampling]) for source in models}  # noqa: B023
    showing = sweeper.scores(parts[HELD_OUT], {source: [default, best[source]] for source in models})
    baseline = next(iter(models))
    at_best = {source: showing[source][best[source]] for source in models}
    return [
        SweepEntry(
            model=source.name,
            scorer=sweeper.scorer,
            baseline=None if source is baseline else baseline.name,
            num_selection=len(parts[SELECTION].rows),
            num_held_out=len(parts[HELD_OUT].rows),
            settings=[
                {
                    "guidance_scale": sampling.guidance_scale,
                    "num_inference_steps": sampling.num_inference_steps,
                    "prediction_scale": sampling.prediction_scale,
                    "passes": sampling.passes,
                    "mean": means[source][sampling],
                }
                for sampling in samplings
            ],
            chosen=samplings.index(best[source]),
            gain=_difference(at_best[source], showing[source][default]),
            to_baseline=None if source is baseline else _difference(at_best[source], at_best[baseline]),
        )
        for source in models
    ]


def _means(scores: Mapping[Sampling, Scores]) -> dict[Sampling, float]:
    """The mean of each setting over the prompts that all of them have."""
    ids = _shared(list(scores.values()))
    return {
        sampling: float(np.mean([np.mean(of_prompt[id_]) for id_ in ids])) for sampling, of_prompt in scores.items()
    }


def _difference(a: Scores, b: Scores) -> DifferenceEntry:
    ids = _shared([a, b])
    found = paired_difference(np.array([a[id_] for id_ in ids]), np.array([b[id_] for id_ in ids]))
    return {"difference": found.mean, "low": found.low, "high": found.high}


def _shared(scores: Sequence[Scores]) -> list[str]:
    ids = [id_ for id_ in scores[0] if all(id_ in other for other in scores)]
    if len(ids) < 2:
        raise InputError(f"--sweep: only {len(ids)} prompts have all pictures and their scores: too few to compare")
    return ids


@dataclass(frozen=True)
class _Sweeper:
    """Draws and scores models at settings of the sampler; what the evaluation drew itself is taken from there."""

    settings: EvaluateSettings
    models: Mapping[ModelSource, EvaluatedModel]
    protocol: Protocol
    drawer: Drawer
    accelerator: Accelerator
    progress: Progress

    @property
    def scorer(self) -> str:
        """The name of the scorer that chooses."""
        return parse_spec((self.settings.scorers or [])[0])[0]

    def scores(
        self, half: PromptSet, wanted: Mapping[ModelSource, Sequence[Sampling]]
    ) -> dict[ModelSource, dict[Sampling, Scores]]:
        """Draw and score what lacks of these settings of each model; the scores of the half's prompts."""
        drawn: dict[tuple[float, ...], dict[str, SampleFolder]] = defaultdict(dict)
        for source, samplings in wanted.items():
            by_folder: dict[SampleFolder, list[Sampling]] = defaultdict(list)
            for sampling in dict.fromkeys(samplings):
                by_folder[self._place(source, half, sampling)].append(sampling)
            by_folder.pop(self.models[source].folder, None)
            for folder, alike in by_folder.items():
                self._draw(source, half, folder, alike)
                scales = tuple(sampling.guidance_scale for sampling in alike)
                drawn[scales][f"{source.name}, {alike[0].in_words}"] = folder
        self.drawer.close()
        for scales, folders in drawn.items():
            specs = (self.settings.scorers or [])[:1]
            score_samples(
                folders, scales, specs, self.accelerator, lambda name, n: self.progress.phase(f"score by {name}", n)
            )
        return {
            source: {sampling: self._read(source, half, sampling) for sampling in samplings}
            for source, samplings in wanted.items()
        }

    def _place(self, source: ModelSource, half: PromptSet, sampling: Sampling) -> SampleFolder:
        if sampling.guidance_scale in self.protocol["guidance_scales"]:
            if sampling == Sampling.of_protocol(self.protocol, sampling.guidance_scale):
                return self.models[source].folder
        name = f"{sampling.num_inference_steps}-steps-x{sampling.prediction_scale:g}"
        place = Path(self.settings.output_dir) / "sweep" / source.name / half.name / name
        return SampleFolder(place / "images", place / "scores")

    def _draw(self, source: ModelSource, half: PromptSet, folder: SampleFolder, alike: Sequence[Sampling]) -> None:
        draw, _, drawn_by = self.drawer.open(source)
        images, seed = self.protocol["images_per_prompt"], self.protocol["seed"]
        scales = [sampling.guidance_scale for sampling in alike]
        protocol = protocol_of(half, images_per_prompt=images, seed=seed, sampling=alike[0], guidance_scales=scales)
        shards = picture_shards(half.requests(images, seed), folder.samples, protocol, drawn_by, draw)
        words = {sampling.guidance_scale: sampling.in_words for sampling in alike}

        def bar(scale: float | None, total: int) -> Tell:
            return self.progress.phase(f"{source.name}: {half.name} at {words[float(scale or 0)]}", total)

        draw_samples(shards, self.accelerator, bar)

    def _read(self, source: ModelSource, half: PromptSet, sampling: Sampling) -> Scores:
        folder = self._place(source, half, sampling)
        record = scorer_record(folder, self.scorer)
        if record["state"] != "run":
            raise InputError(f"--sweep chooses by {self.scorer}, which cannot be run: {record['reason']}")
        found: Scores = {row.id: [] for row in half.rows}
        for row in read_scores(folder, self.scorer, sampling.guidance_scale):
            if row["id"] in found:
                found[row["id"]].append(row["score"])
        return {id_: scores for id_, scores in found.items() if len(scores) == self.protocol["images_per_prompt"]}
