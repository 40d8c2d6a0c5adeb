"""DiffusionGame: the rounds' contract (`selfplay.game.Game`) for text-to-image diffusion models with a UNet."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from spin_diffusion.data.rows import Example
from spin_diffusion.diffusion import errors, images
from spin_diffusion.diffusion.base import Base, parts_hash
from spin_diffusion.diffusion.denoiser import Copies, compile_unet
from spin_diffusion.diffusion.given_lora import fuse_given
from spin_diffusion.diffusion.images import (
    bucket_sizes,
    latents_of,
    nearest,
    packed,
    places_by_size,
    size_of,
    vae_hash,
)
from spin_diffusion.diffusion.kohya import KohyaForm
from spin_diffusion.diffusion.lora import Adapters
from spin_diffusion.diffusion.noising import read_noising
from spin_diffusion.diffusion.parts import load_unet
from spin_diffusion.diffusion.prompts import Prompts, move
from spin_diffusion.diffusion.questions import MIRRORED, Question, Questions, by_kind, in_order, one_to_one
from spin_diffusion.diffusion.sampling import draw_batches, draw_images, sampling_pipeline
from spin_diffusion.diffusion.settings import (
    DenoiserSettings,
    ImageSettings,
    SamplingSettings,
)
from spin_diffusion.samples.sample import CONDITION, KIND, Batch, Row
from spin_diffusion.samples.sampling import OWN_SIZE, REAL_SIZE, Sampling, precision_of
from spin_diffusion.selfplay.device import autocast_dtype, cast_for_autocast, relative_distance, sent
from spin_diffusion.selfplay.game import PairScores, ScoredBatch
from spin_diffusion.selfplay.health import check_prediction
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.run_dir import write_folder
from spin_diffusion.store.sharing import done_ahead
from spin_diffusion.store.weights import config_of


def example_id(example: Example) -> str:
    """The id of an example's stored row: 16 hexadecimal digits of the hash of prompt and images."""
    digest = hashlib.sha256(json.dumps(example.prompt).encode() + example.image + (example.loser or b""))
    return digest.hexdigest()[:16]


class DiffusionGame:
    """Player and opponent are UNets of one base checkpoint, whose other parts they share."""

    prompt_columns = ("id", "prompt", "frame")
    level_name = "timesteps"
    remedies = {
        "forgetting": ", or set --winner_preserving_mu 0.9",
        "forgetting_quarter": ", or set --winner_preserving_mu 0.9 or --score_weighting min_snr",
    }
    # Both models run on the same values, but a device may choose another kernel where no gradient is wanted
    start_tolerance = {"no": 1e-5, "bf16": 1e-4, "fp16": 1e-4}

    def __init__(
        self,
        family: ModuleType,
        pipeline: Any,
        base: Base | str,
        *,
        images: ImageSettings,
        sampling: SamplingSettings,
        denoiser: DenoiserSettings,
        accelerator: Accelerator,
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
    ) -> None:
        """
        Args:
            base: what `pipeline` was loaded from.
            channels_last: the UNet's memory layout, faster on most hardware than the plain one.
        """
        self.family, self.pipeline, self.base = family, pipeline, Base.of(base)
        self.images, self.sampling, self.denoiser = images, sampling, denoiser
        self.accelerator, self.channels_last = accelerator, channels_last
        # `auto` is settled when it is known how many pairs there are
        self.fixed_draws = 0 if denoiser.fixed_draws == "auto" else denoiser.fixed_draws

        # The images' sizes
        self.resolution = images.resolution or family.RESOLUTION
        self.latent_px = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        # Pipelines take multiples of 8 alone, also with a VAE of a factor below that
        multiple = max(8, self.latent_px * 2 ** (len(pipeline.unet.config.block_out_channels) - 1))
        if self.resolution % multiple:
            raise InputError(f"--resolution {self.resolution}: {self.base} needs a multiple of {multiple}")
        self.sizes = bucket_sizes(self.resolution, multiple, images.max_aspect_ratio)

        self.base_hash = weights_hash(pipeline.unet)
        if lora is not None and lora.use_lora:
            # Before it is moved: a card that can train the adapter may have no room for its base in fp32
            cast_for_autocast(pipeline.unet, autocast_dtype(accelerator.mixed_precision))

        # All but the player is frozen
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval().to(accelerator.device)
        self.prompts = Prompts(family, pipeline, accelerator.autocast)
        self.vae_hash = vae_hash(pipeline.vae)

        self._prepare_questions()
        self._seat_models(lora, gradient_checkpointing)

    def _prepare_questions(self) -> None:
        self.noising = read_noising(dict(self.pipeline.scheduler.config), self.base.name)
        assert not (self.has_sizes and self.denoiser.compile != "no"), "one size only"
        self.questions = Questions(
            self.noising,
            self.prompts,
            denoiser=self.denoiser,
            sizes=[(height // self.latent_px, width // self.latent_px) for height, width in self.sizes],
            channels_last=self.channels_last,
        )

    @property
    def opponent(self) -> UNet2DConditionModel | None:
        """The network that is the opponent inside of `models.as_opponent`; None while it is released."""
        return self.models.opponent

    def _seat_models(self, lora: LoraSettings | None, gradient_checkpointing: bool) -> None:
        """The player, and the opponent: a copy of it, or another adapter on the same UNet."""
        # Never in training mode: dropout would make the two models' scores differ at step 0
        self.player: UNet2DConditionModel = self.pipeline.unet
        if self.channels_last:
            self.player.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.player.enable_gradient_checkpointing()
        self.models: Copies | Adapters
        if lora is not None and lora.use_lora:
            kohya = KohyaForm.of(self.family, self.player, self.noising.prediction_type, self.resolution)
            self.models = Adapters(self.player, lora, self.base_hash, self._base_pipeline, kohya)
        else:
            precision = self.accelerator.mixed_precision
            self.models = Copies(self.player, precision, self.denoiser.compile, self._base_pipeline)
        compile_unet(self.player, self.denoiser.compile)

    @cached_property
    def parts_hash(self) -> str:
        """Hash of all that makes the base, beside its UNet's weights: the other parts, and every configuration."""
        return key_of(unet=config_of(self.player), parts=parts_hash(self.pipeline))

    def player_key(self, weights: str | None) -> str:
        """Who draws: the base with all of its parts, and the hash of a player's weights."""
        return key_of(base=key_of(unet=self.base_hash, parts=self.parts_hash), weights=weights)

    @property
    def has_sizes(self) -> bool:
        """Whether images differ in size."""
        return len(self.sizes) > 1

    # Real samples

    def real_rows(self, examples: Iterable[Example]) -> Iterator[Row]:
        """Examples as stored rows: cropped, in the codec of the opponent's samples, with their frames."""
        return done_ahead(self._real_row, examples)

    def _real_row(self, example: Example) -> Row:
        row: Row = {"id": example_id(example), "prompt": example.prompt, "drawn": False}
        image = open_picture(example.image)
        size = nearest(self.sizes, image.height, image.width)
        cropped, row["frame"] = images.crop(image, size)
        row["image"] = images.to_bytes(cropped, self.images)
        if example.loser is not None:
            loser, _ = images.crop(open_picture(example.loser), size)
            row["loser_image"] = images.to_bytes(loser, self.images)
        return row

    def frame_of(self, row: Row) -> list[int]:
        """What is told of size and crop in the pair of a stored real row: while its generated image is drawn, and while
        either image is scored."""
        return row["frame"] if self.images.size_conditioning == "real" else images.target_frame(size_of(row))

    # The contract

    def generate(
        self, rows: list[Row], seeds: list[int], done: Callable[[int], None] = lambda samples: None
    ) -> list[Row]:
        """One image by the opponent per row, in the size of the real one, stored in the codec of the real ones."""
        sizes, frames = [size_of(row) for row in rows], [self.frame_of(row) for row in rows]
        made = [
            {"id": row["id"], "prompt": row["prompt"], "drawn": True, "seed": seed, "image": b"", "frame": frame}
            | {"sampler": self.sampler_settings}
            for row, seed, frame in zip(rows, seeds, frames, strict=True)
        ]
        files: dict[int, Future[bytes]] = {}
        # Files are compressed while the next images are drawn
        with self.models.as_opponent(), ThreadPoolExecutor() as writers:
            sampling = self.opponent_sampling
            pipeline = self._pipeline(self.opponent, sampling)
            for size, places in places_by_size(sizes).items():
                batches = draw_batches(
                    pipeline,
                    [rows[place]["prompt"] for place in places],
                    [seeds[place] for place in places],
                    sampling,
                    batch_size=self.sampling.generation_batch_size,
                    size=size,
                    frames=torch.tensor([frames[place] for place in places]),
                )
                of_rows = iter(places)
                for drawn in batches:
                    for image in drawn:
                        files[next(of_rows)] = writers.submit(images.to_bytes, image, self.images)
                    done(len(files))
        for place, written in files.items():
            made[place]["image"] = written.result()
        return made

    @property
    def opponent_sampling(self) -> Sampling:
        """How the opponent's images are drawn."""
        precision = precision_of(self.accelerator.mixed_precision, torch.backends.cuda.matmul.allow_tf32)
        told = REAL_SIZE if self.images.size_conditioning == "real" else OWN_SIZE
        return self.sampling.record(self.resolution, precision, told)

    @property
    def sampler_settings(self) -> str:
        """How the opponent's images are drawn, as JSON."""
        return json.dumps(asdict(self.opponent_sampling), sort_keys=True)

    def encode(self, rows: list[Row]) -> dict[str, Tensor]:
        """Latents (fp16: a thousandth of their spread is far below the noise they get) of stored images; with the frame
        of their pair, which a generated image has of its drawing."""
        encoded = {}
        prefixes = ("", "loser_") if "loser_image" in rows[0] else ("",)
        for prefix, mirrored in product(prefixes, (False, True) if self.images.random_flip else (False,)):
            name = f"{prefix}{MIRRORED if mirrored else ''}"
            encoded[f"{name}latents"] = self._latents(rows, prefix, mirrored)
        frames = [row["frame"] if row["drawn"] else self.frame_of(row) for row in rows]
        encoded[f"{CONDITION}frame"] = torch.tensor(frames, dtype=torch.int32)
        if self.has_sizes:
            kinds = [self.sizes.index(size_of(row)) for row in rows]
            encoded[f"{CONDITION}{KIND}"] = torch.tensor(kinds, dtype=torch.int32)
        return encoded

    def encoder_hash(self) -> str:
        """The hash of the VAE, and of what becomes of an image before it is encoded."""
        return key_of(vae=self.vae_hash, images=asdict(self.images), sizes=self.sizes)

    @property
    def _cells(self) -> int:
        """Numbers in a channel of the largest latents."""
        return (self.resolution // self.latent_px) ** 2

    def _latents(self, rows: list[Row], prefix: str, mirrored: bool) -> Tensor:
        # (rows, channels, ...) fp16 on the CPU; packed where the images differ in size
        self._bring_back()
        trip = self.images.vae_round_trip and not rows[0]["drawn"]
        batch_size, how = self.sampling.generation_batch_size, {"mirrored": mirrored, "round_trip": trip}
        encoded = latents_of(self.pipeline.vae, rows, self.images, batch_size, prefix=prefix, **how)
        return packed(encoded, self._cells) if self.has_sizes else torch.stack(encoded)

    def scores(self, player: Callable[..., Any], batch: Batch) -> ScoredBatch:
        """Scores of both images of each pair by both models, on the same inputs; all images of a size in one batch."""
        batch = one_to_one(batch)
        self._put_away()
        parts = by_kind(batch)
        return in_order([self._scores(player, part) for _, part in parts], [places for places, _ in parts])

    def _scores(self, player: Callable[..., Any], batch: Batch) -> ScoredBatch:
        # Pairs of one size
        question = self.questions.about(batch)
        if "opponent_score" in batch.real:
            kept = torch.cat([side["opponent_score"] for side in batch.sides])
            opponent_scores = sent(kept, question.x_t.device)
        else:
            opponent_scores = self._ask_opponent(question)
        player_scores = self._ask_player(player, question)
        if not batch.generated:
            return ScoredBatch(PairScores.of_real(player_scores, opponent_scores), question.level)
        (real, generated), (known_real, known_generated) = player_scores.chunk(2), opponent_scores.chunk(2)
        generated = torch.where(question.real_alone, known_generated, generated)
        return ScoredBatch(PairScores(real, generated, known_real, known_generated), question.level)

    def scores_at_draws(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The opponent's scores of both sides at the batch's draws."""
        rows = len(batch.ids)
        batch = one_to_one(batch)
        real, drawn = torch.empty(2, len(batch.ids), device=self.accelerator.device)
        drawn = drawn if batch.generated else drawn[:0]
        for places, part in by_kind(batch):
            found = self._ask_opponent(self.questions.about(part))
            real[places] = found[: len(places)]
            if batch.generated:
                drawn[places] = found[len(places) :]
        return real[:: len(batch.ids) // rows], drawn  # a real row has one score, however many rows it meets

    # What both models say

    def _predicted(self, model: Callable[..., Any], question: Question) -> Tensor:
        # One path for both models: the same inputs under the same autocast, compared in fp32
        with self.accelerator.autocast():
            return question.asked_of(model)

    @torch.no_grad()
    def _ask_opponent(self, question: Question) -> Tensor:
        assert self.opponent is not None
        with self.models.as_opponent():
            predicted = self._predicted(self.opponent, question)
        return question.scores(predicted)

    def _ask_player(self, player: Callable[..., Any], question: Question) -> Tensor:
        """Its scores, real ones first."""
        predicted = self._predicted(player, question)
        scores, mu = question.scores(predicted), self.denoiser.winner_preserving_mu
        if mu is None or len(scores) == len(question.t):  # the real side alone
            return scores
        (eps_real, eps_generated), (real, generated) = (each.chunk(2) for each in (predicted, question.target))
        scale = errors.winner_preserving_scale(eps_real, real, eps_generated, generated, mu)
        of_real, of_generated = scores.chunk(2)
        return torch.cat([of_real, errors.scale_gradient(of_generated, scale)])

    def promote(self) -> None:
        """The opponent becomes a frozen copy of the player."""
        self.models.promote()

    def _put_away(self) -> None:
        """Off the device with what training does not need, where prompts are kept."""
        if self.prompts.put_away():
            move(self.pipeline.vae, device=torch.device("cpu"))

    def _bring_back(self) -> None:
        self.prompts.bring_back()
        move(self.pipeline.vae, device=self.accelerator.device)

    def release_opponent(self) -> None:
        """Free its memory; with adapters it has next to none of its own."""
        self.models.release()

    @torch.no_grad()
    def distance(self, weights: Iterable[Tensor] | None = None) -> float | None:
        """Relative, of all weights or of the adapters'; under autocast an opponent's weights are rounded, which alone
        makes about 0.002. None when the opponent was released."""
        if self.opponent is None:
            return None
        return relative_distance(self.models.pairs(weights))

    def opponent_hash(self) -> str:
        """The hash of the opponent's weights as they are now; of its adapter, if it is one."""
        return self.models.opponent_hash()

    def player_hash(self) -> str:
        """The hash of the player's weights as they are now; of its adapter, if it is one."""
        return self.models.player_hash()

    @property
    def saved(self) -> str:
        """Name of the folder that `save` writes what a user loads into."""
        return self.models.saved

    def save(self, directory: Path, *, prove: bool = True) -> list[Path]:
        """Write `unet/` below `directory`, as UNet2DConditionModel.from_pretrained reads it; or `lora/`, as a
        pipeline's load_lora_weights does and, in kohya's form, ComfyUI; with `lora_round/`, which holds the change
        since the opponent alone."""
        targets = {directory / name: write for name, write in self.models.folders().items()}
        if self.accelerator.is_main_process:
            for target, write in targets.items():
                write_folder(target, write)
            if prove:
                self._prove(directory / self.saved)
        return [*targets]

    def restore(self, directory: Path | None) -> None:
        """Load `unet/` or `lora/` below `directory`, or what the base has, into the player's parameters in place."""
        self.models.restore(directory)

    # Pictures

    def draw(
        self,
        unet: UNet2DConditionModel,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        done: Callable[[int], None] = lambda images: None,
    ) -> list[Image.Image]:
        """One image per prompt and seed by any UNet of this checkpoint."""
        batch_size = self.sampling.generation_batch_size
        return draw_images(self._pipeline(unet, sampling), prompts, seeds, sampling, batch_size=batch_size, done=done)

    def _pipeline(self, unet: UNet2DConditionModel | None, sampling: Sampling) -> Any:
        """The base's pipeline with a UNet, ready to draw."""
        self._bring_back()
        assert unet is not None, "it was released"
        return sampling_pipeline(self.pipeline, unet, sampling.sampler)

    def _base_pipeline(self) -> Any:
        """With the UNet as it was loaded at first, from the same files."""
        unet = load_unet(self.base.part(Path(self.player.config._name_or_path), "UNet", self.base.file))
        made = sampling_pipeline(self.pipeline, unet, "ddim")
        if self.base.lora is not None:
            fuse_given(made, self.base.lora, ["unet"])  # its text encoders are the pipeline's own, and have it
        return made

    def _prove(self, path: Path) -> None:
        """Load what was saved afresh: it must predict what the player predicts, and draw an image."""
        self._bring_back()
        device, cpu = self.accelerator.device, torch.device("cpu")
        fresh = self.models.fresh(path).requires_grad_(False).eval()
        cast_for_autocast(fresh, autocast_dtype(self.accelerator.mixed_precision))
        if self.channels_last:
            fresh.to(memory_format=torch.channels_last)
        size = self.resolution // self.latent_px
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(1, self.player.config.in_channels, size, size, generator=generator).to(device)
        frames = torch.tensor([images.target_frame(self.sizes[0])])
        with torch.no_grad():
            inputs = self.questions.inputs(["a proof"], [False], frames)
            t = torch.tensor([self.noising.num_timesteps // 2], device=device)
            with self.accelerator.autocast():
                ours = self.player(x_t, t, **inputs, return_dict=False)[0]
            # One at a time: a card that can train the player may have no room for both
            move(self.player, device=cpu)
            move(fresh, device=device)
            with self.accelerator.autocast():
                theirs = fresh(x_t, t, **inputs, return_dict=False)[0]
        check_prediction(ours, path)
        difference = (theirs - ours).abs().max().item()
        tolerance = 1e-5 if self.accelerator.mixed_precision == "no" else 2e-2  # kernels may round differently
        assert difference <= tolerance, f"{path}: loaded afresh it predicts something else (by {difference:.3g})"
        self.draw(fresh, ["a proof"], [0], replace(self.opponent_sampling, num_inference_steps=2))
        move(fresh, device=cpu)
        move(self.player, device=device)
