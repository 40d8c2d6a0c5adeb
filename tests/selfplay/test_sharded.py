"""A model trained in parts over gloo ends where one trained whole does, also after a change of the process count."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from spin_diffusion.runs.start import make_accelerator
from spin_diffusion.selfplay.sharded import check_sharding
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.input_error import InputError
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("sharded_steps.py")


def steps(how: str, optimizer: str, folder: Path, number: int, processes: int) -> dict[str, torch.Tensor]:
    """What training came to, which is the same on every process."""
    folder.mkdir(exist_ok=True)
    run_ranks(SCRIPT, [how, optimizer, str(folder), str(number)], processes, timeout_s=200)
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


def test_a_launch_by_deepspeed_is_refused_in_one_line_that_says_what_to_launch_with(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError) as refused:
        make_accelerator("no")
    named = re.findall(r"training/accelerate/\w+\.yaml", str(refused.value))
    assert "DEEPSPEED" in str(refused.value) and "\n" not in str(refused.value)
    assert len(named) == 2 and all((SCRIPT.parents[2] / path).is_file() for path in named)
