"""What a run's settings make of its evaluations."""

from dataclasses import replace

import pytest

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.evaluation.prompt_sets import load_prompts
from spin_diffusion.runs.image_evaluator import picture_protocol
from spin_diffusion.samples.sampling import OWN_SIZE, REAL_SIZE, Sampling


@pytest.mark.parametrize(
    ("scales", "guidance", "compared", "headline"),
    [("null", 7.5, [7.5], 7.5), ("[3.0, 1.0]", 3.0, [3.0, 1.0], 3.0), ("[3.0, 1.0]", 7.5, [3.0, 1.0], 1.0)],
)
def test_the_headline_is_at_the_opponents_guidance_where_that_is_compared(
    scales, guidance, compared, headline, tiny_prompts
):
    config = parse_config(
        ["--pretrained_model_name_or_path", "base", "--max_train_steps", "1", "--sampler", "ddim"]
        + ["--validation_guidance_scales", scales, "--guidance_scale", str(guidance)]
    )
    sampling = config.sampling.record(32, "bf16", REAL_SIZE)
    protocol, scale = picture_protocol(config, load_prompts(str(tiny_prompts), None), sampling)
    assert protocol["guidance_scales"] == compared and scale == headline
    assert Sampling.of_protocol(protocol, guidance) == replace(sampling, size_condition=OWN_SIZE)
