"""A model trained in parts over gloo ends where one trained whole does, also after a change of the process count."""

import builtins
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from spin_diffusion.selfplay.sharded import check_sharding
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.zero import as_plain_processes, check_zero, launched_stage
from spin_diffusion.store.input_error import InputError
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("sharded_steps.py")


def steps(how: str, optimizer: str, folder: Path, number: int, processes: int) -> dict[str, torch.Tensor]:
    """What training came to, which is the same on every process."""
    folder.mkdir(exist_ok=True)
    launched = {}
    if how.startswith("zero"):
        launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": how.removeprefix("zero")}
    run_ranks(SCRIPT, [how, optimizer, str(folder), str(number)], processes, launched, timeout_s=200)
    found = [load_file(folder / f"rank-{rank}-of-{processes}.safetensors") for rank in range(processes)]
    for other in found[1:]:
        assert other.keys() == found[0].keys() and all(torch.equal(other[name], found[0][name]) for name in other)
    return found[0]


@pytest.mark.parametrize(("how", "optimizer"), [("own", "adamw"), ("own", "rmsprop"), ("accelerate", "adamw")])
def test_in_parts_ends_where_whole_weights_do_also_after_a_resume_on_four_processes(how, optimizer, tmp_path):
    whole = steps("whole", optimizer, tmp_path / "whole", 6, 1)
    begun = steps(how, optimizer, tmp_path / "parts", 3, 2)
    files = sorted(path.name for path in (tmp_path / "parts" / "checkpoint").iterdir())
    assert len(files) == 2 and all(name.endswith(".safetensors") for name in files)  # one of each process, no pickle
    ended = steps(how, optimizer, tmp_path / "parts", 6, 4)
    assert whole.keys() <= ended.keys()
    for name, tensor in whole.items():
        # Relative to the tensor's largest number: second moments are a millionth of a weight
        assert (ended[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name
    squares = sum(tensor.square().sum() for name, tensor in ended.items() if name.startswith("player."))
    torch.testing.assert_close(ended["distance"], squares)
    moved = [(ended[name] - begun[name]).abs().max() for name in begun if name.startswith(("player.", "optimizer."))]
    assert min(moved) > 0  # the second half did train every tensor


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_under_zero_too(stage, optimizer, tmp_path):
    whole = steps("whole", optimizer, tmp_path / "whole", 6, 1)
    steps(f"zero{stage}", optimizer, tmp_path / "zero", 3, 2)
    assert sorted(path.name for path in (tmp_path / "zero" / "checkpoint").iterdir()) == [
        "zero.json", "zero.safetensors"
    ]  # fmt: skip
    ended = steps(f"zero{stage}", optimizer, tmp_path / "zero", 6, 4)
    compared = [name for name in whole if not name.startswith("ema.") and not name.endswith(".step")]
    assert set(compared) <= ended.keys() and any("exp_avg_sq" in name for name in compared) == (optimizer == "adamw")
    for name in compared:
        assert (ended[name] - whole[name]).abs().max() <= 1e-4 * whole[name].abs().max(), name


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"processes": 1}, "launch two or more"),
        ({"frozen": True}, "adapters are small"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor works on whole weights: use adamw, rmsprop, sgd"),
        ({"moving_average": True}, "--opponent ema averages whole weights"),
        ({"scaler": object()}, "--mixed_precision fp16 cannot be used with sharded weights: use bf16"),
        ({"launched": DistributedType.FSDP, "fsdp_version": 1}, "fsdp_version: 2"),
        ({"launched": DistributedType.FSDP, "from_one": True}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused_in_one_line(changed, said):
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.num_processes, accelerator.scaler = changed.get("processes", 2), changed.get("scaler")
    accelerator.state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(
            fsdp_version=changed.get("fsdp_version", 2), cpu_ram_efficient_loading=changed.get("from_one", False)
        )
    )
    accelerator.distributed_type = changed.get("launched", DistributedType.MULTI_CPU)
    player = nn.Linear(2, 2).requires_grad_(not changed.get("frozen", False))
    settings = TrainSettings(fully_shard=True, optimizer=changed.get("optimizer", "adamw"))
    with pytest.raises(InputError) as refused:
        check_sharding(player, settings, accelerator, changed.get("moving_average", False))
    assert said in str(refused.value) and "\n" not in str(refused.value)


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "changed", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, {}, "zero_stage: 1 must be 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "set its offload devices to none"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "set its offload devices to none"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "leave deepspeed_config_file out"),
        ({}, {"frozen": True}, "adapters are small"),
        ({}, {"optimizer": "adafactor"}, "--optimizer adafactor works on whole weights: use adamw, rmsprop, sgd"),
        ({}, {"precision": "fp16"}, "--mixed_precision fp16 cannot be used with it: use bf16"),
        ({}, {"use_ema": True}, "--use_ema averages weights"),
        ({}, {"moving_average": True}, "--opponent ema averages weights"),
        ({}, {"fully_shard": True}, "--fully_shard is another way of saving memory"),
        ({}, {"two_passes": True}, "--two_passes is another way of saving memory"),
    ],
)
def test_what_cannot_be_done_under_zero_is_refused_in_one_line(environment, changed, said, monkeypatch):
    for name, value in (ZERO | environment).items():
        monkeypatch.setenv(name, value)
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.mixed_precision = changed.pop("precision", "bf16")
    player = nn.Linear(2, 2).requires_grad_(not changed.pop("frozen", False))
    moving_average = changed.pop("moving_average", False)
    with pytest.raises(InputError) as refused:
        check_zero(player, TrainSettings(**changed), accelerator, moving_average)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_accelerator_as_of_plain_processes_leaves_the_launchers_word(monkeypatch):
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    with as_plain_processes():
        assert launched_stage() == 0
    assert launched_stage() == 3
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with as_plain_processes():
        pass
    assert launched_stage() == 0


def test_without_deepspeed_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("builtins.__import__", _without("deepspeed", builtins.__import__))
    check_zero(nn.Linear(2, 2), TrainSettings(), create_autospec(Accelerator, instance=True), False)  # not launched so
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"pip install 'spin-diffusion\[deepspeed\]'"):
        check_zero(nn.Linear(2, 2), TrainSettings(), create_autospec(Accelerator, instance=True), False)


def _without(missing, load):
    def loads(name, *rest):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return load(name, *rest)

    return loads


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerates_launcher_tells_the_stage_of_our_configs(stage, tmp_path):
    script = tmp_path / "says.py"
    script.write_text(
        "import os\n"
        "from unittest.mock import create_autospec\n"
        "from accelerate import Accelerator\n"
        "from torch import nn\n"
        "from spin_diffusion.selfplay.train_settings import TrainSettings\n"
        "from spin_diffusion.selfplay.zero import as_plain_processes, check_zero, launched_stage\n"
        "with as_plain_processes():\n"
        "    accelerator = Accelerator()\n"
        "check_zero(nn.Linear(2, 2), TrainSettings(), accelerator, False)\n"
        "print(f'stage {launched_stage()}, {accelerator.num_processes}, {accelerator.distributed_type}, '\n"
        "      f'{accelerator.mixed_precision}')\n"
    )
    config = Path(__file__).parents[2] / "training" / "accelerate" / f"zero{stage}.yaml"
    argv = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0", str(script)]
    # The launcher's own imports are spared; those that it launches are processes of their own
    said = run_ranks(Path(launch.__file__), argv, launched={"PYTHONPATH": str(SCRIPT.parents[2])}, timeout_s=200)
    assert said.count(f"stage {stage}, 2, DistributedType.MULTI_") == 2 and said.count(", bf16") == 2
