"""Batches of pairs: which orientation a visit sees, several generated images to a real one, parts of one size."""

from dataclasses import fields

import torch
from torch import Tensor

from spin_diffusion.selfplay.game import KIND, Batch, ScoredBatch
from spin_diffusion.selfplay.objectives import PairScores
from spin_diffusion.selfplay.run_dir import seed_from
from spin_diffusion.selfplay.sending import sent

MIRRORED = "mirrored_"
"""Before the names of a mirror image's tensors."""


def as_visited(side: dict[str, Tensor], seeds: list[int]) -> dict[str, Tensor]:
    """One side of a batch, in which half of the pairs are the mirror images, where these are there."""
    if f"{MIRRORED}latents" not in side:
        return side
    flips = torch.tensor([seed_from(seed, "flip") % 2 == 1 for seed in seeds])

    def chosen(name: str) -> Tensor:
        as_is = side[name]
        return torch.where(flips.to(as_is.device).view(-1, *[1] * (as_is.dim() - 1)), side[MIRRORED + name], as_is)

    return side | {"latents": chosen("latents"), "frame": chosen("frame")}


def one_to_one(batch: Batch) -> Batch:
    """The batch with each real row as often as it has generated ones, all at its noise."""
    if not batch.generated or len(next(iter(batch.generated.values()))) == len(batch.ids):
        return batch
    copies = len(next(iter(batch.generated.values()))) // len(batch.ids)
    return Batch(
        *([value for value in values for _ in range(copies)] for values in (batch.ids, batch.prompts)),
        {name: tensor.repeat_interleave(copies, dim=0) for name, tensor in batch.real.items()},
        batch.generated,
        [seed for seed in batch.seeds for _ in range(copies)],
    )


def by_kind(batch: Batch) -> list[tuple[list[int], Batch]]:
    """A batch in parts of one kind each, with the places of their pairs; one to one."""
    if KIND not in batch.real or (batch.real[KIND] == batch.real[KIND][0]).all():
        return [(list(range(len(batch.ids))), batch)]
    parts = []
    for kind in batch.real[KIND].unique():
        places = (batch.real[KIND] == kind).nonzero().flatten().tolist()
        real, generated = (
            {name: tensor[places] for name, tensor in side.items()} for side in (batch.real, batch.generated)
        )
        ids, prompts, seeds = ([each[place] for place in places] for each in (batch.ids, batch.prompts, batch.seeds))
        parts.append((places, Batch(ids, prompts, real, generated, seeds)))
    return parts


def in_order(parts: list[ScoredBatch], places: list[list[int]]) -> ScoredBatch:
    """The scores of parts of a batch, back at the places of their pairs."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for part in places for place in part]).argsort()

    def together(found: list[Tensor]) -> Tensor:
        return torch.cat(found)[sent(order, found[0].device)]

    scores = PairScores(
        *(together([getattr(part.scores, field.name) for part in parts]) for field in fields(PairScores))
    )
    scales = [part.generated_scale for part in parts if part.generated_scale is not None]
    return ScoredBatch(scores, together([part.level for part in parts]), together(scales) if scales else None)
