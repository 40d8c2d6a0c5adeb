import importlib.util
import sys
from types import SimpleNamespace

import pytest

HAS_FTFY = importlib.util.find_spec("ftfy") is not None


@pytest.fixture(autouse=True)
def ftfy_that_mends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """HPS does not run without ftfy. Where it is not installed, tests whose prompts need no mending have a stand-in."""
    if not HAS_FTFY:
        monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=str, __version__="stand-in"))
