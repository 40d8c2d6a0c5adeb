"""Pictures by the player of an image run while it is trained: judged by a scorer or by their distance to real ones, to
find a round's best step, or shown as previews. They are drawn as the opponent draws, by the road of all pictures, and
stay in the round's folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list
from PIL import Image

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.curation import scorer_by_content
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.distribution import believable, interval, of_row
from spin_diffusion.evaluation.evaluated import SampleFolder, read_samples, scorer_record
from spin_diffusion.evaluation.features import Comparison, embed, measured
from spin_diffusion.evaluation.gallery import draw_gallery, log_pictures, picture_or_grey
from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scoring import score_samples
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.samples.drawn import Request, draw_samples, folder_of, picture_shards, read_index, requests_of
from spin_diffusion.samples.sampling import OWN_SIZE
from spin_diffusion.selfplay.clustered import MeanInterval
from spin_diffusion.selfplay.looks import JUDGED_PROMPTS, PREVIEWED_PROMPTS, Judge, Judged, Preview, Values, step_name
from spin_diffusion.selfplay.record import PREVIEW_SHEET
from spin_diffusion.store.files import Tell
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import Progress

COLUMNS = 12
"""Steps in a sheet of previews, beside the first."""


def quietly(*of: object) -> Tell:
    """A phase that is not shown: the bar of the training stays."""
    return Progress().phase("", 0)


def change_of_distance(values: Values, start: Values, prompts: Sequence[str]) -> MeanInterval | None:
    """How far the Frechet distance is from that of the start, by `distribution.interval`; None where either has none.

    Args:
        values, start: of which `of_row` makes replicates.
    """
    if not values or not start:
        return None
    found = interval("fd", of_row(values), of_row(start))
    return {"mean": found.mean, "low": found.low, "high": found.high}


class PlayerPictures:
    """What draws pictures by the present player."""

    def __init__(self, config: Config, game: DiffusionGame) -> None:
        self.game, self.accelerator, self.scale = game, game.accelerator, config.sampling.guidance_scale
        sampling = replace(game.opponent_sampling, size_condition=OWN_SIZE)
        self.protocol = sampling.in_protocol() | {"guidance_scales": [self.scale]}

    def draw(self, requests: list[Request], folder: Path) -> SampleFolder:
        """Draw what is asked for into a folder; what this very player drew there already stays."""
        drawn_by = self.game.player_key(self.game.player_hash())
        draw = partial(self.game.draw, self.game.player)
        batch = self.game.sampling.generation_batch_size  # few pictures, which all processes are to share
        shards = picture_shards(requests, folder / "images", self.protocol, drawn_by, draw, batch)
        draw_samples(shards, self.accelerator, quietly)
        return SampleFolder(folder / "images", folder / "scores")

    def judge(self, spec: str, prompts: Sequence[str], seed: int) -> Judge:
        """A scorer as the judge of a round's steps, which is loaded once to see whether it can be.

        Args:
            prompts: the first different ones are drawn.
        """
        asked = [{"prompt": prompt} for prompt in list(dict.fromkeys(prompts))[:JUDGED_PROMPTS]]
        requests, name = requests_of(asked, 1, seed), parse_spec(spec)[0]
        try:
            load_scorer(spec, str(self.accelerator.device))
        except InputError as error:
            raise InputError(f"--select_by {spec}: {error}") from None

        def judge(folder: Path) -> Judged:
            drawn = self.draw(requests, folder)
            score_samples({name: drawn}, [self.scale], [spec], self.accelerator, quietly)
            if (record := scorer_record(drawn, name))["state"] != "run":
                raise InputError(f"--select_by {spec}: {record['reason']}")
            scores = read_samples(drawn, self.scale, [name], self.protocol, folder).scores[name]
            found = [scores.get((request["id"], request["k"])) for request in requests]
            worked_on = len(requests) if self.accelerator.is_main_process else 0
            return Judged(
                [score and score["score"] for score in found], [request["prompt"] for request in requests], worked_on
            )

        return Judge(name, scorer_by_content(spec), judge)

    def judge_by_distance(self, real: Comparison, prompts: Sequence[str], seed: int) -> Judge:
        """The Frechet distance to real pictures, whose features are made now, as the judge of a round's steps.

        Args:
            prompts: all different ones are drawn, once each.

        Raises:
            InputError: the embedding cannot be run, or the pictures are too few for so many features.
        """
        requests = requests_of([{"prompt": prompt} for prompt in dict.fromkeys(prompts)], 1, seed)
        embed(real, {}, [], self.accelerator, quietly)
        metrics, why = believable(len(requests), 1, *real.real_features(str(self.accelerator.device)).shape)
        if "fd" not in metrics:
            raise InputError(f"--select_by fd: {why}; hold out more (--num_held_out)")
        ids = [request["id"] for request in requests]

        def judge(folder: Path) -> Judged:
            drawn = self.draw(requests, folder)
            embed(real, {"player": drawn}, [self.scale], self.accelerator, quietly)
            values: list[list[float]] = [[]]
            if is_main := self.accelerator.is_main_process:
                if all(row["file"] for file in drawn.files(self.scale) for row in read_index(file)):
                    values = [measured(real, drawn, self.scale, ids, 1)["fd"].row.tolist()]
            (told,) = broadcast_object_list(values)
            return Judged(told, [request["prompt"] for request in requests], len(requests) if is_main else 0)

        return Judge("fd", key_of(embedding=real.key, real=real.content), judge, change_of_distance, "lower")

    def preview(self, every: int | None, prompts: Sequence[str], seed: int, to_page: Callable[[], None]) -> Preview:
        """What draws the first of the prompts every so many steps, and shows all of a round's previews in one sheet.

        Args:
            to_page: puts the sheet on the page; called by the main process.
        """
        requests = requests_of([{"prompt": prompt} for prompt in prompts[:PREVIEWED_PROMPTS]], 1, seed)

        def draw(folder: Path, name: str, step: int) -> int:
            self.draw(requests, folder)
            if not self.accelerator.is_main_process:
                return 0
            self._show(requests, folder.parent)
            pictures = [(request["prompt"], self._picture(request, folder)) for request in requests]
            log_pictures(f"{name}/previews", pictures, step, self.accelerator, axis=name)
            to_page()
            return len(requests)

        return Preview(every, draw)

    def _show(self, requests: list[Request], folder: Path) -> None:
        """Draw the sheet of a round's previews: a row for each prompt, a column for each step, at most COLUMNS."""
        steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.is_dir())
        shown = [steps[round(place * (len(steps) - 1) / COLUMNS)] for place in range(COLUMNS + 1)]
        columns = {f"step {step}": folder / step_name(step) for step in shown}
        rows = [
            (request["prompt"], [self._picture(request, step) for step in columns.values()]) for request in requests
        ]
        draw_gallery(list(columns), rows, folder.with_name(PREVIEW_SHEET))

    def _picture(self, request: Request, folder: Path) -> Image.Image:
        path = folder / "images" / folder_of(self.scale) / f"{request['id']}-{request['k']}.png"
        return picture_or_grey(path, self.game.resolution)
