"""A model trained in parts over gloo ends where one trained whole does, also after a change of the process count."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.sharded import check_sharding
from spin_diffusion.selfplay.train_settings import TrainSettings

SCRIPT = Path(__file__).with_name("sharded_steps.py")


def steps(how: str, optimizer: str, folder: Path, number: int, processes: int) -> dict[str, torch.Tensor]:
    """What training came to, which is the same on every process."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    run = subprocess.run(
        [*command, str(SCRIPT), how, optimizer, str(folder), str(number)],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
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
        ({"launched": DistributedType.DEEPSPEED}, "DeepSpeed is not supported"),
        ({"moving_average": True}, "--opponent ema averages whole weights"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused_in_one_line(changed, said):
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.num_processes, accelerator.scaler = changed.get("processes", 2), None
    accelerator.distributed_type = changed.get("launched", DistributedType.MULTI_CPU)
    player = nn.Linear(2, 2).requires_grad_(not changed.get("frozen", False))
    settings = TrainSettings(fully_shard=True, optimizer=changed.get("optimizer", "adamw"))
    with pytest.raises(InputError) as refused:
        check_sharding(player, settings, accelerator, changed.get("moving_average", False))
    assert said in str(refused.value) and "\n" not in str(refused.value)
