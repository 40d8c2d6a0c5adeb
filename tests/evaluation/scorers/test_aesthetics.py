from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._clip import pooled
from spin_diffusion.evaluation.scorers._inputs import crop_middle_floor
from spin_diffusion.evaluation.scorers._linear_head import LinearHead, build_head
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import SIDE, head_shapes, head_tensors, pictures, rewrite, write_aesthetics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone with features as wide as the head reads, and a random head; do not write into it."""
    path = tmp_path_factory.mktemp("aesthetics")
    write_aesthetics(path, head_tensors())
    return path


def affine(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear layers without activations are one: weight (768,) and bias."""
    weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for i in (0, 2, 4, 6, 7):
        layer = tensors[f"layers.{i}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + tensors[f"layers.{i}.bias"].double()
    return weight[0], bias[0]


def test_ratings_are_the_head_of_the_unit_feature(tmp_path: Path) -> None:
    head = head_tensors(seed=3)
    model = write_aesthetics(tmp_path, head)
    images = pictures(4)
    with torch.no_grad():
        pixels = torch.stack([crop_middle_floor(image, SIDE) for image in images])
        features = F.normalize(pooled(model.get_image_features(pixel_values=pixels)))
    weight, bias = affine(head)
    expected = (features.double() @ weight + bias).float()
    scorer = load_scorer(f"aesthetics={tmp_path}", "cpu")
    assert (scorer(images, ["x"] * 4) - expected).abs().max() < 1e-5
    assert expected.std() > 0.005


def test_the_prompt_and_the_length_of_a_feature_do_not_matter(folder: Path) -> None:
    scorer = load_scorer(f"aesthetics={folder}", "cpu")
    images = pictures(2)
    assert torch.equal(scorer(images, ["a", "b"]), scorer(images, ["c" * 999, ""]))
    assert scorer.truncated(["c" * 999]) == [False]
    features = torch.randn(5, 768)
    assert torch.allclose(scorer.score.rate(10 * features), scorer.score.rate(features), atol=1e-6)


def test_the_backbone_is_the_clip_scores_own_and_embeds_an_image_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, aesthetics = load_scorer(f"clip_l14={folder}", "cpu"), load_scorer(f"aesthetics={folder}", "cpu")
    assert clip.score.towers is aesthetics.score.towers
    images = pictures(3, seed=5)
    clip(images, ["a", "b", "c"])
    monkeypatch.setattr(type(clip.score.towers), "_embed_images", lambda *_: pytest.fail("embedded again"))
    aesthetics(images, ["a", "b", "c"])
    clip.features(images)


def test_what_was_loaded_is_recorded(folder: Path) -> None:
    checkpoint = load_scorer(f"aesthetics={folder}", "cpu").checkpoint
    assert {"sac+logos+ava1-l14-linearMSE.pth", "model.safetensors", "config.json"} <= set(checkpoint)


def test_the_head_is_found_by_its_file_too(folder: Path) -> None:
    by_file = load_scorer(f"aesthetics={folder / 'sac+logos+ava1-l14-linearMSE.pth'}", "cpu")
    by_folder = load_scorer(f"aesthetics={folder}", "cpu")
    assert torch.equal(by_file(pictures(2), ["", ""]), by_folder(pictures(2), ["", ""]))


def test_the_head_has_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        head = LinearHead()
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == head_shapes()
    assert len(head_shapes()) == 10 and head_shapes()["layers.0.weight"] == (1024, 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.pop("layers.6.weight"), "linearMSE.pth: key layers.6.weight is missing"),
        (lambda head: head.update({"layers.8.weight": torch.zeros(1)}), "key layers.8.weight is not expected"),
        (
            lambda head: head.update({"layers.0.weight": torch.zeros(1024, 512)}),
            r"layers.0.weight has shape \(1024, 512\), not \(1024, 768\)",
        ),
        (
            lambda head: head.update({"layers.7.bias": head["layers.7.bias"] + 1}),
            "is not LAION's head v2 .linearMSE.: it scores a feature of zeros 6.2366, the published one 5.2366",
        ),
    ],
)
def test_another_head_is_refused(change, message: str, tmp_path: Path) -> None:
    write_aesthetics(tmp_path, head_tensors())
    rewrite(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", change)
    with pytest.raises(InputError, match=message) as caught:
        load_scorer(f"aesthetics={tmp_path}", "cpu")
    assert "\n" not in str(caught.value)


def test_a_backbone_of_another_width_is_refused(tmp_path: Path) -> None:
    write_aesthetics(tmp_path, head_tensors(), projection=32)
    with pytest.raises(InputError, match="the backbone's features have 32 numbers, the head reads the 768"):
        load_scorer(f"aesthetics={tmp_path}", "cpu")


def test_a_head_without_a_backbone_asks_the_hub_for_openais(tmp_path: Path) -> None:
    torch.save(head_tensors(), tmp_path / "head.pth")
    with pytest.raises(InputError, match="'openai/clip-vit-large-patch14' is no local file or folder"):
        load_scorer(f"aesthetics={tmp_path / 'head.pth'}", "cpu")


def test_a_head_of_zeros_but_the_last_bias_is_constant() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in head_shapes().items()} | {"layers.7.bias": torch.ones(1)}
    assert build_head(tensors, "x")(torch.randn(3, 768)).tolist() == [1, 1, 1]
