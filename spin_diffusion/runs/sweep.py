"""evaluate.py --sweep: each model at every combination of free settings. The best one is chosen on every other prompt
and shown on the rest, so that its gain is not that of having been chosen; by a scorer, or by the distance to real
pictures, which are the same for both halves."""

import typing
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Float

from spin_diffusion.diffusion.model_sources import ModelSource
from spin_diffusion.evaluation.distribution import GROUPS, MIN_PICTURES, Replicates, believable, interval
from spin_diffusion.evaluation.evaluated import EvaluatedModel, SampleFolder, read_scores, scorer_record
from spin_diffusion.evaluation.features import Comparison, embed, measured
from spin_diffusion.evaluation.prompt_sets import PromptSet, prompts_hash
from spin_diffusion.evaluation.protocols import free_settings, protocol_of
from spin_diffusion.evaluation.records import DifferenceEntry, Protocol, SweepEntry
from spin_diffusion.evaluation.scorers import about
from spin_diffusion.evaluation.scoring import score_samples
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.evaluation.statistics import Interval, paired_difference
from spin_diffusion.runs.drawer import Drawer
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.samples.drawn import draw_samples, picture_shards, read_index
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.selfplay.record import Better
from spin_diffusion.store.files import Tell
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, tell

SELECTION, HELD_OUT = "selection", "held-out"


def check_sweep(settings: EvaluateSettings, sources: Sequence[ModelSource], prompts: PromptSet) -> None:
    """InputError where a sweep has no model that draws, too few prompts, or nothing to choose by."""
    if given := [source.name for source in sources if source.kind == "images"]:
        raise InputError(f"--sweep draws with every model, and {given[0]} of --models is a folder of pictures")
    if len(prompts.rows) < 4:
        raise InputError(f"--sweep needs 4 prompts or more, 2 that choose and 2 that show, got {len(prompts.rows)}")
    if settings.sweep.by == "fd":
        half, images = len(prompts.rows) // 2, len(prompts.rows) // 2 * settings.num_images
        if half < GROUPS or images < MIN_PICTURES:
            raise InputError(
                f"--sweep by fd chooses on half of the prompts and shows on the other half: it takes {MIN_PICTURES} "
                f"pictures of {GROUPS} prompts in each, and there are {images} of {half}"
            )
        return
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


@dataclass(frozen=True)
class Drawn:
    """Pictures of a half of the prompts at one setting: where they lie, at which guidance scale."""

    folder: SampleFolder
    half: PromptSet
    scale: float


@typing.runtime_checkable
class Judge(typing.Protocol):
    """What chooses a setting, and says what it gains."""

    @property
    def name(self) -> str:
        """As tables call it."""

    @property
    def better(self) -> Better:
        """Which numbers are."""

    def look(self, folders: Mapping[str, SampleFolder], scales: Sequence[float]) -> None:
        """See what was drawn; what was seen before stays."""

    def complete(self, drawn: Drawn) -> list[str]:
        """The prompts of which all pictures are there, and can be judged."""

    def check(self, prompts: int) -> None:
        """InputError where so many prompts are too few."""

    def value(self, drawn: Drawn, ids: Sequence[str]) -> Any:
        """What it says of these prompts, the same on all processes, for `mean` and `difference`."""

    def mean(self, value: Any) -> float:
        """The number by which settings are chosen."""

    def difference(self, a: Any, b: Any) -> Interval:
        """How far a is from b, with its interval."""


@dataclass(frozen=True)
class ByScorer:
    """The first scorer chooses."""

    spec: str
    per_prompt: int
    accelerator: Accelerator
    progress: Progress
    better: Better = "higher"

    @property
    def name(self) -> str:
        return parse_spec(self.spec)[0]

    def look(self, folders: Mapping[str, SampleFolder], scales: Sequence[float]) -> None:
        score_samples(
            folders, scales, [self.spec], self.accelerator, lambda name, n: self.progress.phase(f"score by {name}", n)
        )

    def _scores(self, drawn: Drawn) -> dict[str, list[float]]:
        record = scorer_record(drawn.folder, self.name)
        if record["state"] != "run":
            raise InputError(f"--sweep chooses by {self.name}, which cannot be run: {record['reason']}")
        found: dict[str, list[float]] = {row.id: [] for row in drawn.half.rows}
        for row in read_scores(drawn.folder, self.name, drawn.scale):
            if row["id"] in found:
                found[row["id"]].append(row["score"])
        return {id_: scores for id_, scores in found.items() if len(scores) == self.per_prompt}

    def complete(self, drawn: Drawn) -> list[str]:
        return list(self._scores(drawn))

    def check(self, prompts: int) -> None:
        if prompts < 2:
            raise InputError(f"--sweep: only {prompts} prompts have all pictures and their scores: too few to compare")

    def value(self, drawn: Drawn, ids: Sequence[str]) -> Float[np.ndarray, " prompts"]:
        scores = self._scores(drawn)
        return np.array([np.mean(scores[id_]) for id_ in ids])

    def mean(self, value: Float[np.ndarray, " prompts"]) -> float:
        return float(value.mean())

    def difference(self, a: Float[np.ndarray, " prompts"], b: Float[np.ndarray, " prompts"]) -> Interval:
        return paired_difference(a, b)


@dataclass(frozen=True)
class ByDistance:
    """The Frechet distance to real pictures chooses, its bias taken off."""

    real: Comparison
    per_prompt: int
    accelerator: Accelerator
    progress: Progress
    name: str = "fd"
    better: Better = "lower"

    def look(self, folders: Mapping[str, SampleFolder], scales: Sequence[float]) -> None:
        phase = "features of the pictures"
        embed(self.real, folders, scales, self.accelerator, lambda n: self.progress.phase(phase, n))

    def complete(self, drawn: Drawn) -> list[str]:
        files = drawn.folder.files(drawn.scale)
        there = Counter(row["id"] for file in files for row in read_index(file) if row["file"])
        return [row.id for row in drawn.half.rows if there[row.id] == self.per_prompt]

    def check(self, prompts: int) -> None:
        metrics, why = believable(prompts, self.per_prompt, *self.real.real_features("cpu").shape)
        if "fd" not in metrics:
            raise InputError(f"--sweep by fd chooses on half of the prompts and shows on the other half: {why}")

    def value(self, drawn: Drawn, ids: Sequence[str]) -> Replicates:
        part = f"-{drawn.half.name}"
        is_main = self.accelerator.is_main_process
        fd = measured(self.real, drawn.folder, drawn.scale, ids, self.per_prompt, part)["fd"] if is_main else None
        return broadcast_object_list([fd])[0]

    def mean(self, value: Replicates) -> float:
        return interval("fd", value).mean

    def difference(self, a: Replicates, b: Replicates) -> Interval:
        return interval("fd", a, b)


def sweep_models(
    settings: EvaluateSettings,
    models: Mapping[ModelSource, EvaluatedModel],
    prompts: PromptSet,
    protocol: Protocol,
    drawer: Drawer,
    accelerator: Accelerator,
    progress: Progress,
    real: Comparison | None,
) -> list[SweepEntry]:
    """What the settings of the sweep come to for every model; on all processes the same.

    Args:
        models: the baseline first; evaluated by `protocol`, whose last guidance scale is the default's.
        real: the pictures whose distance chooses; None = the first scorer does.

    Raises:
        InputError: the scorer that chooses cannot be run, or too few prompts of a half have all of their pictures.
    """
    default = Sampling.of_protocol(protocol, float(protocol["guidance_scales"][-1] or 0))
    samplings = settings.sweep.around(default)
    parts = halves(prompts)
    passes, usual = sum(sampling.passes for sampling in samplings[1:]), default.passes
    judge: Judge = ByScorer((settings.scorers or [""])[0], protocol["images_per_prompt"], accelerator, progress)
    if settings.sweep.by == "fd" and real is not None:
        judge = ByDistance(real, protocol["images_per_prompt"], accelerator, progress)
    judge.check(min(len(half.rows) for half in parts.values()))
    tell(
        f"Sweep: {len(samplings)} settings of {len(models)} models on {len(parts[SELECTION].rows)} prompts, up to "
        f"{passes / usual:.3g} times the drawing of these prompts by the default ({default.in_words})",
        accelerator,
    )
    sweeper = _Sweeper(settings, models, protocol, drawer, accelerator, progress, judge)
    choosing = sweeper.draw(parts[SELECTION], dict.fromkeys(models, samplings))
    means = {source: [judge.mean(value) for value in _values(judge, choosing[source])] for source in models}
    choose = max if judge.better == "higher" else min
    chosen = {source: means[source].index(choose(means[source])) for source in models}
    best = {source: samplings[place] for source, place in chosen.items()}
    showing = sweeper.draw(parts[HELD_OUT], {source: [default, best[source]] for source in models})
    baseline = next(iter(models))
    return [
        SweepEntry(
            model=source.name,
            scorer=judge.name,
            better=judge.better,
            baseline=None if source is baseline else baseline.name,
            num_selection=len(parts[SELECTION].rows),
            num_held_out=len(parts[HELD_OUT].rows),
            settings=[
                {**free_settings(sampling), "mean": mean}
                for sampling, mean in zip(samplings, means[source], strict=True)
            ],
            chosen=chosen[source],
            gain=_difference(judge, showing[source][1], showing[source][0]),
            to_baseline=None if source is baseline else _difference(judge, showing[source][1], showing[baseline][1]),
        )
        for source in models
    ]


def _values(judge: Judge, drawn: Sequence[Drawn]) -> list[Any]:
    """What the judge says of each, of the prompts that all of them have."""
    complete = [set(judge.complete(each)) for each in drawn]
    ids = [row.id for row in drawn[0].half.rows if all(row.id in of_each for of_each in complete)]
    judge.check(len(ids))
    return [judge.value(each, ids) for each in drawn]


def _difference(judge: Judge, a: Drawn, b: Drawn) -> DifferenceEntry:
    found = judge.difference(*_values(judge, [a, b]))
    return {"difference": found.mean, "low": found.low, "high": found.high}


@dataclass(frozen=True)
class _Sweeper:
    """Draws models at settings of the sampler for the judge; what the evaluation drew itself is taken from there."""

    settings: EvaluateSettings
    models: Mapping[ModelSource, EvaluatedModel]
    protocol: Protocol
    drawer: Drawer
    accelerator: Accelerator
    progress: Progress
    judge: Judge

    def draw(self, half: PromptSet, wanted: Mapping[ModelSource, Sequence[Sampling]]) -> dict[ModelSource, list[Drawn]]:
        """Draw and judge what lacks of these settings of each model; the pictures of the half's prompts."""
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
            self.judge.look(folders, scales)
        return {
            source: [
                Drawn(self._place(source, half, sampling), half, sampling.guidance_scale) for sampling in samplings
            ]
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
