"""`spin-diffusion evaluate`: draw the same prompts with the same seeds by every model, score them, conclude, report."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from accelerate import Accelerator

from spin_diffusion.diffusion.model_sources import ModelSource, read_given_pictures, read_source
from spin_diffusion.evaluation.evaluated import EvaluatedModel
from spin_diffusion.evaluation.features import Comparison, check_embedding, embed
from spin_diffusion.evaluation.prompt_sets import PromptRow, PromptSet, load_prompts, prompts_hash
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.records import Protocol, Results, SweepEntry
from spin_diffusion.evaluation.report import write_report
from spin_diffusion.evaluation.results import conclude
from spin_diffusion.evaluation.scoring import SampleFolder, check_specs, score_samples
from spin_diffusion.evaluation.specs import shortened
from spin_diffusion.evaluation.tables import closing_lines, print_table
from spin_diffusion.evaluation.verdicts import failing
from spin_diffusion.runs.drawer import Drawer
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.runs.real_pictures import check_place, of_place
from spin_diffusion.runs.start import make_accelerator, quiet_libraries
from spin_diffusion.runs.sweep import check_sweep, sweep_models
from spin_diffusion.samples.drawn import (
    Request,
    Sample,
    claim,
    draw_samples,
    folder_of,
    index_piece,
    picture_shards,
    save_bytes,
    without_picture,
)
from spin_diffusion.samples.sampling import Sampling, precision_of
from spin_diffusion.store.files import Made, build_pieces, read_if_whole, read_json, write_json
from spin_diffusion.store.folder import check_folder, take_folder
from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, printable, read_bytes
from spin_diffusion.store.keys import key_of, known_hash
from spin_diffusion.store.parsing import saved_settings
from spin_diffusion.store.progress import Bars, Progress, tell
from spin_diffusion.store.run_dir import settle, shard_name, write_file
from spin_diffusion.store.settings import harmless
from spin_diffusion.store.yaml_files import dump_yaml

PROGRAM = "evaluation"


def evaluate_models(settings: EvaluateSettings) -> list[str]:
    """Draw, score, conclude and report; what an earlier run of the command finished stays.

    Returns:
        Why `--fail_on` holds, in the main process alone.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    output_dir = Path(settings.output_dir)
    sources = _sources(settings)
    settings = dataclasses.replace(settings, images_per_prompt=_images_per_prompt(settings, sources))
    prompts, captions = _checked_input(settings, sources, output_dir)
    # The prompts and their order do not depend on which one is the baseline
    sources = sorted(sources, key=lambda source: source.name != (settings.baseline or source.name))
    quiet_libraries()
    accelerator = make_accelerator(settings.mixed_precision)
    progress = Bars() if accelerator.is_main_process else Progress()
    if accelerator.is_main_process:
        take_folder(output_dir, PROGRAM)
        settle(output_dir)
        saved = dump_yaml(dataclasses.asdict(settings))
        write_file(output_dir / "config.yaml", lambda part: part.write_text(saved, encoding="utf-8"))
    accelerator.wait_for_everyone()

    drawer = Drawer(settings, prompts, accelerator)
    models, protocol = _pictures(settings, sources, prompts, output_dir, drawer, progress)
    scales, folders = protocol["guidance_scales"], {model.name: model.folder for model in models}
    score_samples(
        folders,
        scales,
        settings.scorers or [],
        accelerator,
        lambda scorer, total: progress.phase(f"score by {scorer}", total),
    )
    real = _real_pictures(settings, protocol, output_dir)
    if real is not None:
        embed(real, folders, scales, accelerator, partial(progress.phase, "features of the pictures"))
    swept: list[SweepEntry] = []
    if settings.sweep.given():
        of_sources = dict(zip(sources, models, strict=True))
        swept = sweep_models(settings, of_sources, prompts, protocol, drawer, accelerator, progress, real)
    if not accelerator.is_main_process:
        return []
    results = conclude(
        output_dir,
        models,
        protocol,
        settings.scorers or [],
        title=", ".join(model.name for model in models),
        headline_scale=scales[-1],
        training_prompts=captions,
        real=real,
        sweep=swept,
    )
    _tell(results, output_dir)
    if settings.scorers and all(scorer["state"] == "not run" for scorer in results["scorers"]):
        raise InputError(f"no scorer could be run: {results['scorers'][0]['reason']}")
    return failing(results, settings.fail_on)


def _real_pictures(settings: EvaluateSettings, protocol: Protocol, output_dir: Path) -> Comparison | None:
    """The real pictures that the models' are compared with, if any."""
    spec, place = settings.distribution_features, settings.reference_images
    return None if spec is None or place is None else of_place(spec, place, protocol["resolution"], output_dir)


def _tell(results: Results, output_dir: Path) -> None:
    """Print the table and what is concluded, and write the report."""
    print_table(results)
    for said in results["verdicts"]:
        at = "" if said["guidance_scale"] is None else f" at guidance {said['guidance_scale']:g}"
        tell(f"{said['model']}{at}: {said['verdict']}. {said['reason']}")
    for line in closing_lines(results):
        tell(line)
    if results["failures"]:
        print(f"{len(results['failures'])} pictures are missing, broken or without a score; the report lists them")
    print(f"Report: {write_report(output_dir)}")


def _checked_input(
    settings: EvaluateSettings, sources: list[ModelSource], output_dir: Path
) -> tuple[PromptSet, list[str] | None]:
    """The prompts and the training set's captions, before anything is written."""
    check_specs(settings.scorers or [])
    if settings.distribution_features is not None and settings.reference_images is not None:
        check_embedding(settings.distribution_features)
        check_place(settings.reference_images)
    _check_output_dir(settings, output_dir)
    for source in sources:
        _check_known(source, output_dir)
    prompts = _prompts(settings, sources)
    for source in sources:
        if source.kind == "images":
            _check_pictures(source, [row.prompt for row in prompts.rows], settings.num_images)
    if settings.sweep.given():
        check_sweep(settings, sources, prompts)
    captions = None
    if settings.training_captions:
        captions = [row.prompt for row in load_prompts(settings.training_captions).rows]
    return prompts, captions


def _pictures(
    settings: EvaluateSettings,
    sources: list[ModelSource],
    prompts: PromptSet,
    output_dir: Path,
    drawer: Drawer,
    progress: Progress,
) -> tuple[list[EvaluatedModel], Protocol]:
    """The pictures of every model, drawn or taken as they are given.

    Returns:
        The models, and the protocol that all of their pictures follow.
    """
    accelerator = drawer.accelerator
    protocol = _protocol(settings, sources, prompts, drawer)
    wanted = prompts.requests(settings.num_images, settings.seed)
    scales = [f"{scale:g}" for scale in protocol["guidance_scales"] if scale is not None]
    tell(
        f"{len(sources)} models, {len(prompts.rows)} prompts of {prompts.name} x {settings.num_images} images"
        + (f", guidance {', '.join(scales)}" if scales else "")
        + prompts.said_left_out()
        + f"\nProtocol {protocol['id'][:16]}: compare only with results of the same one",
        accelerator,
    )
    models = []
    for source in sources:
        folder = SampleFolder(output_dir / "images" / source.name, output_dir / "scores" / source.name)
        draw, weights, drawn_by = None, None, ""
        if source.kind == "images":
            _take_pictures(source, wanted, folder.samples, protocol, settings, accelerator)
        else:
            draw, weights, drawn_by = drawer.open(source)
        if accelerator.is_main_process:
            write_json(folder.samples / "model.json", {"path": source.path, "weights_sha256": weights})
        if draw is not None:
            claim(folder.samples, protocol, accelerator)
            shards = picture_shards(wanted, folder.samples, protocol, drawn_by, draw)
            draw_samples(shards, accelerator, partial(_drawing, progress, source.name))
        role: Literal["baseline", "candidate"] = "baseline" if source is sources[0] else "candidate"
        base = str(source.base) if source.base is not None else None
        strength = source.strength if source.kind == "round" else None
        models.append(
            EvaluatedModel(source.name, role, folder, None, source.path, source.kind, base, weights, strength)
        )
    drawer.close()
    return models, protocol


def _protocol(
    settings: EvaluateSettings, sources: Sequence[ModelSource], prompts: PromptSet, drawer: Drawer
) -> Protocol:
    """How all pictures are drawn; of pictures that are all given it knows no sampler."""
    drawn = [source for source in sources if source.kind != "images"]
    scales: list[Any] = settings.guidance_scales if drawn else [None]
    sampling = None
    if drawn:
        sampling = Sampling(
            sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=scales[-1],
            resolution=settings.resolution or drawer.resolution(drawn[0]),
            precision=precision_of(drawer.accelerator.mixed_precision),
            prediction_scale=settings.prediction_scale,
        )
    images, seed = settings.num_images, settings.seed
    return protocol_of(prompts, images_per_prompt=images, seed=seed, sampling=sampling, guidance_scales=scales)


def _drawing(progress: Progress, name: str, scale: float | None, total: int) -> Callable[[int, str], None]:
    """The phase of a model's pictures at a guidance scale."""
    return progress.phase(f"{name}: draw at guidance {scale:g}", total)


def _sources(settings: EvaluateSettings) -> list[ModelSource]:
    """The models, in their order."""
    if not settings.models:
        raise InputError("--models is missing: give NAME=PATH_OR_ID for each model")
    if not settings.scorers:
        raise InputError("--scorers is missing: give NAME[=PATH],..., such as pickscore,hps_v2_1,imagereward,clip_h14")
    vae = settings.pretrained_vae_model_name_or_path
    options = settings.revision, settings.variant, vae, settings.base_config
    sources = [read_source(spec, *options) for spec in settings.models]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--models has {name!r} twice: give every model a name of its own")
    if settings.baseline not in (None, *names):
        raise InputError(f"--baseline {settings.baseline}: there is no such model (there are {', '.join(names)})")
    return sources


def _images_per_prompt(settings: EvaluateSettings, sources: list[ModelSource]) -> int:
    """As many as were asked for; else as many as folders of pictures have of most prompts, the smallest of them."""
    given = [Path(source.path) for source in sources if source.kind == "images"]
    if settings.images_per_prompt is not None or not given:
        return settings.num_images
    usual = []
    for folder in given:
        of_prompts = Counter(Counter(row["prompt"] for row in read_given_pictures(folder).rows).values())
        usual.append(max(of_prompts, key=lambda number: (of_prompts[number], -number), default=1))
    return min(usual)


def _check_output_dir(settings: EvaluateSettings, output_dir: Path) -> None:
    saved = output_dir / "config.yaml"
    if check_folder(output_dir, PROGRAM) and saved.is_file():
        old, new = saved_settings(saved), dataclasses.asdict(settings)
        changed = [
            f"{key}: {old.get(key)!r} -> {new[key]!r}"
            for key in new
            if key not in harmless([EvaluateSettings]) and old.get(key) != new[key]
        ]
        if changed:
            raise InputError(
                f"{output_dir} holds an evaluation of another protocol ({'; '.join(changed)}): start in another "
                "--output_dir"
            )


class _Known(TypedDict):
    """Whose pictures lie in a folder."""

    path: str


def _check_known(source: ModelSource, output_dir: Path) -> None:
    """A name that stood for another model would take over its pictures."""
    path = output_dir / "images" / source.name / "model.json"
    if (known := read_if_whole(path, _Known)) is not None and known["path"] != source.path:
        raise InputError(f"{path.parent} has pictures of {known['path']}, not {source.path}: give it another name")


def _prompts(settings: EvaluateSettings, sources: list[ModelSource]) -> PromptSet:
    if settings.prompts:
        return load_prompts(settings.prompts, settings.max_prompts)
    if any(source.kind != "images" for source in sources):
        raise InputError("--prompts is missing: give a file or the name of a set (parti, hpdv2, drawbench, ...)")
    pictures = read_given_pictures(Path(sources[0].path))
    categories = {row["prompt"]: row["category"] for row in pictures.rows}
    texts = list(categories)[: settings.max_prompts]
    if len(texts) < 2:
        few = f"{sources[0].path} has {len(texts)} prompts: too few to compare models, 2 or more are needed"
        raise InputError(few + pictures.note())
    kept = tuple(PromptRow(f"{n:05d}", text, categories[text] or None) for n, text in enumerate(texts))
    return PromptSet(
        printable(Path(sources[0].path).name), kept, prompts_hash(texts), "not stated", "the first model's pictures"
    )


def _check_pictures(source: ModelSource, prompts: list[str], images_per_prompt: int) -> None:
    """A folder without one whole prompt leaves nothing to compare; pictures that lack here and there are counted."""
    numbers = Counter(row["prompt"] for row in read_given_pictures(Path(source.path)).rows)
    most = max(numbers[prompt] for prompt in prompts)
    where = f"--models {source.name}={printable(source.path)}"
    if most == 0:
        raise InputError(f"{where} has pictures of none of the {len(prompts)} prompts, such as {shortened(prompts[0])}")
    if most < images_per_prompt:
        raise InputError(f"{where} has {most} pictures of a prompt at most: give --images_per_prompt {most} or fewer")


def _take_pictures(
    source: ModelSource,
    wanted: list[Request],
    directory: Path,
    protocol: Protocol,
    settings: EvaluateSettings,
    accelerator: Accelerator,
) -> None:
    """Copy pictures that were given, as they are, beside those that are drawn. A missing one is a failure."""
    theirs = Path(source.path) / "protocol.json"
    theirs = theirs if theirs.is_file() else Path(source.path).parent / "protocol.json"
    known = read_json(theirs, dict[str, object], "restore it, or remove it") if theirs.is_file() else None
    drawn_alike = known is not None and known.get("id") == protocol["id"]
    if protocol["guidance_scales"] != [None] and not drawn_alike and not settings.allow_unequal_protocol:
        said = "by another protocol" if known else "by a protocol that nobody recorded"
        raise InputError(
            f"--models {source.name}={source.path}: its pictures were drawn {said}, so a difference would say nothing "
            "of the models; --allow_unequal_protocol true compares them all the same"
        )
    claim(directory, protocol, accelerator)
    if accelerator.is_main_process:
        by_prompt: dict[str, list[Path]] = {}
        pictures = read_given_pictures(Path(source.path))
        if pictures.left_out:
            print(f"--models {source.name}={source.path}{pictures.note()}")
        for row in pictures.rows:
            by_prompt.setdefault(row["prompt"], []).append(row["path"])
        paths = [next(iter(by_prompt.get(row["prompt"], [])[row["k"] :]), None) for row in wanted]
        given = key_of(pictures=[_hash_of(path) for path in paths])
        for scale in protocol["guidance_scales"]:
            folder = directory / folder_of(scale)

            def take(tell: Callable[[int], None], folder: Path = folder) -> Made:
                return Made([_take(row, path, folder) for row, path in zip(wanted, paths, strict=True)])

            index = folder / f"{shard_name(0, 1)}.jsonl"
            piece = index_piece(index, given, wanted, take)
            build_pieces([piece], lambda done, text: None, 1)
    accelerator.wait_for_everyone()


def _hash_of(path: Path | None) -> str | None:
    try:
        return known_hash(path) if path is not None else None
    except InputError:  # counted where it is taken
        return None


def _take(row: Request, path: Path | None, folder: Path) -> Sample:
    if path is None:
        return without_picture(row, "there is no such picture")
    try:
        data = read_bytes(path, MAX_PICTURE_BYTES)
    except InputError as error:
        return without_picture(row, f"cannot be read: {error}")
    return save_bytes(row, data, folder / f"{row['id']}-{row['k']}{path.suffix.lower()}")
