"""The opponent's scores of samples, computed once and kept beside them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.samples.sample import of_side
from spin_diffusion.samples.shards import Part, rows_in, shards
from spin_diffusion.store.files import Made, Piece, build_together, is_built, read_tensors, write_tensors
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.run_dir import file_hash


@runtime_checkable
class KeepsScores(Protocol):
    """Whoever gives each sample one score."""

    def opponent_scores(self, tensors: dict[str, Tensor]) -> Tensor:
        """The opponent's score of each row, (rows,) fp32."""
        ...


def score_shards(
    source: Path,
    target: Path,
    game: KeepsScores,
    part: Part,
    prefix: str,
    opponent: str,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> None:
    """For each shard of tensors in `source` let one process write the opponent's scores of the rows of `part`.

    Args:
        opponent: its hash, which is stored beside them; scores by another are computed again.
    """

    def piece_of(path: Path) -> Piece:
        tensors = {name: tensor[part.places] for name, tensor in of_side(read_tensors(path), prefix).items()}
        rows = len(next(iter(tensors.values()))) if tensors else 0

        def make(tell: Callable[[int], None]) -> Made:
            scores = game.opponent_scores(tensors) if rows else torch.zeros(0)
            assert scores.shape == (rows,) and scores.dtype == torch.float32
            return Made(_finite_scores(scores.cpu(), path), {"opponent": opponent})

        key = key_of(opponent=opponent, tensors=file_hash(path), prefix=prefix, part=[part.index, part.of])
        return Piece(target / path.name, key, rows, make)

    build_together(shards(source, ".safetensors"), piece_of, accelerator, progress)


def score_draws(
    source: Path,
    target: Path,
    part: Part,
    scores_at: Callable[[list[int], int], tuple[Tensor, Tensor]],
    draws: int,
    seed: int,
    round_: int,
    batch_size: int,
    opponent: str,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> None:
    """For each shard of the real samples in `source` let one process write the opponent's scores of its pairs at all
    their fixed draws, (rows, draws), into `target`/real and `target`/generated.

    Args:
        scores_at: (numbers of pairs, draw) -> the opponent's scores of their real rows and of the generated ones, fp32.
        draws: of each pair.
        batch_size: pairs per forward pass; with the training's, both models' scores are rounded alike.
        opponent: its hash, which is stored beside them; scores by another are computed again.
    """
    sizes = [(path, len(range(rows_in(path))[part.places])) for path in shards(source, ".parquet")]
    first = itertools.accumulate((rows for _, rows in sizes), initial=0)

    def piece_of(shard: tuple[tuple[Path, int], int]) -> Piece:
        (path, rows), start_of_shard = shard
        real, generated = (target / side / f"{path.stem}.safetensors" for side in ("real", "generated"))
        key = key_of(
            opponent=opponent,
            samples=file_hash(path),
            part=[part.index, part.of],
            draws=draws,
            seed=seed,
            round=round_,
            batch=batch_size,
        )

        def batch_scores(draw: int, start: int, tell: Callable[[int], None]) -> tuple[Tensor, Tensor]:
            tell((draw * rows + start) // draws)
            return scores_at(list(range(start_of_shard + start, start_of_shard + min(start + batch_size, rows))), draw)

        def make(tell: Callable[[int], None]) -> Made:
            starts = range(0, rows, batch_size)
            by_draw = [[batch_scores(draw, start, tell) for start in starts] for draw in range(draws)]
            by_side = []
            for side, path_of_side in enumerate((real, generated)):
                columns = [[torch.zeros(0), *(both[side].cpu() for both in batches)] for batches in by_draw]
                stacked = torch.stack([torch.cat(column) for column in columns], dim=1)
                by_side.append(_finite_scores(stacked, path_of_side))
            write_tensors(real, by_side[0], {"opponent": opponent, KEY: key})
            return Made(by_side[1], {"opponent": opponent})

        return Piece(generated, key, rows, make, lambda: is_built(real, key))

    build_together(list(zip(sizes, first, strict=False)), piece_of, accelerator, progress)


def _finite_scores(scores: Tensor, path: Path) -> dict[str, Tensor]:
    """The opponent's scores as they are stored; FloatingPointError, with the path, when one is not finite."""
    if not scores.isfinite().all():
        raise FloatingPointError(f"{path}: the opponent's score of a sample is not finite; look at the samples")
    return {"opponent_score": scores}


def mix_scores(sources: dict[Path, float], target: Path, opponent: str, accelerator: Accelerator) -> None:
    """The scores of the mixture of this hash, from the folders of its members' scores and their weights."""
    weights = torch.tensor(list(sources.values()))

    def piece_of(path: Path) -> Piece:
        members = [folder / path.name for folder in sources]

        def make(tell: Callable[[int], None]) -> Made:
            scores = torch.stack([read_tensors(member)["opponent_score"] for member in members])
            return Made({"opponent_score": mixture_score(scores, weights)}, {"opponent": opponent})

        key = key_of(opponent=opponent, members=[file_hash(member) for member in members])
        return Piece(target / path.name, key, 0, make)

    build_together(shards(next(iter(sources)), ".safetensors"), piece_of, accelerator, lambda done, text: None)


def mixture_score(scores: Float[Tensor, "members rows"], weights: Float[Tensor, " members"]) -> Float[Tensor, " rows"]:
    """log of the mixture's density: log sum_k w_k exp(score_k), of log-likelihoods."""
    return torch.logsumexp(scores + weights.log()[:, None], dim=0)
