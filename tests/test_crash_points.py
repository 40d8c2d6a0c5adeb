"""Killed at any point of a run or an evaluation, the same command ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spin_diffusion.store.run_dir import MARKER

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"images": 250, "lora": 200, "language": 300, "evaluation": 80}
"""At least so many points each kind has."""


def tried(kind: str, folder: Path, which: str) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, "-m", "tests.crashing", kind, str(folder / "runs"), which],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads(found.stdout.splitlines()[-1])
    print(result)
    return result


def check(kind: str, found: dict[str, Any]) -> None:
    assert found["wrong"] == {}
    # Whatever else is written appears by a rename, whole
    assert found["in_place"] == [MARKER]
    assert found["changes"] >= CHANGES[kind]


@pytest.mark.timeout(1200)
def test_a_kill_where_a_folder_comes_or_goes_changes_no_byte(tmp_path):
    found = tried("images", tmp_path, "borders")
    check("images", found)
    assert found["tried"] >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_kill_at_any_point_changes_no_byte(kind, tmp_path):
    found = tried(kind, tmp_path, "all")
    check(kind, found)
    assert found["tried"] >= found["states"] // 3
