"""A whole comparison: its phases, what is concluded from them, and the report."""

from typing import Any

from spin_diffusion.comparing.analysis import conclude
from spin_diffusion.comparing.contest import Contest
from spin_diffusion.comparing.phases import play
from spin_diffusion.comparing.report import write_reports
from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.store.input_error import InputError


def compare_methods(settings: CompareSettings) -> None:
    """Run the comparison and write its report.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched. Or, once the report is
            written, a method without a result, or a run that did not end by itself.
    """
    check_specs(settings.scorers or [])
    contest = Contest(settings)
    contest.claim()
    if not play(contest):
        print(f"--max_hours {settings.max_hours:g} is over: the same command goes on")
        return
    results = conclude(contest)
    for path in write_reports(results, contest.output_dir):
        print(f"Report: {path}")
    if missing := lacking(results):
        raise InputError(missing)


def lacking(results: dict[str, Any]) -> str:
    """Which methods the table lacks results of, and why, in one line; empty = none.

    That a run diverges is a result of its method, where other rates or seeds of it came to their end.
    """
    lines = []
    for world in results["worlds"]:
        base = world["base"]["failures"]
        lines += [f"{world['name']}, base: {line}" for line in base[:1]]
        for budget in world["budgets"]:
            for row in budget["rows"]:
                reasons = [line for line in row["failures"] if " diverged: " not in line] or row["failures"]
                if row["state"] == "failed" or any(" diverged: " not in line for line in reasons):
                    why = reasons[0] if reasons else "no run of it came to its end"
                    lines.append(f"{world['name']}, equal {budget['budget']}, {row['method']}: {why}")
    if not lines:
        return ""
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    return (
        f"the comparison lacks results ({'; '.join(lines[:3])}{more}): mend the cause; runs that were refused or "
        "diverged are run again with --retry_failed"
    )
