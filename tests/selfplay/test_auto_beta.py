"""--beta auto: what follows from the size of the scores, and a run that finds its betas."""

import numpy as np
import pytest
import torch

from spin_diffusion.selfplay.auto_beta import SHARE, beta_of_score
from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.store.files import read_json
from spin_diffusion.store.run_dir import file_hash
from tests.playing import play_all

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Killed(Exception):
    """Stands in for a process that ends."""


def test_a_margin_of_the_share_of_the_error_has_lost_nearly_all_of_its_gradient():
    error = 0.034
    beta = beta_of_score(-error)
    margins = torch.tensor([0.0, SHARE * error], requires_grad=True)
    nothing = torch.zeros(2)
    spin(PairScores(margins, nothing, nothing, nothing), beta).sum().backward()
    at_zero, at_share = margins.grad.tolist()
    assert at_share / at_zero == pytest.approx(2 / (1 + np.exp(4)), rel=0.01), "SATURATION is 4"


def test_the_beta_is_that_of_scores_of_any_size():
    assert beta_of_score(-0.02) == pytest.approx(10 * beta_of_score(-0.2), rel=1e-2)


def test_a_run_finds_its_betas_again_after_a_kill_and_plays_as_with_the_same_numbers(sdxl_dir, tmp_path, monkeypatch):
    from spin_diffusion.selfplay import health

    plain = health.check_finite

    def dying(*args, **kwargs):
        if (kwargs["round_"], kwargs["step"]) == (2, 3):
            raise Killed
        plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(health, "check_finite", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, tmp_path / "killed", beta="auto")
    begun = read_json(tmp_path / "killed" / "round-1" / "round.json")["beta"]
    found = [record["beta"] for record in play_all(sdxl_dir, tmp_path / "killed", beta="auto")]
    assert found[0] == begun and len(set(found)) == 2 and all(0 < beta < 1000 for beta in found)
    play_all(sdxl_dir, tmp_path / "given", beta=found)
    assert len({file_hash(tmp_path / run / WEIGHTS) for run in ("killed", "given")}) == 1
