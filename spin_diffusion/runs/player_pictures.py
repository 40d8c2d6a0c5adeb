"""Pictures by the player of an image run while it is trained: judged by a scorer, to find a round's best step, or shown
as previews. They are drawn as the opponent draws, by the road of all pictures, and stay in the round's folder."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.curation import scorer_by_content
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.evaluated import SampleFolder, read_samples, scorer_record
from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scoring import score_samples
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.samples.drawn import Request, draw_samples, picture_shards, requests_of
from spin_diffusion.samples.sampling import OWN_SIZE
from spin_diffusion.selfplay.looks import Judge, Judged
from spin_diffusion.store.files import Tell
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import Progress

JUDGED_PROMPTS = 32
"""Prompts at most for whose pictures a step is judged."""


def quietly(*of: object) -> Tell:
    """A phase that is not shown: the bar of the training stays."""
    return Progress().phase("", 0)


class PlayerPictures:
    """What draws pictures by the present player."""

    def __init__(self, config: Config, game: DiffusionGame) -> None:
        self.game, self.accelerator, self.scale = game, game.accelerator, config.sampling.guidance_scale
        sampling = replace(game.opponent_sampling, size_condition=OWN_SIZE)
        self.protocol = sampling.in_protocol() | {"guidance_scales": [self.scale]}
        self.drawn_with = key_of(unet=game.base_hash, parts=game.parts_hash)

    def draw(self, requests: list[Request], folder: Path) -> SampleFolder:
        """Draw what is asked for into a folder; what this very player drew there already stays."""

        drawn_by = key_of(base=self.drawn_with, weights=self.game.player_hash())
        draw = partial(self.game.draw, self.game.player)
        shards = picture_shards(requests, folder / "images", self.protocol, drawn_by, draw)
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
