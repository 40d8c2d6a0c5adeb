"""The fixtures are imported where tests are run, and not by the process that hands them out to others (`-n`): none of
those begins before its imports, of torch, diffusers and transformers, would be done."""

import os

import pytest

# Before torch, transformers and datasets are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
