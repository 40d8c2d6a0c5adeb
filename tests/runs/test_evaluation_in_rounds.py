"""What a run's settings make of its evaluations."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from spin_diffusion.evaluation.in_rounds import run_evaluation
from spin_diffusion.evaluation.prompt_sets import load_prompts
from spin_diffusion.evaluation.settings import EvaluationSettings
from spin_diffusion.store.progress import Progress


@pytest.mark.parametrize(
    ("scales", "guidance", "compared", "headline"),
    [(None, 7.5, [7.5], 7.5), ([3.0, 1.0], 3.0, [3.0, 1.0], 3.0), ([3.0, 1.0], 7.5, [3.0, 1.0], 1.0)],
)
def test_the_headline_is_at_the_opponents_guidance_where_that_is_compared(
    scales, guidance, compared, headline, tiny_prompts, tmp_path
):
    settings = EvaluationSettings(validation_prompts=str(tiny_prompts), validation_guidance_scales=scales)
    evaluation = run_evaluation(
        settings, load_prompts(str(tiny_prompts), None), Path(tmp_path), Accelerator(cpu=True), Progress(),
        seed=0, sampler="ddim", num_inference_steps=4, guidance_scale=guidance, resolution=32,
        eta=0.5, precision="bf16",
    )  # fmt: skip
    assert evaluation.protocol["guidance_scales"] == compared and evaluation.headline_scale == headline
    assert (evaluation.protocol["eta"], evaluation.protocol["precision"]) == (0.5, "bf16")
