"""What a run's settings make of its evaluations."""

import pytest

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.evaluation.prompt_sets import load_prompts
from spin_diffusion.runs.image_evaluator import picture_protocol


@pytest.mark.parametrize(
    ("scales", "guidance", "compared", "headline"),
    [("null", 7.5, [7.5], 7.5), ("[3.0, 1.0]", 3.0, [3.0, 1.0], 3.0), ("[3.0, 1.0]", 7.5, [3.0, 1.0], 1.0)],
)
def test_the_headline_is_at_the_opponents_guidance_where_that_is_compared(
    scales, guidance, compared, headline, tiny_prompts
):
    config = parse_config(
        ["--pretrained_model_name_or_path", "base", "--max_train_steps", "1", "--sampler", "ddim", "--eta", "0.5"]
        + ["--validation_guidance_scales", scales, "--guidance_scale", str(guidance)]
    )
    protocol, scale = picture_protocol(config, load_prompts(str(tiny_prompts), None), 32, "bf16")
    assert protocol["guidance_scales"] == compared and scale == headline
    assert (protocol["eta"], protocol["precision"]) == (0.5, "bf16")
