"""The optional backbones of open_clip, without the package: a stand-in has its interface."""

import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._pixels import crop_middle_round
from spin_diffusion.input_error import InputError
from tests.evaluation.scorers.tiny_models import pictures


class Model(torch.nn.Module):
    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) * 3

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.stack([ids.sum(dim=1), ids[:, 1], -ids[:, 2]], dim=1).float() * 5


def tokenize(texts: list[str], context_length: int = 6) -> Tensor:
    ids = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        tokens = [1, *(ord(letter) % 40 + 2 for letter in text), 99][:context_length]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("open_clip")
    module.__version__ = "3.0"

    def create(name: str, pretrained: str | None, device: str):
        if pretrained == "unknown":
            raise RuntimeError("Pretrained weights (unknown)\n not found")
        module.asked = (name, pretrained, device)
        return Model(), None, lambda image: crop_middle_round(image, 8)

    module.create_model_and_transforms = create
    module.get_tokenizer = lambda name: tokenize
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


def test_any_backbone_is_asked_for_by_its_name(package: ModuleType) -> None:
    load_scorer("openclip=ViT-B-32/laion2b_s34b_b79k", "cpu")
    assert package.asked == ("ViT-B-32", "laion2b_s34b_b79k", "cpu")
    load_scorer("openclip=hf-hub:org/model", "cpu")
    assert package.asked == ("hf-hub:org/model", None, "cpu")


def test_scores_are_100_times_the_positive_cosine(package: ModuleType) -> None:
    scorer = load_scorer("openclip=A/b", "cpu")
    images = [*pictures(3), Image.new("RGBA", (20, 10), (9, 200, 30, 255))]
    prompts = ["a", "bcd", "a", "x" * 10]
    texts = torch.nn.functional.normalize(Model().encode_text(tokenize(prompts)), dim=1)
    expected = 100 * (scorer.features(images) * texts).sum(dim=1).clamp(min=0)
    assert (scorer(images, prompts) - expected).abs().max() < 1e-4 and expected.max() > 1
    assert torch.allclose(scorer.features(images).norm(dim=1), torch.ones(4))
    assert scorer.truncated(["abcd", "abcde", ""]) == [False, True, False]
    assert scorer.checkpoint == {"open_clip (package)": "3.0"}


def test_without_a_backbone_the_syntax_is_said() -> None:
    for spec in ("openclip", "openclip=ViT-B-32"):
        with pytest.raises(InputError, match="openclip=MODEL/PRETRAINED, such as ViT-B-32/"):
            load_scorer(spec, "cpu")


def test_a_missing_or_broken_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r"pip install 'spin-diffusion\[openclip\]'") as caught:
        load_scorer("openclip=A/b", "cpu")
    assert "\n" not in str(caught.value)

    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "open_clip":
                raise RuntimeError("operator torchvision::nms does not exist\n  at ...")

    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(InputError, match=r"\[openclip\].*operator torchvision::nms does not exist at") as caught:
        load_scorer("openclip=A/b", "cpu")
    assert "\n" not in str(caught.value)


def test_a_backbone_that_cannot_be_loaded_is_named(package: ModuleType) -> None:
    with pytest.raises(InputError, match="open_clip cannot load A/unknown: Pretrained weights .unknown. not found"):
        load_scorer("openclip=A/unknown", "cpu")
