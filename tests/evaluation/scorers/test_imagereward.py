import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._blip import build_blip
from spin_diffusion.evaluation.scorers._inputs import crop_middle_round
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import (
    SIDE,
    ImageRewardReference,
    imagereward_shapes,
    imagereward_tensors,
    pictures,
    rewrite,
    write_imagereward,
)

PROMPTS = ["a red fox", "an egg, blue", "", "reds " * 60, "A RED egg"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return imagereward_tensors()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """A tiny ImageReward as it is published, with a tokenizer; do not write into it."""
    return write_imagereward(tmp_path_factory.mktemp("imagereward"), tensors).parent


def inputs(folder: Path, images) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokenizer = BertTokenizer.from_pretrained(folder)
    text = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return torch.stack([crop_middle_round(image, SIDE) for image in images]), text["input_ids"], text["attention_mask"]


def test_rewards_equal_the_original_architectures(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    images = pictures(5)
    expected = ImageRewardReference(tensors).reward(*inputs(folder, images))
    scorer = load_scorer(f"imagereward={folder}", "cpu")
    rewards = scorer(images, PROMPTS)
    assert (rewards - expected).abs().max() < 1e-5
    assert expected.std() > 0.01, "the test would see no difference"
    assert scorer.truncated(PROMPTS) == [False, False, False, True, False]
    assert scorer.features is None and set(scorer.checkpoint) >= {"ImageReward.pt", "vocab.txt"}


def test_rewards_equal_what_the_package_image_reward_computed(folder: Path) -> None:
    made = json.loads((Path(__file__).parent / "fixtures" / "imagereward.json").read_text())
    rewards = load_scorer(f"imagereward={folder}", "cpu")(pictures(5), PROMPTS)
    assert (rewards - torch.tensor(made["rewards"])).abs().max() < 1e-5


def test_image_and_prompt_both_matter(folder: Path) -> None:
    scorer = load_scorer(f"imagereward={folder}", "cpu")
    images = pictures(2)
    scores = scorer([images[0], images[1], images[0]], ["a red fox", "a red fox", "blue"])
    assert min((scores[0] - scores[1]).abs(), (scores[0] - scores[2]).abs()) > 1e-3


def test_what_a_wrong_port_would_do_is_seen(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    pixels, ids, mask = inputs(folder, pictures(5))
    reference = ImageRewardReference(tensors)
    blip = build_blip(dict(tensors), "x.pt")
    with torch.no_grad():
        patches = blip.vision(pixel_values=pixels).last_hidden_state
        assert (patches - reference.encode_image(pixels)).abs().max() < 1e-5
        arguments = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": patches}
        right = blip.text(**arguments, is_decoder=False).last_hidden_state[:, 0]
        causal = blip.text(**arguments, is_decoder=True).last_hidden_state[:, 0]
        unmasked = blip.text(**arguments | {"attention_mask": None}, is_decoder=False).last_hidden_state[:, 0]
        assert (causal - right).abs().max() > 0.01 and (unmasked - right).abs().max() > 0.01
        for module in blip.vision.modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert module.eps == 1e-6
                module.eps = 1e-5  # transformers' default
        assert (blip.vision(pixel_values=pixels).last_hidden_state - patches).abs().max() > 1e-3
    assert {module.eps for module in blip.text.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-12}


def test_rewards_do_not_depend_on_the_batch_or_the_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load_scorer(f"imagereward={folder}", "cpu")
    images = pictures(5)
    together = scorer(images, PROMPTS)
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    monkeypatch.setattr("spin_diffusion.evaluation.scorers.imagereward.BATCH_SIZE", 2)
    backwards = scorer(images[::-1], PROMPTS[::-1]).flip(0)
    assert (together - alone).abs().max() < 1e-5 and (together - backwards).abs().max() < 1e-5


def test_the_published_sizes_are_accepted_exactly() -> None:
    shapes = imagereward_shapes((1024, 24, 4096), (768, 12, 3072), side=224, vocabulary=30524)
    counts = [sum(name.startswith(prefix) for name in shapes) for prefix in ("blip.visual", "blip.text_e", "mlp.")]
    assert counts == [24 * 12 + 6, 12 * 26 + 5, 10]
    blip = build_blip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "ImageReward.pt")
    assert blip.vision.config.image_size == 224 and blip.text.config.is_decoder
    assert len(blip.vision.state_dict()) == 294 and len(blip.text.state_dict()) == 316
    assert len(blip.head.state_dict()) == 10


KEYS = (
    "blip.visual_encoder.pos_embed",
    "blip.visual_encoder.blocks.1.attn.qkv.bias",
    "blip.text_encoder.encoder.layer.1.crossattention.self.value.weight",
    "blip.text_encoder.embeddings.LayerNorm.bias",
)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_and_a_wrong_shape_are_named(key: str, tensors: dict[str, torch.Tensor]) -> None:
    left = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(InputError, match=f"x.pt: key {re.escape(key)} is missing"):
        build_blip(left, "x.pt")
    with pytest.raises(InputError, match=f"x.pt: {re.escape(key)} has shape"):
        build_blip(tensors | {key: torch.zeros(3)}, "x.pt")


def test_a_key_too_many_is_named(tensors: dict[str, torch.Tensor]) -> None:
    for key in ("blip.visual_encoder.extra", "blip.text_encoder.pooler.dense.weight", "reward.weight"):
        with pytest.raises(InputError, match=f"x.pt: key {key} is not expected"):
            build_blip(tensors | {key: torch.zeros(2)}, "x.pt")
    with pytest.raises(InputError, match="key mlp.layers.7.bias is missing"):
        build_blip({name: tensor for name, tensor in tensors.items() if name != "mlp.layers.7.bias"}, "x.pt")


def test_blips_base_model_is_refused() -> None:
    shapes = imagereward_shapes((768, 1, 8), (768, 1, 8), side=28, vocabulary=9)
    with pytest.raises(InputError, match="holds BLIP's base model"):
        build_blip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "x.pt")
    shapes = imagereward_shapes((20, 1, 8), (768, 1, 8), side=28, vocabulary=9)
    with pytest.raises(InputError, match="a width of 20 is not divided by ImageReward's 16 heads"):
        build_blip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "x.pt")


def test_what_cannot_be_loaded_is_said_in_one_line(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write_imagereward(tmp_path, tensors)
    rewrite(path, lambda tensors: tensors.pop("mlp.layers.0.weight"))
    with pytest.raises(InputError, match="ImageReward.pt: key mlp.layers.0.weight is missing"):
        load_scorer(f"imagereward={path}", "cpu")
    torch.save(tensors, path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(
        InputError, match="has no tokenizer, .*bert-base-uncased.* put its .*vocab.txt.* beside"
    ) as caught:
        load_scorer(f"imagereward={path}", "cpu")
    assert "\n" not in str(caught.value)
