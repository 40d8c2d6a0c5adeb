"""comparison.md and comparison.html, from what stands in comparison.json alone."""

from pathlib import Path
from typing import Any

from spin_diffusion.comparing.report.markdown import as_markdown
from spin_diffusion.comparing.report.page import as_page
from spin_diffusion.store.run_dir import write_file


def write_reports(results: dict[str, Any], output_dir: Path) -> list[Path]:
    """Write both and return their paths."""
    markdown, page = output_dir / "comparison.md", output_dir / "comparison.html"
    write_file(markdown, lambda part: part.write_text(as_markdown(results), encoding="utf-8"))
    write_file(page, lambda part: part.write_text(as_page(results), encoding="utf-8"))
    return [markdown, page]
