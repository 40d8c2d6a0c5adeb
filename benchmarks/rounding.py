"""How much of r is rounding: a run's scores with its UNets in bf16 autocast beside the same ones in fp32.

    python training/train_spin_sdxl.py --config training/configs/toy_sdxl.yaml --rounds 1 --max_train_samples 320 \\
      --max_train_steps 40 --train_batch_size 32 --compare_with null --validation_prompts null \\
      --scorers null --output_dir runs/rounding
    python benchmarks/rounding.py runs/rounding

The player of a round and the opponent that it started from score the round's pairs in both precisions, at the same
noise; with `--way 1 0.1` also a player that has gone a tenth of its way, as after the first steps.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timing import machine, report

from spin_diffusion.diffusion.config import Config, parse_config
from spin_diffusion.runs.image_run import open_game
from spin_diffusion.samples.sample import Batch
from spin_diffusion.samples.shards import Part, some_pairs
from spin_diffusion.selfplay.record import SAMPLES, read_record
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.run_dir import seed_from


@torch.no_grad()
def scored(config: Config, run: Path, round_: int, pairs: int, precision: str, way: float) -> torch.Tensor:
    """Level, r_real and r_generated of so many pairs of a round, (pairs, 3) in fp64, with the UNets in a precision.

    Args:
        way: how far the player is on its way from the opponent's weights to those of the end of the round, in [0, 1].
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    game = open_game(config, Accelerator(mixed_precision=precision))
    folder = run / f"round-{round_}"
    parent, of = read_record(folder)["parent"], config.rounds.real_parts
    game.restore(run / f"round-{parent}" if parent else None)
    game.promote()
    before = [parameter.detach().clone() for parameter in trained_parameters(game)]
    game.restore(folder)
    for parameter, start in zip(trained_parameters(game), before, strict=True):
        parameter.copy_(start.lerp(parameter, way))
    real, generated = some_pairs(run / "data", folder / SAMPLES, Part((round_ - 1) % of, of), pairs)
    found = []
    for start in range(0, len(real), config.training.train_batch_size):
        rows, others = (side[start : start + config.training.train_batch_size] for side in (real, generated))
        seeds = [seed_from("rounding", row["id"]) for row in rows]
        ids, prompts = [row["id"] for row in rows], [row["prompt"] for row in rows]
        batch = game.scores(game.player, Batch(ids, prompts, game.encode(rows), game.encode(others), seeds))
        found.append(torch.stack([batch.level, batch.scores.r_real, batch.scores.r_generated], dim=1).double().cpu())
    return torch.cat(found)


def shares(exact: torch.Tensor, rounded: torch.Tensor) -> dict[str, float]:
    """Standard deviations of r (both sides together) and of the margin in fp32, and of what bf16 changes in them in
    parts of these."""
    margins = [each[:, 1] - each[:, 2] for each in (exact, rounded)]
    r, error = exact[:, 1:].flatten(), (rounded - exact)[:, 1:].flatten()
    return {
        "pairs": len(exact),
        "r_std": r.std().item(),
        "r_rounding": (error.std() / r.std()).item(),
        "margin_std": margins[0].std().item(),
        "margin_rounding": ((margins[1] - margins[0]).std() / margins[0].std()).item(),
    }


def by_quarter(exact: torch.Tensor, rounded: torch.Tensor) -> dict[str, dict[str, float]]:
    """The shares of all pairs, and of those in each quarter of the noise levels from clean to noisy."""
    quarters = (exact[:, 0] * 4).long()
    parts = {f"quarter_{number + 1}": quarters == number for number in range(4)}
    return {name: shares(exact[mine], rounded[mine]) for name, mine in ({"all": quarters >= 0} | parts).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of images")
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--way", type=float, nargs="+", default=[1.0], help="shares of the player's way")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    config = parse_config(["--config", str(args.run / "config.yaml")])
    found = {
        way: by_quarter(*(scored(config, args.run, args.round, args.pairs, how, way) for how in ("no", "bf16")))
        for way in args.way
    }
    report(
        {
            "benchmark": "rounding", "base": config.model.pretrained_model_name_or_path, "round": args.round,
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"), "by_way": found,
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
