"""The tables of an evaluation as files beside its page: Markdown, LaTeX, and every number as CSV."""

import csv
import functools
import io
from pathlib import Path

from spin_diffusion.evaluation.records import AggregateEntry, ComparisonEntry, Results, scale_in_words
from spin_diffusion.evaluation.tables import as_markdown, cells_of, closing_lines, score_decimals, score_direction
from spin_diffusion.store.run_dir import write_file

_IN_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)


def table_files(results: Results) -> dict[str, str]:
    """Name of each file -> its text; none where no scorer was run."""
    if not results["results"]:
        return {}
    markdown = as_markdown(results) + "".join(f"{line}\n\n" for line in closing_lines(results))
    return {"results.csv": _as_csv(results), "table.tex": _as_latex(results), "table.md": markdown}


def write_tables(results: Results, folder: Path) -> None:
    """Write the files of `table_files` into a folder of ours."""
    for name, text in table_files(results).items():
        write_file(folder / name, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def _as_csv(results: Results) -> str:
    """A line for each model, guidance scale and scorer, in full precision; the baseline's differences are empty."""
    mean_keys = ("mean", "low", "high", "sd", "num_prompts")
    keys = ("difference", "low", "high", "wins", "ties", "losses", "win_rate", "p", "p_holm", "verdict")
    roles = {scorer["name"]: scorer["role"] for scorer in results["scorers"]}
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    of_difference = [f"difference_{key}" if key in ("low", "high") else key for key in keys]
    lines.writerow(["protocol", "model", "guidance_scale", "scorer", "role", *mean_keys, *of_difference])
    for scorer, cells in cells_of(results).items():
        for (model, scale), (mean, compared) in cells.items():
            head = [results["protocol"]["id"][:16], model, "" if scale is None else scale, scorer, roles[scorer]]
            differences = [dict(compared)[key] if compared else "" for key in keys]
            lines.writerow([*head, *(dict(mean)[key] for key in mean_keys), *differences])
    return buffer.getvalue()


def _as_latex(results: Results) -> str:
    """One table for the package booktabs: a line per model and guidance scale, a column per scorer with its mean and
    half of its interval's width; bold where the difference to the baseline is beyond chance."""
    by_scorer = cells_of(results)
    decimals = score_decimals(results)
    lines = [
        r"% needs \usepackage{booktabs}; 95 % t-intervals over prompts; bold: beyond chance against the baseline,",
        rf"% which is {' '.join(results['baseline'].split())}, at the same guidance scale",
        rf"\begin{{tabular}}{{l{'r' * len(by_scorer)}}}",
        r"\toprule",
        " & ".join(["model", *map(_escaped, by_scorer)]) + r" \\",
        r"\midrule",
    ]
    rows = dict.fromkeys(at for cells in by_scorer.values() for at in cells)
    several = len({scale for _, scale in rows}) > 1
    for model, scale in rows:
        name = _escaped(model) + (f", {scale_in_words(scale)}" if several else "")
        cells = [_cell(of_scorer.get((model, scale)), decimals[scorer]) for scorer, of_scorer in by_scorer.items()]
        lines.append(" & ".join([name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _cell(cell: tuple[AggregateEntry, ComparisonEntry | None] | None, decimals: int) -> str:
    if cell is None:
        return "--"
    mean, compared = cell
    number = f"{mean['mean']:.{decimals}f} \\pm {(mean['high'] - mean['low']) / 2:.{decimals}f}"
    return rf"$\mathbf{{{number}}}$" if score_direction(compared) else f"${number}$"


def _escaped(text: str) -> str:
    return " ".join(text.split()).translate(_IN_LATEX)
