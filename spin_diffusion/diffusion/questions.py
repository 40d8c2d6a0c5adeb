"""What player and opponent are both asked about a batch: images noised at one timestep with one noise per pair, and
what their answers are compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from spin_diffusion.diffusion import errors
from spin_diffusion.diffusion.errors import timestep_weights
from spin_diffusion.diffusion.images import Size, mirrored_frame, unpacked
from spin_diffusion.diffusion.noising import Noising, draw
from spin_diffusion.diffusion.prompts import Prompts
from spin_diffusion.diffusion.settings import DenoiserSettings
from spin_diffusion.samples.sample import KIND, SECTION, Batch
from spin_diffusion.selfplay.device import sent
from spin_diffusion.selfplay.game import PairScores, ScoredBatch
from spin_diffusion.store.run_dir import seed_from

MIRRORED = "mirrored_"
"""Before the names of a mirror image's tensors."""


@dataclass(frozen=True)
class Question:
    """Noised images, both sides of a batch one after the other, and what a denoiser should say to them.

    All but the images and their targets has one row for each pair, and reaches the denoiser alike for both sides.

    Attributes:
        x_t, target: one row for each image.
        t: timestep of each pair.
        inputs: the denoiser's other inputs by the keywords of its call, tensors with one row for each pair.
        weight: what the scores of each pair are multiplied with.
        level: noise level of each pair, in [0, 1).
        real_alone: whether the generated side of each pair is left out.
    """

    x_t: Tensor
    t: Tensor
    inputs: dict[str, Tensor | dict[str, Tensor]]
    target: Tensor
    weight: Tensor
    level: Tensor
    real_alone: Tensor

    def asked_of(self, model: Callable[..., Any]) -> Tensor:
        """What a model predicts of each image, fp32."""
        inputs = {
            name: {key: self.of_sides(each) for key, each in value.items()}
            if isinstance(value, dict)
            else self.of_sides(value)
            for name, value in self.inputs.items()
        }
        predicted: Tensor = model(self.x_t, self.of_sides(self.t), **inputs, return_dict=False)[0]
        return predicted.float()

    def scores(self, predicted: Tensor) -> Tensor:
        """The score of each image."""
        return self.of_sides(self.weight) * errors.score(predicted, self.target)

    def of_sides(self, of_pairs: Tensor) -> Tensor:
        """One row of each pair -> one of each image."""
        return of_pairs.repeat(len(self.x_t) // len(self.t), *[1] * (of_pairs.ndim - 1))


class Questions:
    """Asks of batches by a run's settings. Draws depend on the pairs' seeds alone, never on a process."""

    def __init__(
        self,
        noising: Noising,
        prompts: Prompts,
        *,
        denoiser: DenoiserSettings,
        sizes: list[Size],
        channels_last: bool,
    ) -> None:
        """
        Args:
            sizes: of latents by the pairs' kind; with more than one the latents come packed.
            channels_last: whether the UNet has this memory layout, and not the plain one.
        """
        self.noising, self.prompts = noising, prompts
        self.denoiser, self.sizes, self.channels_last = denoiser, sizes, channels_last
        self.device = prompts.device
        self.weights = timestep_weights(noising, denoiser.score_weighting)

    def about(self, batch: Batch) -> Question:
        """All images of a batch, noised by the forward process at one (t, eps) per pair. `batch`: pairs of one size."""
        batch = as_visited(batch)
        x_0 = sent(torch.cat([side["latents"] for side in batch.sides]), self.device).float()
        if len(self.sizes) > 1:
            x_0 = unpacked(x_0, *self.sizes[int(batch.condition[KIND][0])])
        draws = draw(
            batch.seeds,
            tuple(x_0.shape[1:]),
            self.noising.num_timesteps,
            self.denoiser.proportion_empty_prompts,
            self.denoiser.timestep_sampling,
            batch.condition.get(SECTION),
        )
        t, eps = sent(draws.t, self.device), sent(draws.eps, self.device)
        sides = len(batch.sides)
        x_t, target = self.noising.noised_and_target(x_0, eps.repeat(sides, 1, 1, 1), t.repeat(sides))
        return Question(
            x_t=self._laid_out(x_t),
            t=t,
            inputs=self.inputs(batch.prompts, draws.dropped, batch.condition["frame"]),
            target=target,
            weight=sent(self.weights, self.device)[t],
            level=t / self.noising.num_timesteps,
            real_alone=sent(torch.tensor(draws.dropped), self.device) & (self.denoiser.dropped_captions == "real"),
        )

    def inputs(self, prompts: list[str], dropped: list[bool], frames: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """The denoiser's inputs beside x_t and t, as keywords of its call."""
        with self.prompts.autocast():
            conditioning = self.prompts.conditioning(prompts, dropped, frames)
        added = {"added_cond_kwargs": conditioning.added} if conditioning.added else {}
        return {"encoder_hidden_states": conditioning.tokens} | added

    def _laid_out(self, x_t: Tensor) -> Tensor:
        """In the UNet's memory layout."""
        return x_t.contiguous(memory_format=torch.channels_last) if self.channels_last else x_t


# Batches: which orientation a visit sees, several generated images to a real one, parts of one size


def as_visited(batch: Batch) -> Batch:
    """The batch, one to one, in which half of the pairs are the mirror images, where these are there: both images and
    the frame of a pair together."""
    if f"{MIRRORED}latents" not in batch.real:
        return batch
    flips = torch.tensor([seed_from(seed, "flip") % 2 == 1 for seed in batch.seeds])

    def chosen(as_is: Tensor, mirrored: Tensor) -> Tensor:
        return torch.where(flips.to(as_is.device).view(-1, *[1] * (as_is.dim() - 1)), mirrored, as_is)

    def seen(side: dict[str, Tensor]) -> dict[str, Tensor]:
        return side | {"latents": chosen(side["latents"], side[f"{MIRRORED}latents"])} if side else side

    frames = batch.condition["frame"]
    mirrored = frames.new_tensor([mirrored_frame(frame) for frame in frames.tolist()])
    return replace(
        batch,
        real=seen(batch.real),
        generated=seen(batch.generated),
        condition=batch.condition | {"frame": chosen(frames, mirrored)},
    )


def one_to_one(batch: Batch) -> Batch:
    """The batch with each real row as often as it has generated ones, all at its noise."""
    if not batch.generated or len(next(iter(batch.generated.values()))) == len(batch.ids):
        return batch
    copies = len(next(iter(batch.generated.values()))) // len(batch.ids)
    real = {name: tensor.repeat_interleave(copies, dim=0) for name, tensor in batch.real.items()}
    return batch.with_sides(real, batch.generated, copies)


def by_kind(batch: Batch) -> list[tuple[list[int], Batch]]:
    """A batch in parts of one kind each, with the places of their pairs; one to one."""
    kinds = batch.condition.get(KIND)
    if kinds is None or (kinds == kinds[0]).all():
        return [(list(range(len(batch.ids))), batch)]
    parts = []
    for kind in kinds.unique():
        places = (kinds == kind).nonzero().flatten().tolist()
        real, generated, condition = (
            {name: tensor[places] for name, tensor in tensors.items()}
            for tensors in (batch.real, batch.generated, batch.condition)
        )
        ids, prompts, seeds = ([each[place] for place in places] for each in (batch.ids, batch.prompts, batch.seeds))
        parts.append((places, Batch(ids, prompts, real, generated, seeds, condition)))
    return parts


def in_order(parts: list[ScoredBatch], places: list[list[int]]) -> ScoredBatch:
    """The scores of parts of a batch, back at the places of their pairs."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for part in places for place in part]).argsort()

    def together(parts_of_batch: list[Tensor]) -> Tensor:
        return torch.cat(parts_of_batch)[sent(order, parts_of_batch[0].device)]

    scores = PairScores(
        *(together([getattr(part.scores, field.name) for part in parts]) for field in fields(PairScores))
    )
    return ScoredBatch(scores, together([part.level for part in parts]))
