"""Self-labelled candidates: pairs of the opponent's own samples, told apart by a judge.

For a prompt the opponent draws several candidates; the best by the judge plays the real side and the worst the
generated one, as SAIL does it with its own implicit reward for a judge (arXiv 2602.05380). The other prompts of a mix
keep the data's sample as their real side. What was chosen lies beside the samples, shard by shard, in `choices/`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from accelerate import Accelerator

from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.shards import rows_in, shards
from spin_diffusion.store.files import Made, Piece, build_together, read_rows
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.run_dir import file_hash, seed_from

Judge = Callable[[list[Row]], list[float]]
"""Stored samples -> one finite score each, larger = better. The same rows must get the same scores."""


@dataclass(frozen=True)
class Candidates:
    """What the rounds need to know of them.

    Attributes:
        num: candidates for each prompt that is self-labelled, at least 2.
        share: of the prompts that are, in (0, 1].
        judge: what its choices depend on, in one line; choices by another are made again.
        load_judge: called in each round by every process, before anything is drawn; the judge is let go afterwards.
    """

    num: int
    share: float
    judge: str
    load_judge: Callable[[], Judge]

    def drawn_for(self, seed: int, round_: int, id_: str) -> int:
        """Samples to draw for a prompt: `num`, or 1 if it is not self-labelled. A function of its arguments alone."""
        return self.num if seed_from("candidates", seed, round_, id_) < self.share * 2**63 else 1

    @property
    def drawn_on_average(self) -> float:
        """Samples per prompt."""
        return 1 + self.share * (self.num - 1)

    @property
    def metadata(self) -> dict[str, str]:
        """What decides which samples there are."""
        return {"candidates": f"{self.num} for {self.share:g} of the prompts"}


def best_and_worst(scores: list[float]) -> tuple[int, int] | None:
    """Where the highest and the lowest score are, the first of equal ones; None when all are equal."""
    best, worst = max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__)
    return (best, worst) if scores[best] > scores[worst] else None


def choose(rows: list[Row], judge: Judge) -> list[Row]:
    """For each prompt of a shard which samples make its pair.

    Args:
        rows: the shard's samples, in the order of (place, k).

    Returns:
        One row for each prompt, in order of place. `real` and `generated` are the k of the samples on the two sides;
        real = None: the data's own sample. generated = None: left out, since all candidates have one score. `scores`:
        of its candidates, by k; None where there is one sample, which is not judged.
    """
    by_place = [list(group) for _, group in groupby(rows, key=lambda row: row["place"])]
    judged = [row for group in by_place if len(group) > 1 for row in group]
    scores = judge(judged) if judged else []
    assert len(scores) == len(judged)
    remaining = iter(scores)
    chosen = []
    for group in by_place:
        found: Row = {"id": group[0]["id"], "place": group[0]["place"], "real": None, "generated": group[0]["k"]}
        found["scores"] = None
        if len(group) > 1:
            found["scores"] = [float(next(remaining)) for _ in group]
            ends = best_and_worst(found["scores"])
            found |= {"real": None, "generated": None}
            if ends is not None:
                found |= {"real": group[ends[0]]["k"], "generated": group[ends[1]]["k"]}
        chosen.append(found)
    return chosen


def judge_shards(
    source: Path,
    target: Path,
    judge: Judge,
    metadata: dict[str, str],
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> None:
    """For each shard of samples in `source` let one process write one shard of choices; those of these samples and
    this judge stay.

    A shard is judged whole by one process, so the choices do not depend on how many there are.
    """

    def piece_of(path: Path) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            return Made(choose(read_rows(path), judge), metadata)

        return Piece(target / path.name, key_of(samples=file_hash(path), **metadata), rows_in(path), make)

    build_together(shards(source, ".parquet"), piece_of, accelerator, progress)


def chosen_samples(samples: Path, choices: Path) -> list[Row]:
    """The rows of a shard of samples that take part in a pair, in the order that `open_pairs` expects."""
    kept = {(row["place"], row[side]) for row in read_rows(choices) for side in ("real", "generated")}
    return [row for row in read_rows(samples) if (row["place"], row["k"]) in kept]


class Summary(TypedDict):
    """What a folder of choices comes to."""

    pairs: int
    """Those that are trained on."""
    self_labelled: int
    """Prompts with candidates."""
    ties_left_out: float
    """The share of them that is left out."""
    mean_best: float | None
    """Scores over all of them, ties included; None without any."""
    mean_worst: float | None


def summary(choices: Path) -> Summary:
    """What a folder of choices comes to."""
    rows = [row for path in shards(choices, ".parquet") for row in read_rows(path)]
    scores = [row["scores"] for row in rows if row["scores"] is not None]
    ties = sum(row["generated"] is None for row in rows)
    return {
        "pairs": len(rows) - ties,
        "self_labelled": len(scores),
        "ties_left_out": ties / len(scores) if scores else 0.0,
        "mean_best": math.fsum(max(one) for one in scores) / len(scores) if scores else None,
        "mean_worst": math.fsum(min(one) for one in scores) / len(scores) if scores else None,
    }
