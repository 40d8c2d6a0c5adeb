"""HPS, whose files are in open_clip's layout: the conversion against a plain-torch open_clip, and the scorers."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._clip import H14, ClipTowers, build_clip, config_of_shapes, load_clip, pooled
from spin_diffusion.evaluation.scorers._inputs import letterbox
from spin_diffusion.evaluation.scorers._open_clip_weights import to_clip_model
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import (
    END,
    LIMIT,
    PROMPTS,
    SIDE,
    START,
    OpenClipReference,
    open_clip_shapes,
    open_clip_tensors,
    pictures,
    rewrite,
    write_hps,
)


def convert(tensors: dict[str, torch.Tensor], activation: str = "gelu"):
    converted, names = to_clip_model(tensors, "x.pt")
    config = config_of_shapes(converted, H14, "x.pt")
    config.vision_config.hidden_act = config.text_config.hidden_act = activation
    config.text_config.eos_token_id = END
    return build_clip(config, converted, "x.pt", names)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=generator)
    ids = torch.randint(1, START, (4, LIMIT), generator=generator)
    for row, length in zip(ids, (3, 10, 40, LIMIT), strict=True):
        row[0], row[length - 1], row[length:] = START, END, 0
    return pixels, ids


def differences(model, reference: OpenClipReference) -> tuple[float, float]:
    """Largest difference of the unit features of images and of texts."""
    pixels, ids = inputs()
    with torch.no_grad():
        image = pooled(model.get_image_features(pixel_values=pixels))
        text = pooled(model.get_text_features(input_ids=ids))
        pairs = (image, reference.encode_image(pixels)), (text, reference.encode_text(ids))
    return tuple((F.normalize(ours) - F.normalize(theirs)).abs().max().item() for ours, theirs in pairs)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_converted_model_equals_open_clip(activation: str) -> None:
    tensors = open_clip_tensors()
    quick = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[activation]
    image, text = differences(convert(tensors, activation), OpenClipReference(tensors, activation=quick))
    assert image < 1e-6 and text < 1e-6


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_converted_model_equals_what_the_package_open_clip_computed(activation: str) -> None:
    made = json.loads((Path(__file__).parent / "fixtures" / "open_clip.json").read_text())
    pixels, ids = inputs()
    model = convert(open_clip_tensors(), activation)
    with torch.no_grad():
        image = F.normalize(pooled(model.get_image_features(pixel_values=pixels)))
        text = F.normalize(pooled(model.get_text_features(input_ids=ids)))
    assert (image - torch.tensor(made[activation]["image"])).abs().max() < 1e-6
    assert (text - torch.tensor(made[activation]["text"])).abs().max() < 1e-6


def swap(tensors: dict[str, torch.Tensor], first: str, second: str) -> dict[str, torch.Tensor]:
    swapped = dict(tensors)
    for kind in ("weight", "bias"):
        one, other = f"{first}.{kind}", f"{second}.{kind}"
        swapped[one], swapped[other] = tensors[other], tensors[one]
    return swapped


def test_what_a_wrong_conversion_would_do_is_seen() -> None:
    tensors = open_clip_tensors()
    reference = OpenClipReference(tensors)
    block = "transformer.resblocks.0"
    for number, prefix in enumerate(("visual.", "")):
        swapped = swap(tensors, f"{prefix}{block}.ln_1", f"{prefix}{block}.ln_2")
        assert differences(convert(swapped), reference)[number] > 1e-3
        name = f"{prefix}{block}.attn.in_proj_weight"
        key_value_query = tensors | {name: torch.roll(tensors[name], tensors[name].shape[0] // 3, dims=0)}
        assert differences(convert(key_value_query), reference)[number] > 1e-3
        name = f"{prefix}{block}.attn.in_proj_bias"
        assert differences(convert(tensors | {name: torch.zeros_like(tensors[name])}), reference)[number] > 1e-3
    assert max(differences(convert(swap(tensors, "visual.ln_pre", "visual.ln_post")), reference)) > 1e-3
    assert min(differences(convert(tensors, "quick_gelu"), reference)) > 1e-4, "the wrong activation"


def test_published_sizes_are_accepted_exactly() -> None:
    shapes = open_clip_shapes((1280, 32, 5120), (1024, 24, 4096), 224, projection=1024, vocabulary=49408)
    assert len(shapes) == 686
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted, names = to_clip_model(tensors, "HPS.pt")
    assert len(converted) == len(names) == 910 and set(names.values()) == set(shapes)
    config = config_of_shapes(converted, H14, "HPS.pt")
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (32, 24)
    assert config.vision_config.image_size == 224 and config.vision_config.hidden_act == "gelu"
    model = build_clip(config, converted, "HPS.pt", names)
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441


@pytest.mark.parametrize("key", ["visual.transformer.resblocks.2.ln_1.bias", "text_projection", "logit_scale"])
def test_a_missing_key_is_named_as_in_the_file(key: str) -> None:
    tensors = open_clip_tensors()
    tensors.pop(key)
    with pytest.raises(InputError, match=f"x.pt: key {key} is missing"):
        to_clip_model(tensors, "x.pt")


def test_a_key_too_many_and_a_wrong_shape_are_named_as_in_the_file() -> None:
    with pytest.raises(InputError, match="x.pt: key visual.attnpool.weight is not expected"):
        to_clip_model(open_clip_tensors() | {"visual.attnpool.weight": torch.zeros(2)}, "x.pt")
    name = "transformer.resblocks.1.mlp.c_proj.weight"
    with pytest.raises(InputError, match=rf"x.pt: {name} has shape \(64, 7\), not \(64, 112\)"):
        convert(open_clip_tensors() | {name: torch.zeros(64, 7)})
    with pytest.raises(InputError, match="text_projection has shape .3,., a matrix is expected"):
        to_clip_model(open_clip_tensors() | {"text_projection": torch.zeros(3)}, "x.pt")
    name = "visual.transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(InputError, match=f"{name} has shape .7,., not three equal parts"):
        to_clip_model(open_clip_tensors() | {name: torch.zeros(7)}, "x.pt")
    with pytest.raises(InputError, match="sizes make no CLIP"):
        convert({**open_clip_tensors(), "visual.conv1.weight": torch.zeros(81, 3, 14, 14)})


@pytest.mark.parametrize(
    ("name", "file"), [("hps_v2_0", "HPS_v2_compressed.pt"), ("hps_v2_1", "HPS_v2.1_compressed.pt")]
)
def test_hps_is_the_cosine_of_letterboxed_pixels_without_a_scale(name: str, file: str, tmp_path: Path) -> None:
    tensors = {key: tensor.half().float() for key, tensor in open_clip_tensors().items()}  # as they are published
    path = write_hps(tmp_path, tensors, file)
    reference = OpenClipReference(tensors)
    images = pictures(2, size=(90, 60)) + pictures(2, size=(61, 100))
    prompts = ["a RED  fox", "an egg &amp; blue", "re " * 90, ""]
    cleaned = ["a red fox", "an egg & blue", "re " * 90, ""]
    scorer = load_scorer(f"{name}={tmp_path}", "cpu")
    tokenizer = scorer.score.towers.text.tokenizer
    ids = tokenizer(cleaned, padding="max_length", truncation=True, max_length=LIMIT, return_tensors="pt")["input_ids"]
    first_end = (ids == END).int().argmax(dim=1)
    ids = ids.masked_fill(torch.arange(LIMIT) > first_end[:, None], 0)
    with torch.no_grad():
        image = F.normalize(reference.encode_image(torch.stack([letterbox(picture, SIDE) for picture in images])))
        expected = (image * F.normalize(reference.encode_text(ids))).sum(dim=1)
    assert (scorer(images, prompts) - expected).abs().max() < 1e-6
    assert expected.abs().max() > 0.05 and scorer.truncated(prompts) == [False, False, True, False]
    assert scorer.features is None
    assert set(scorer.checkpoint) >= {file, "vocab.json", "ftfy (package)"}
    assert torch.equal(load_scorer(f"{name}={path}", "cpu")(images, prompts), scorer(images, prompts))


def test_the_other_versions_file_is_refused(tmp_path: Path) -> None:
    path = write_hps(tmp_path, open_clip_tensors())
    with pytest.raises(InputError, match="HPS_v2_compressed.pt is HPS v2.0; HPS v2.1 is HPS_v2.1_compressed.pt"):
        load_scorer(f"hps_v2_1={path}", "cpu")
    with pytest.raises(InputError, match="holds none of HPS_v2.1_compressed.pt"):
        load_scorer(f"hps_v2_1={tmp_path}", "cpu")


def test_a_key_missing_in_the_published_file_is_named(tmp_path: Path) -> None:
    path = write_hps(tmp_path, open_clip_tensors())
    rewrite(path, lambda tensors: tensors.pop("visual.proj"))
    with pytest.raises(InputError, match="HPS_v2_compressed.pt: key visual.proj is missing"):
        load_scorer(f"hps_v2_0={path}", "cpu")


def test_an_open_clip_file_serves_the_clip_score_too(tmp_path: Path) -> None:
    path = write_hps(tmp_path, open_clip_tensors(), "open_clip_model.bin")
    towers = load_clip("cpu", str(path), H14)
    assert isinstance(towers, ClipTowers)
    assert load_scorer(f"clip_h14={path}", "cpu")(pictures(4), PROMPTS).shape == (4,)
