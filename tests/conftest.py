"""The fixtures are imported where tests are run, and not by the process that hands them out to others (`-n`): none of
those begins before its imports, of torch, diffusers and transformers, would be done."""

import os
from pathlib import Path

import pytest

# Before torch, transformers and datasets are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

DEAREST = ("test_crash_points.py", "test_on_a_gpu.py", "test_processes.py", "comparing/test_compare_methods.py")
"""Files that take half a minute and more by themselves: what begins last keeps one core waiting for the other."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dearest files begin. Of one and the same file the tests keep their order."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(DEAREST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
