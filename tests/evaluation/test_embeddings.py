from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from spin_diffusion.evaluation.embeddings import load_embedding
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import pictures


@pytest.fixture
def tiny_dinov2(tmp_path: Path) -> tuple[Path, Dinov2Model]:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():  # layer scales of 1 and norms without bias would hide their loss
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny", model


def test_dinov2_gives_the_class_token_of_the_pictures_middle_square(tiny_dinov2: tuple[Path, Dinov2Model]) -> None:
    place, model = tiny_dinov2
    images = pictures(3, size=(448, 224))
    features = load_embedding(f"dinov2={place}", "cpu")(images)
    middle = np.stack([np.asarray(image)[:, 112:336] for image in images]) / 255
    pixels = (middle - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        tokens = model(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2).float()).last_hidden_state
    assert features == pytest.approx(tokens[:, 0].numpy(), abs=1e-4) and features.std(axis=0).min() > 1e-3


def test_dinov2_refuses_another_model_and_weights_that_lack_something(tiny_dinov2: tuple[Path, Dinov2Model]) -> None:
    place, _ = tiny_dinov2
    weights = load_file(place / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="key layernorm.bias is missing"):
        load_embedding(f"dinov2={place}", "cpu")
    config = place / "config.json"
    config.write_text(config.read_text().replace('"dinov2"', '"vit"'))
    with pytest.raises(InputError, match="of type 'vit', not 'dinov2'"):
        load_embedding(f"dinov2={place}", "cpu")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("torch.zeros(len(images))", r"embedding mine must return a tensor of shape \(2, width\), got \(2,\)"),
        ("torch.zeros(3, 4)", r"got \(3, 4\)"),
        ("None", "got NoneType"),
        ("torch.full((len(images), 2), float('nan'))", "features that are not finite"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_an_embedding_returns_is_checked(returned: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"import torch\ndef load(device):\n    return lambda images: {returned}\n")
    with pytest.raises(InputError, match=message):
        load_embedding(str(tmp_path / "mine.py"), "cpu")([Image.new("RGB", (8, 8))] * 2)
