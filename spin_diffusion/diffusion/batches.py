"""Batches of pairs: which orientation a visit sees, several generated images to a real one, parts of one size."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from spin_diffusion.diffusion.images import mirrored_frame
from spin_diffusion.samples.sample import KIND, Batch
from spin_diffusion.selfplay.game import ScoredBatch
from spin_diffusion.selfplay.pair_scores import PairScores
from spin_diffusion.selfplay.sending import sent
from spin_diffusion.store.run_dir import seed_from

MIRRORED = "mirrored_"
"""Before the names of a mirror image's tensors."""


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
    scales = [part.generated_scale for part in parts if part.generated_scale is not None]
    return ScoredBatch(scores, together([part.level for part in parts]), together(scales) if scales else None)
