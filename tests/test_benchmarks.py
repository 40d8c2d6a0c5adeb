"""The benchmarks of a GPU run on a CPU too, with next to no work: contender by contender, whatever fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def figures(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_each_contender_writes_its_figures_or_why_it_has_none_and_a_second_call_skips_it(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    every = {name: arguments for part in gpu.PARTS.values() for name, arguments in part.items()}
    names = ("sdxl_full_recomputed_ours", "sd15_round")
    few = {"fails": "generate --model toy --resolution 12"} | {name: every[name] for name in names}
    monkeypatch.setitem(gpu.PARTS, "sd15", few)
    argv = ["sd15", str(tmp_path), "--device", "cpu", "--model", "toy"]
    assert gpu.main(argv) == 1  # one of them failed
    found = figures(tmp_path)
    assert found.keys() == few.keys()
    failed = found.pop("fails")
    assert "divisible by 8" in failed["error"] and failed["error"] in capfd.readouterr().out
    assert [name for name in found if "error" in found[name]] == []

    again = found["sdxl_full_recomputed_ours"]
    assert again["pairs_per_second"]["ours"] > 0 and again["matrix_flops_per_second"]["measured"] > 0
    # A third of the player's work is done again: 2 + 1 + 1 passes with the opponent's, and one more
    assert 1.2 < again["hfu"]["ours"] / again["mfu"]["ours"] < 1.3
    trained = found["sd15_round"]["phases"]["trained"]
    assert trained["seconds"] > 0 and trained["planned_seconds"] > 0

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert gpu.main(argv) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_all_contenders_have_figures(tmp_path):
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "all", tmp_path, "--device", "cpu", "--model", "toy"]
    # Compiling for a CPU takes minutes
    settings = {"PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = figures(tmp_path)
    assert len(found) == 26 and not any("error" in each for each in found.values())
    assert found["sd15_draw_ours"]["mfu"] == found["sd15_draw_ours"]["hfu"]
    assert found["sd15_lora_plain"]["pairs_per_second"]["plain"] > 0
