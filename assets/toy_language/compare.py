"""SPACE, SPIN and supervised fine-tuning side by side on the toy language, where KL(data || model) is known exactly.

    python assets/toy_language/compare.py --output_dir runs/toy-llm-compared

Every method plays the same rounds from the same base at the same rate, with each seed twice: on fresh real answers in
every round, and on one fixed set of as many. Prints a table and draws comparison.png; a run that is there is not
repeated. All runs go through the library's own command, `training/train_space_llm.py` without the launcher.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError

HERE = Path(__file__).resolve().parent
METHODS = {
    "SPACE": ["--objective", "space"],
    "SPIN 0.1": ["--objective", "spin", "--beta", "0.1"],
    "SPIN 1": ["--objective", "spin", "--beta", "1.0"],
    "SFT": ["--objective", "sft"],
}
DATA = ("fresh", "fixed")
PROMPTS_EXACT = 4
"""Prompts over which the exact divergence is averaged: every sixth one."""
LIMITS = """\
What this does not show:

- Near the data SPIN with beta 1 is as stable as SPACE: the two losses agree to first order there.
- A fixed set of real answers is over-fitted by every method in the end; SPACE only comes to it later than SFT.
- It is a small, exactly known language and a tiny model that can represent it. There the likelihood itself is the
  yardstick, which favours SFT; what a model of billions of weights gains on real data is another question.
"""
"""What is known of these methods, and no row of the table says."""


def settings(method: str, data: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    parts = args.rounds if data == "fresh" else 1
    return [
        "--config", str(HERE.parents[1] / "training" / "configs" / "toy_llm.yaml"),
        "--model_name_or_path", str(HERE / "base"), "--dataset_name", str(HERE / "data" / "train.jsonl"),
        "--held_out_dataset_name", "null", "--rounds", str(args.rounds), "--real_parts", str(parts),
        "--max_train_samples", str(args.real_answers * parts),
        "--learning_rate", str(args.learning_rate), "--num_train_epochs", str(args.epochs), "--seed", str(seed),
        "--report_to", "none", *METHODS[method], "--output_dir", str(folder_of(method, data, seed, args)),
    ]  # fmt: skip


def folder_of(method: str, data: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a run and its divergences lie."""
    return args.output_dir / f"{data}-{method.lower().replace(' ', '-')}-{seed}"


def play(method: str, data: str, seed: int, args: argparse.Namespace) -> list[float]:
    """KL(data || model) in nats before the first round and after each, by one run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spin_diffusion.llm.config import parse_language_config
    from spin_diffusion.runs.language_run import run_language

    torch.set_num_threads(1)
    folder = folder_of(method, data, seed, args)
    known = folder / "kl.json"
    if known.is_file():
        return json.loads(known.read_text())
    # This process is not the one that holds the folder of the comparison
    take_folder(folder, "language training", inside=True)
    log = folder.with_suffix(".log")
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_language(parse_language_config(settings(method, data, seed, args)))
    exact, build = _load("exact"), _load("build")
    tokenizer, found = AutoTokenizer.from_pretrained(HERE / "base"), []
    for model in [HERE / "base", *(folder / f"round-{k}" / "model" for k in range(1, args.rounds + 1))]:
        ask = build.log_likelihood_of(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer)
        by_prompt = exact.kl(ask, exact.language.PROMPTS[:: len(exact.language.PROMPTS) // PROMPTS_EXACT])
        found.append(sum(by_prompt.values()) / len(by_prompt))
    known.write_text(json.dumps(found))
    return found


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"toy_language_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def interval(values: list[float]) -> tuple[float, float, float]:
    """Geometric mean and 95 % t-interval over seeds, on the scale of logarithms: a divergence is never below 0."""
    import numpy as np
    from scipy.stats import sem, t

    logs = np.log(values)
    mean = float(np.mean(logs))
    spread = float(sem(logs) * t.ppf(0.975, len(logs) - 1)) if len(logs) > 1 else float("nan")
    return tuple(float(np.exp(value)) for value in (mean, mean - spread, mean + spread))


def table(found: dict[tuple[str, str], list[list[float]]], args: argparse.Namespace) -> str:
    """Markdown: after each round the mean over seeds, after the last one with its interval."""
    lines, rounds = [], " | ".join(f"round {k}" for k in range(1, args.rounds + 1))
    for data in DATA:
        lines += [
            f"KL(data || model) in nats, {data} real answers ({args.real_answers} a round, {len(args.seeds)} seeds, "
            f"rate {args.learning_rate:g}, {args.epochs:g} epochs a round; geometric mean, 95 % interval over seeds)",
            "",
            f"| method | base | {rounds} | last, interval |",
            "|---|" + "---:|" * (args.rounds + 2),
        ]
        for method in METHODS:
            by_round = list(zip(*found[method, data], strict=True))
            _, low, high = interval(list(by_round[-1]))
            means = " | ".join(f"{interval(list(values))[0]:.3f}" for values in by_round)
            spread = f"[{low:.3f}, {high:.3f}]" if low < high else "none of one seed"
            lines.append(f"| {method} | {means} | {spread} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], list[list[float]]], args: argparse.Namespace, path: Path) -> None:
    """The same as curves, a panel for each kind of real data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(DATA), figsize=(10, 4), sharey=True, layout="constrained")
    styles = dict(zip(METHODS, (("#0072b2", "o"), ("#d55e00", "s"), ("#cc79a7", "^"), ("#555555", "D")), strict=True))
    for panel, data in zip(panels, DATA, strict=True):
        for method, (colour, marker) in styles.items():
            spread = [interval(list(values)) for values in zip(*found[method, data], strict=True)]
            means, lows, highs = zip(*spread, strict=True)
            panel.plot(range(args.rounds + 1), means, color=colour, marker=marker, label=method)
            panel.fill_between(range(args.rounds + 1), lows, highs, color=colour, alpha=0.15, linewidth=0)
        panel.set(title=f"{data} real answers", xlabel="round", yscale="log")
    panels[0].set_ylabel("KL(data || model), nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Play what is missing, then print and draw."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/toy-llm-compared"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real_answers", type=int, default=200, help="in each round")
    parser.add_argument("--epochs", type=float, default=2, help="in each round")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    try:
        take_folder(args.output_dir, "comparison on the toy language")
    except InputError as error:
        parser.error(str(error))
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has one core
    runs = [(method, data, seed) for seed in args.seeds for method in METHODS for data in DATA]
    found: dict[tuple[str, str], list[list[float]]] = {(method, data): [] for method in METHODS for data in DATA}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        started = {pool.submit(play, *run, args): run for run in runs}
        bar = tqdm(as_completed(started), total=len(runs), desc="runs of five rounds", mininterval=1)
        for future in bar:
            method, data, seed = started[future]
            found[method, data].append(future.result())
            bar.set_postfix_str(f"{method}, {data}, seed {seed}")
    text = table(found, args) + "\n" + LIMITS
    print(text)
    (args.output_dir / "comparison.md").write_text(text)
    draw(found, args, args.output_dir / "comparison.png")
    print(f"Curves: {args.output_dir / 'comparison.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
