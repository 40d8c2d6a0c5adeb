"""A whole comparison: its phases, what is concluded from them, and the report."""

from spin_diffusion.comparing.analysis import conclude
from spin_diffusion.comparing.phases import Comparison
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
    comparison = Comparison(settings)
    comparison.claim()
    complete = comparison.play()
    if not complete:
        print(f"--max_hours {settings.max_hours:g} is over: the same command goes on")
        return
    results = conclude(comparison)
    for path in write_reports(results, comparison.output_dir):
        print(f"Report: {path}")
    if lacking := comparison.lacking(results):
        raise InputError(lacking)
