"""What a round costs a language model in floating-point operations, from the lengths of its answers.

A forward pass is counted on the real model by torch's counter (a multiplication and an addition are two) at two
lengths, which tells what grows with the tokens from what grows with their square. The rest is arithmetic on the lengths
of the stored answers, row by row. What is approximated: rows are counted without what fills up their batches, attention
as if every token saw every other one (a causal kernel may skip half of it, a sliding window more), a mixture of experts
as far as the counter knows its kernels, and a backward pass as two forward ones (one for weights that stand still).
What is left out: the optimizer, the output layer's recomputation in chunks, and every evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.logprobs import answer_logprobs, applies_head_to_hidden_states, language_model
from spin_diffusion.samples.shards import shards
from spin_diffusion.selfplay.device import autocast_dtype, counted, matrix_rate
from spin_diffusion.selfplay.one_round import Costs
from spin_diffusion.selfplay.record import read_record
from spin_diffusion.selfplay.round_settings import RoundSettings, source_of
from spin_diffusion.selfplay.train_settings import of_round
from spin_diffusion.store.files import read_rows

Lengths = tuple[np.ndarray, np.ndarray]
"""Tokens of the prompts and of the answers, one of each for every row."""


@dataclass(frozen=True)
class TokenCosts:
    """FLOPs of a forward pass."""

    token: float
    """FLOPs of a token in all layers with weights, the output's only where it cannot be asked for answers alone."""
    pair: float
    """FLOPs of a pair of tokens, one of which sees the other."""
    head: float
    """FLOPs of the output layer, for a token of an answer."""

    def scoring(self, lengths: Lengths) -> float:
        """The mean over rows of a forward pass that scores an answer behind its prompt."""
        prompt, answer = lengths
        whole = prompt + answer
        return float(np.mean(self.token * whole + self.pair * whole**2 + self.head * answer))

    def backward(self, lengths: Lengths, trains_weights: bool) -> float:
        """The same of the pass back. Adapters alone need no gradient of the weights, but one through them."""
        prompt, answer = lengths
        whole = prompt + answer
        weights = self.token * whole + self.head * answer
        return float(np.mean((2 if trains_weights else 1) * weights + 2 * self.pair * whole**2))

    def drawing(self, lengths: Lengths) -> float:
        """The mean over rows of drawing an answer, the keys and values of what stands before it kept: one pass over the
        prompt, then one over each token but the last."""
        prompt, answer = lengths
        steps = answer - 1
        seen = prompt**2 + steps * prompt + steps * (steps + 1) / 2
        return float(np.mean(self.token * (prompt + steps) + self.pair * seen + self.head * answer))


def count_tokens(model: nn.Module, length: int) -> TokenCosts:
    """The costs of a causal language model, or of one with adapters, counted on it.

    Args:
        length: about as many tokens as a row has; at least 8 are taken.
    """
    length = max(8, length // 4 * 4)
    applies_head_to_hidden_states(language_model(model))  # it finds that out once, by passes of its own

    def forward(tokens: int, answers: int) -> int:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
        mask = torch.arange(tokens, device=ids.device)[None] >= tokens - answers
        with torch.no_grad():
            return counted(lambda: answer_logprobs(model, ids, mask))[0]

    whole, half, all_answers = forward(length, 1), forward(length // 2, 1), forward(length, length - 1)
    head = (all_answers - whole) / (length - 2)
    pair = (whole - head - 2 * (half - head)) / (length**2 / 2)
    return TokenCosts(token=(whole - head) / length - pair * length, pair=pair, head=head)


def lengths_of(folder: Path, answers: str = "tokens") -> Lengths:
    """Lengths of all rows of the stored samples in a folder.

    Args:
        answers: the column of the answers.
    """
    found: list[Any] = []
    for path in shards(folder, ".parquet"):
        rows = read_rows(path, columns=["prompt_ids", answers])
        found.append([[len(row[name]) for row in rows] for name in ("prompt_ids", answers)])
    prompt, answer = (np.concatenate(columns, dtype=np.float64) for columns in zip(*found, strict=True))
    return prompt, answer


def ledger_costs(
    game: LanguageGame,
    output_dir: Path,
    *,
    forwards: int,
) -> Callable[[RoundSettings, Path], Costs]:
    """For the ledgers: (rounds, their folder) -> what their phases take.

    Args:
        forwards: passes of the player for each score: more than 1 where activations are computed again.
    """
    real = lengths_of(output_dir / "data" / "samples")
    unit = count_tokens(game.model, int(np.mean(real[0] + real[1])))
    dtype = autocast_dtype(game.accelerator.mixed_precision) or torch.float32
    rate = matrix_rate(game.accelerator.device, dtype)

    def of(rounds: RoundSettings, folder: Path) -> Costs:
        def flops(k: int, phase: str, samples: int) -> int | None:
            source, directory = source_of(rounds, of_round(rounds.objective, k)), folder / f"round-{k}"
            sides = [(1.0, real)]
            if source == "opponent":
                sides.append((float(rounds.num_generated), lengths_of(directory / "samples")))
            elif source == "data":
                sides.append((1.0, lengths_of(output_dir / "data" / "samples", "loser_tokens")))
            if phase == "generated":
                return round(samples * unit.drawing(sides[1][1]))
            if phase == "judged":  # the opponent's scores are kept
                return round(samples * sum(copies * unit.scoring(lengths) for copies, lengths in sides))
            if phase == "cached":  # counted in generated answers
                anchors = len(read_record(directory)["opponent"]["anchors"])
                pair = sum(copies * unit.scoring(lengths) for copies, lengths in sides)
                return round(samples / rounds.num_generated * anchors * pair)
            if phase == "trained":
                pair = sum(
                    copies * (forwards * unit.scoring(lengths) + unit.backward(lengths, not game.settings.use_lora))
                    for copies, lengths in sides
                )
                return round(samples * pair)
            return None

        return Costs(flops, rate)

    return of
