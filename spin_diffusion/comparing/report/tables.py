"""What the tables of both reports say, cell by cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Weight = Literal["", "some", "sure"]
"""How much a difference says: nothing; its 95 % interval excludes 0; so does the one that holds with all others."""


@dataclass(frozen=True)
class Text:
    """One cell of a table."""

    text: str
    weight: Weight = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """A table as words."""

    title: str
    head: list[str]
    rows: list[list[Text]]


def number(found: dict[str, Any] | None, after: str = "") -> Text:
    """A mean."""
    return Text("-") if found is None else Text(f"{found['mean']:.3f}{after}")


def difference(found: dict[str, Any] | None) -> Text:
    """A difference with its interval."""
    if found is None:
        return Text("-")
    return Text(f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]", weight(found))


def weight(found: dict[str, Any]) -> Weight:
    """How much a difference says."""
    adjusted = found["adjusted"] or (0, 0)
    if adjusted[0] > 0 or adjusted[1] < 0:
        return "sure"
    return "some" if found["low"] > 0 or found["high"] < 0 else ""


def mode_names(world: dict[str, Any]) -> dict[str, str]:
    """Names of the guidance scales; one that equals another is left out."""
    usual = world["usual_guidance"]
    names = {"guidance 1": "guidance 1", "usual": f"guidance {usual:g}", "best": "its best"}
    return {mode: name for mode, name in names.items() if mode != "guidance 1" or usual != 1}


def scores_table(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> Table:
    """Every method after its last round, against the reference."""
    reference, modes = results["settings"]["reference"], mode_names(world)
    head = ["method", "rate", "steps"]
    for name in modes.values():
        head += [name, f"to {reference}"]
    head += ["diversity", "GFLOPs", "seconds"]
    base = world["base"]
    first = [Text("base", is_number=False), Text(""), Text("0")]
    for mode in modes:
        found = base["scores"][mode]
        first += [number(found, _at(base["best_guidance"]) if mode == "best" else ""), Text("")]
    rows = [[*first, number(base["diversity"]), Text("0"), Text("0")]]
    for row in budget["rows"]:
        rows.append(_method_row(row, modes, reference))
    return Table(f"{world['name']}, equal {budget['budget']}", head, rows)


def _method_row(row: dict[str, Any], modes: dict[str, str], reference: str) -> list[Text]:
    name = Text(row["method"], is_number=False)
    if row["state"] == "failed":
        said = (row["failures"] or ["no seed came to its end"])[0]
        blanks = [Text("")] * (2 * len(modes) + 3)
        return [name, Text("-"), Text(f"failed: {said}", is_number=False), *blanks]
    choice = row["choice"]
    name = Text(row["method"] + (f" ({len(row['seeds'])} seeds)" if row["state"] == "partly" else ""), is_number=False)
    cells = [
        name,
        Text(f"{choice['learning_rate']:.0e}".replace("e-0", "e-") + (" (edge)" if choice["at_edge"] else "")),
        Text(f"{row['rounds']} x {row['steps_per_round']}"),
    ]
    for mode in modes:
        cells.append(number(row["scores"][mode], _at(choice["guidance_scale"]) if mode == "best" else ""))
        cells.append(Text("") if row["method"] == reference else difference((row.get("to_reference") or {}).get(mode)))
    return [*cells, number(row["diversity"]), Text(f"{row['gflops']:.0f}"), Text(f"{row['seconds']:.0f}")]


def _at(scale: float | None) -> str:
    return "" if scale is None else f" at {scale:g}"


def seeds_table(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> Table:
    """The difference to the reference of each seed by itself, and the other scorers."""
    reference, modes = results["settings"]["reference"], mode_names(world)
    head = ["method"]
    for name in modes.values():
        head.append(f"{name}: to {reference}, by seed")
    others = list(results["scorers"])[1:]
    head += [f"{other} at {modes['best']}" for other in others]
    rows = []
    for row in budget["rows"]:
        if row["state"] == "failed":
            continue
        cells = [Text(row["method"], is_number=False)]
        for mode in modes:
            found = (row.get("to_reference") or {}).get(mode)
            cells.append(Text(", ".join(f"{value:+.3f}" for value in found["seeds"].values()) if found else ""))
        rows.append(cells + [number(row["other_scores"][other]["best"]) for other in others])
    return Table(f"{world['name']}, equal {budget['budget']}: seeds", head, rows)


def rounds_table(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> Table | None:
    """The curves over the rounds; None where no method has more than one."""
    rows = [row for row in budget["rows"] if len(row.get("curve") or []) > 1]
    if not rows:
        return None
    last = max(len(row["curve"]) for row in rows)
    reference = results["settings"]["reference"]
    head = [
        "method",
        *(f"round {k}" for k in range(1, last + 1)),
        "best round",
        "lost since",
        f"best round to {reference}",
    ]
    table = []
    for row in rows:
        means = [f"{point['mean']:.3f}" for point in row["curve"]]
        table.append(
            [
                Text(row["method"], is_number=False),
                *(Text(mean) for mean in means),
                *[Text("")] * (last - len(means)),
                Text(str(row["best_round"])),
                Text(f"{row['drift']:+.3f}" if row["drift"] is not None else "-"),
                difference((row.get("best_round_to_reference") or {}).get("best")),
            ]
        )
    return Table(f"{world['name']}, equal {budget['budget']}: rounds", head, table)


def by_round_table(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> Table | None:
    """Every round on test prompts, against base and reference; None where only the last one was tested."""
    rows = [row for row in budget["rows"] if row.get("by_round")]
    if not rows:
        return None
    reference, modes, base = results["settings"]["reference"], mode_names(world), world["base"]
    head = ["method", "round"]
    for name in modes.values():
        head += [name, "to base", f"to {reference}"]
    first = [Text("base", is_number=False), Text("0")]
    for mode in modes:
        at = _at(base["best_guidance"]) if mode == "best" else ""
        first += [number(base["scores"][mode], at), Text(""), Text("")]
    table = [first]
    for row in rows:
        for found in row["by_round"]:
            cells = [Text(row["method"], is_number=False), Text(str(found["round"]))]
            for mode in modes:
                at = _at(found["best_guidance"]) if mode == "best" else ""
                against = found.get("to_reference")
                cells += [
                    number(found["scores"][mode], at),
                    difference(found["to_base"][mode]),
                    difference(against[mode]) if against else Text(""),
                ]
            table.append(cells)
    return Table(f"{world['name']}, equal {budget['budget']}: round by round", head, table)


def findings(results: dict[str, Any], world: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Who is ahead of the reference, who behind, and who is first, at each guidance scale; whatever it is."""
    reference, said, nobody = results["settings"]["reference"], [], "no method"
    every = "every other method"
    if lacking := incomplete(results, budget["rows"]):
        said.append(f"Not all was run. {' '.join(lacking)}")
        ended = [row["method"] for row in budget["rows"] if row["state"] != "failed" and row["method"] != reference]
        nobody = f"none of the methods with a result ({', '.join(ended) or 'there is none'})"
        every += " with a result"
    for mode, name in mode_names(world).items():
        ahead, behind = _named(budget["rows"], mode, "sure", 1), _named(budget["rows"], mode, "sure", -1)
        where = {"best": "at the best guidance of each"}.get(mode, f"at {name}")
        said.append(
            f"{where.capitalize()}, {', '.join(ahead) if ahead else nobody} "
            f"{'are' if len(ahead) > 1 else 'is'} ahead of {reference} by an interval that allows for all differences"
            + (f"; {', '.join(behind)} {'are' if len(behind) > 1 else 'is'} behind" if behind else "")
            + "."
        )
        perhaps = [
            f"{', '.join(methods)} {word}"
            for sign, word in ((1, "ahead"), (-1, "behind"))
            if (methods := _named(budget["rows"], mode, "some", sign))
        ]
        if perhaps:
            said.append(f"By its own 95 % interval alone, which may be chance: {'; '.join(perhaps)}.")
        if (first := budget["first"][mode]) and len(budget["rows"]) > 1:
            level = first["not_told_apart"]
            apart = f"not told apart from it: {', '.join(level)}" if level else f"it is ahead of {every}"
            said.append(f"The highest mean is that of {first['method']}; {apart}.")
    return said


def incomplete(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which methods have no result, and which have one of some seeds alone; a sentence each."""
    seeds, said = results["seeds"], []
    if failed := [row["method"] for row in rows if row["state"] == "failed"]:
        said.append(f"Without a result: {', '.join(failed)}.")
    for row in rows:
        if row["state"] == "partly":
            lacking = ", ".join(str(seed) for seed in seeds if seed not in row["seeds"])
            said.append(f"Of {row['method']} the runs with seed {lacking} are missing.")
    return said


def _named(rows: Sequence[dict[str, Any]], mode: str, wanted: Weight, sign: int) -> list[str]:
    found = [(row["method"], (row.get("to_reference") or {}).get(mode)) for row in rows]
    return [method for method, said in found if said is not None and weight(said) == wanted and said["mean"] * sign > 0]


def how(results: dict[str, Any]) -> str:
    """How the numbers came about, in a few sentences."""
    settings, prompts, seeds = results["settings"], results["prompts"], results["seeds"]
    title = results["scorers"][results["scorer"]]
    grid = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    family = max((budget["differences"] for world in results["worlds"] for budget in world["budgets"]), default=0)
    if len(seeds) == 1:
        intervals = "95 % intervals are over prompts: they speak of these runs only, not of how training varies"
    else:
        intervals = (
            "95 % intervals are for other seeds and other prompts (Student's t over both), and wide, since "
            f"{len(seeds)} seeds say little of how training varies"
        )
    return (
        f"{title} (mean, higher is better) on {prompts['test']['num']} test prompts with "
        f"{settings['images_per_prompt']} images each, {len(seeds)} training seeds ({', '.join(map(str, seeds))}). "
        f"Each method's learning rate (of {grid} unless it has a grid of its own), its best guidance and its best "
        f"round were chosen on {prompts['validation']['num']} other prompts, rate and guidance with seed {seeds[0]}; "
        "(edge) = the best rate is the lowest or the highest tried. Differences are paired by prompt and seed; their "
        f"{intervals}. Italic = it excludes 0; bold = so does one that holds together with all other differences of "
        f"that world and budget: every method, round and guidance, to the base and to {settings['reference']} "
        f"(Bonferroni, {family} at most). Look at the seeds one by one. Equal compute counts the FLOPs of training, of "
        "drawing and of encoding images, not the choice of the rate and not the evaluation. Seconds are of one run "
        "while others ran beside it."
    ) + _took(results)


def _took(results: dict[str, Any]) -> str:
    """What all of it took, where that is known."""
    found = results.get("took")
    if found is None:
        return ""
    return (
        f" All {found['runs']} runs together, with their images and scores, took {found['seconds'] / 3600:.2g} hours "
        f"of processes, which --jobs shares out, and {found['cpu_seconds'] / 3600:.2g} hours of CPU."
    )


def failures(results: dict[str, Any]) -> list[str]:
    """All runs without an end, with their reasons."""
    said = []
    for world in results["worlds"]:
        said += [f"{world['name']}, base: {line}" for line in world["base"]["failures"]]
        for budget in world["budgets"]:
            for row in budget["rows"]:
                where = f"{world['name']}, equal {budget['budget']}, {row['method']}"
                said += [f"{where}: {line}" for line in row["failures"]]
    return said
