"""`spin-diffusion`: what it answers, from any directory, and what it finds there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spin_diffusion.cli import doctor
from spin_diffusion.cli.__main__ import COMMANDS, main
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs.publish import place_name
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.shipped import LAUNCHERS, ROOT, shipped, shipped_name

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "pyarrow", "datasets", "numpy"}


def asked(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "spin_diffusion.cli", *argv]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize("name", ["", *(name for name in COMMANDS if name != "completion")])
def test_every_command_says_how_it_is_used_without_waiting_for_the_libraries(name, tmp_path):
    answer = asked(tmp_path, *name.split(), "--help")
    assert answer.returncode == 0 and f"usage: {f'spin-diffusion {name}'.strip()}" in answer.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines()}
    assert "spin_diffusion" in loaded and not HEAVY & loaded


def test_output_that_nobody_reads_any_further_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command, env = [sys.executable, "-m", "spin_diffusion.cli", "--help"], os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, env=env)
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, b"")


def test_presets_and_what_they_name_are_found_from_any_directory(tmp_path, monkeypatch):
    in_repository = parse_config(["--config", "toy_sdxl"]) if Path.cwd() == ROOT else None
    monkeypatch.chdir(tmp_path)
    for word in ("toy_sdxl", "toy_sdxl.yaml", "training/configs/toy_sdxl.yaml"):
        config = parse_config(["--config", word]).flat()
        assert Path(config["pretrained_model_name_or_path"]) == ROOT / "assets/toy_world/sloppy"
        assert config["scorers"][1] == f"pickscore={ROOT / 'assets/toy_world/pickscore'}"
        assert config["output_dir"] == "runs/toy"
    assert in_repository is None or in_repository.flat()["dataset_name"] == "assets/toy_world/data/train.parquet"
    assert Path(shipped("one_cpu", LAUNCHERS)).is_file()


def test_what_is_shipped_is_called_alike_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = shipped("assets/toy_world/sloppy")
    assert Path(place).is_absolute() and shipped_name(place) == place_name(place) == "assets/toy_world/sloppy"
    for other in (str(tmp_path / "assets" / "mine"), "org/model", str(ROOT / "runs" / "toy")):
        assert shipped_name(other) == other
    assert place_name(str(tmp_path)) == tmp_path.name


def test_a_users_own_file_wins_over_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("training/configs/toy_sdxl.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("pretrained_model_name_or_path: assets/toy_world/sloppy\ndataset_name: mine\nseed: 7\n")
    Path("assets/toy_world/sloppy").mkdir(parents=True)
    config = parse_config(["--config", str(own)]).flat()
    assert (config["seed"], config["pretrained_model_name_or_path"]) == (7, "assets/toy_world/sloppy")
    Path("sdxl_full_80gb").mkdir()  # a run's folder is no file of settings
    assert parse_config(["--config", "sdxl_full_80gb"]).flat()["resolution"] == 1024
    Path("sdxl_full_80gb.yaml").write_text(
        "resolution: 768\npretrained_model_name_or_path: base\ndataset_name: mine\n"
    )  # a preset that was copied and changed
    assert parse_config(["--config", "sdxl_full_80gb"]).flat()["resolution"] == 768
    with pytest.raises(InputError, match="no preset of that name, did you mean 'sdxl_full_80gb'"):
        parse_config(["--config", "sdxl_full_80g"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "there is no command 'trian', did you mean 'train sd"),
        (["train", "flux"], "give what to train: spin-diffusion train sdxl, sd or llm"),
        (["train", "sdxl", "--learnign_rate", "1"], "unknown setting 'learnign_rate', did you mean 'learning_rate'?"),
    ],
)
def test_a_misspelt_command_is_answered_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["spin-diffusion"])
    assert main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]


def test_the_doctor_fits_the_screen_and_does_not_wait_for_a_hub(capsys, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr(doctor, "HUB_LIMIT_S", 0.2)
    doctor.doctor([])
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 20 and max(map(len, said)) <= 80
    assert any(line.startswith("hub") and "does not answer" in line for line in said)
    remedies = said[said.index("What will not work, and what to do:") :]
    assert any("give local folders" in line for line in remedies)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_settings_and_presets(shell, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["spin-diffusion"])
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shell == "bash":
        for typed, completed in (
            ("spin-diffusion pl", "plan"),
            ("spin-diffusion train sdxl --config sdxl_f", "sdxl_full_80gb"),
            ("spin-diffusion train llm --model_n", "--model_name_or_path"),
        ):
            words = typed.split()
            ask = (
                f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _spin_diffusion; echo ${{COMPREPLY[@]}}"
            )
            assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split() == [completed]
    else:
        assert script.startswith("autoload -U +X bashcompinit")
