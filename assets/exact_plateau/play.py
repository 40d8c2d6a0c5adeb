"""Self-play against fine-tuning at equal compute, where maximum likelihood has nothing left to gain, and where it has.

    python assets/exact_plateau/play.py --output_dir runs/plateau

Ten denoisers of a limited class are fitted exactly to a world in the plane whose density is known; then each is
trained further by every method, with the same number of forward and backward passes, drawing included. A second panel
begins from the same denoisers stopped early. The losses are those of `spin_diffusion.selfplay.objectives`, the rule
that of `spin_diffusion.diffusion.errors`. Prints the table, and writes it with a picture of the samples.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from denoiser import Denoisers, Features, Question, ask, draw, fit, random_question
from measures import MEASURES, Measures
from plane import CLASSES, World

from spin_diffusion.diffusion.errors import scale_gradient, score, winner_preserving_scale
from spin_diffusion.evaluation.statistics import paired_difference
from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.objectives import Loss, bind
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError

BASE, SFT = "base", "SFT, rate 3e-4"
ALSO_AT_THE_FREE_SETTING = (BASE, SFT, "SPIN", "SPACE")
MODELS, HIDDEN = 10, 128
ROUNDS, STEPS, BATCH, RATE = 8, 80, 128, 3e-4
OPPONENT_SAMPLES = 1_024
"""Points that the opponent draws in each round, visited again and again."""
SAMPLER_STEPS = 24
EVALUATED = 6_000
"""Points drawn from each denoiser to judge it."""
UNFINISHED_STEPS = 20
"""Steps of Adam from nothing after which the bases of the second panel were stopped."""


class Free(NamedTuple):
    """How a denoiser is drawn: what costs no training."""

    steps: int = SAMPLER_STEPS
    prediction_scale: float = 1.0
    guidance: float = 1.0


FREE_SETTINGS = [
    Free(steps, scale, guidance) for steps in (24, 48) for scale in (1.0, 1.03, 1.06) for guidance in (1.0, 1.5)
]
PANELS = {
    "finished": "the exact optimum of its class",
    "unfinished": f"stopped after {UNFINISHED_STEPS} steps of training",
}


@dataclass(frozen=True)
class Method:
    """One row: its loss (None = supervised), the share of the real side's descent that the rule keeps, and its rate."""

    name: str
    loss: Loss | None = None
    keep: float | None = None
    rate: float = RATE


METHODS = [
    Method("SFT, rate 3e-5", rate=3e-5),
    Method("SFT, rate 3e-4", rate=3e-4),
    Method("SFT, rate 3e-3", rate=3e-3),
    Method("SPIN", bind("spin", beta=3.0)),
    Method("SPIN with the rule", bind("spin", beta=3.0), keep=0.0),
    Method("SPACE", bind("space", mu=1.0, beta=3.0)),
    Method("DDO, alpha 4", bind("ddo", alpha=4.0, beta=3.0)),
]


def forward_passes_of_self_play() -> int:
    """Passes of one point through a denoiser in all rounds; a backward pass counts as two.

    A pair's two sides go forward and backward through the player and forward through the opponent, 8 passes; Heun's
    method takes 2 steps - 1 of them for each of the opponent's points.
    """
    return ROUNDS * (STEPS * 8 * BATCH + OPPONENT_SAMPLES * (2 * SAMPLER_STEPS - 1))


def supervised_steps() -> int:
    """Steps of fine-tuning, 3 passes a point, for the passes of self-play."""
    return round(forward_passes_of_self_play() / (3 * BATCH))


def scores_of(denoisers: Denoisers, question: Question) -> tuple[Tensor, Tensor]:
    """The score of every point, flat (models * batch,), and the prediction behind it as an image of two channels."""
    prediction = denoisers.predict(question).flatten(0, 1)[..., None, None]
    return score(prediction, question.target.flatten(0, 1)[..., None, None]), prediction


def steps_of(readout: Tensor, rate: float, count: int, loss_of_step: Callable[[Tensor], Tensor]) -> Tensor:
    """`count` steps of Adam on a read-out; the loss is a sum over models, so that each has its own gradient."""
    readout = readout.clone().requires_grad_()
    optimizer = torch.optim.Adam([readout], lr=rate, betas=(0.9, 0.99))
    for _ in range(count):
        optimizer.zero_grad()
        loss_of_step(readout).backward()
        optimizer.step()
    return readout.detach()


def fine_tune(base: Denoisers, world: World, rate: float, count: int, seed: int) -> Denoisers:
    """Supervised training on fresh draws of the data."""
    generator = torch.Generator().manual_seed(seed)
    models = base.readout.shape[0]

    def loss(readout: Tensor) -> Tensor:
        labels = torch.randint(CLASSES, (models, BATCH), generator=generator)
        points = world.draw(labels, generator)
        question = ask(points, *random_question(points, labels, 0.1, generator))
        return -scores_of(base.with_readout(readout), question)[0].mean() * models

    return base.with_readout(steps_of(base.readout, rate, count, loss))


def play_round(opponent: Denoisers, world: World, method: Method, seed: int) -> Denoisers:
    """One round: the opponent draws, the player learns to tell its points from the data's."""
    generator = torch.Generator().manual_seed(seed)
    models = opponent.readout.shape[0]
    pool_labels = torch.arange(OPPONENT_SAMPLES).remainder(CLASSES).expand(models, -1)
    pool = draw(opponent, pool_labels, generator, SAMPLER_STEPS)

    def loss(readout: Tensor) -> Tensor:
        player = opponent.with_readout(readout)
        chosen = torch.randint(OPPONENT_SAMPLES, (models, BATCH), generator=generator)
        labels = pool_labels.gather(1, chosen)
        generated = pool.gather(1, chosen[..., None].expand(-1, -1, 2))
        real = world.draw(labels, generator)
        shared = random_question(real, labels, 0.1, generator)
        real_question, generated_question = ask(real, *shared), ask(generated, *shared)
        player_real, prediction_real = scores_of(player, real_question)
        player_generated, prediction_generated = scores_of(player, generated_question)
        if method.keep is not None:
            targets = [q.target.flatten(0, 1)[..., None, None] for q in (real_question, generated_question)]
            allowed = winner_preserving_scale(
                prediction_real, targets[0], prediction_generated, targets[1], method.keep
            )
            player_generated = scale_gradient(player_generated, allowed)
        with torch.no_grad():
            opponent_real, opponent_generated = (
                scores_of(opponent, question)[0] for question in (real_question, generated_question)
            )
        assert method.loss is not None
        scores = PairScores(player_real, player_generated, opponent_real, opponent_generated)
        return method.loss(scores).mean() * models

    return opponent.with_readout(steps_of(opponent.readout, method.rate, STEPS, loss))


def train(base: Denoisers, world: World, method: Method, seed: int) -> Denoisers:
    """`base` after all rounds of a method, or after fine-tuning for as many passes."""
    if method.loss is None:
        return fine_tune(base, world, method.rate, supervised_steps(), seed)
    for round_ in range(ROUNDS):
        base = play_round(base, world, method, seed + round_)
    return base


@cache
def measures_of_world() -> Measures:
    """The measures, whose reference takes a second; one process makes several rows."""
    return Measures(World())


@cache
def make_base(panel: str, seed: int) -> Denoisers:
    """Models of new features: at the exact optimum of their class, or after UNFINISHED_STEPS of Adam towards it."""
    world = World()
    features = Features.random(MODELS, HIDDEN, torch.Generator().manual_seed(seed))
    base = fit(features, world, 150_000, torch.Generator().manual_seed(seed + 1))
    if panel == "finished":
        return base
    return fine_tune(base.with_readout(torch.zeros_like(base.readout)), world, 1e-3, UNFINISHED_STEPS, seed + 2)


def measured(denoisers: Denoisers, measures: Measures, free: Free, points: int = EVALUATED) -> np.ndarray:
    """The measures of each model, (models, measures), averaged over the classes; always the same noise."""
    by_class = []
    for label in range(CLASSES):
        labels = torch.full((denoisers.readout.shape[0], points // CLASSES), label)
        drawn = draw(denoisers, labels, torch.Generator().manual_seed(label), *free)
        by_class.append([list(measures(samples, label).values()) for samples in drawn])
    return np.mean(by_class, axis=0)


def best_free_setting(panel: str) -> Free:
    """The setting of FREE_SETTINGS at which other bases, made in the same way, have the smallest JS divergence."""
    torch.set_num_threads(1)
    others, measures = make_base(panel, seed=900), measures_of_world()
    js = list(MEASURES).index("js")
    return min(FREE_SETTINGS, key=lambda free: measured(others, measures, free, points=1_000)[:, js].mean())


class Result(NamedTuple):
    """What one row shows: measures as drawn plainly and at the free setting, and the samples of the first model."""

    plain: np.ndarray
    free: np.ndarray | None
    samples: np.ndarray


def result_of(panel: str, name: str, free: Free) -> Result:
    """Train one method in one panel and judge it; run in a process of its own."""
    torch.set_num_threads(1)
    model, measures = make_base(panel, seed=1), measures_of_world()
    if name != BASE:
        model = train(model, World(), next(method for method in METHODS if method.name == name), seed=100)
    labels = torch.arange(EVALUATED).remainder(CLASSES).expand(MODELS, -1)
    samples = draw(model, labels, torch.Generator().manual_seed(7), *Free())[0].numpy()
    at_free = measured(model, measures, free) if name in ALSO_AT_THE_FREE_SETTING else None
    return Result(measured(model, measures, Free()), at_free, samples)


def table(panel: str, results: dict[str, Result], free: Free) -> str:
    """Markdown: the base's measures, then each row's difference to the base with its 95 % interval over the bases."""
    base = results[BASE].plain
    lines = [
        f"Base: {PANELS[panel]}. Lower is better; the base's numbers, then differences to it, 95 % intervals over "
        f"{MODELS} bases.",
        "",
        "| | " + " | ".join(MEASURES.values()) + " |",
        "|---|" + "---:|" * len(MEASURES),
        "| base | " + " | ".join(f"{value:.3f}" for value in base.mean(axis=0)) + " |",
    ]
    plain = [(name, result.plain) for name, result in results.items() if name != BASE]
    finer = [(f"{name} *", result.free) for name, result in results.items() if result.free is not None]
    for name, values in plain + finer:
        intervals = [paired_difference(values[:, k], base[:, k]) for k in range(len(MEASURES))]
        cells = [f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for i in intervals]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"\\* drawn with {free.steps} steps, prediction times {free.prediction_scale:g}, guidance {free.guidance:g}: "
        "where other bases, untouched, have the smallest JS divergence. All else is drawn with "
        f"{SAMPLER_STEPS} steps, without scale or guidance.",
    ]
    return "\n".join(lines)


def picture(results: dict[str, Result], path: Path) -> None:
    """Samples of the data, one base, and that base after fine-tuning and after self-play."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = torch.arange(EVALUATED).remainder(CLASSES)
    world = World()
    data = world.draw(labels, torch.Generator().manual_seed(8)).numpy()
    shown = {"data": data, "base, fully trained": results[BASE].samples}
    shown |= {
        f"after {name}": results[full].samples for name, full in (("fine-tuning", SFT), ("self-play (SPIN)", "SPIN"))
    }
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.7), layout="constrained")
    for panel, (title, points) in zip(panels, shown.items(), strict=True):
        outside = np.zeros(len(points), dtype=bool)
        for label, reference in enumerate(measures_of_world().references):
            where = labels.numpy() == label
            outside[where] = (world.log_density(torch.from_numpy(points[where]), label) < reference.threshold).numpy()
        panel.scatter(*points[~outside].T, s=0.6, color="#0072b2", linewidths=0)
        panel.scatter(*points[outside].T, s=0.9, color="#d55e00", linewidths=0)
        panel.set(
            title=f"{title}\n{outside.mean():.0%} outside the data",
            xlim=(-3, 3),
            ylim=(-3, 3),
            aspect="equal",
            xticks=[],
            yticks=[],
        )
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Train every method in both panels, two at a time; print and write the tables, the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/plateau"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    args = parser.parse_args(argv)
    try:
        take_folder(args.output_dir, "exact plateau")
    except InputError as error:
        parser.error(str(error))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        free = dict(zip(PANELS, pool.map(best_free_setting, PANELS), strict=True))
        names = [BASE, *(method.name for method in METHODS)]
        waiting = {
            pool.submit(result_of, panel, name, free[panel]): (panel, name) for panel in PANELS for name in names
        }
        found = {}
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="train and judge", dynamic_ncols=True):
            found[waiting[done]] = done.result()
    results = {panel: {name: found[panel, name] for name in names} for panel in PANELS}
    text = "\n\n".join(table(panel, results[panel], free[panel]) for panel in PANELS)
    (args.output_dir / "table.md").write_text(text + "\n")
    picture(results["finished"], args.output_dir / "samples.png")
    print(text)
    print(
        f"\nEach row cost each model {forward_passes_of_self_play():,} passes of a point; a backward pass counts two."
    )
    print(f"Look at {args.output_dir / 'samples.png'}; the table is in {args.output_dir / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
