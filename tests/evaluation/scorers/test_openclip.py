"""The optional backbones of open_clip: a stand-in has the package's interface; where it is installed, it runs too."""

import hashlib
import json
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._inputs import crop_middle_round
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import (
    LIMIT,
    PATCH,
    PROMPTS,
    SIDE,
    TEXT_LAYERS,
    TEXT_WIDTH,
    VISION_LAYERS,
    VISION_WIDTH,
    OpenClipReference,
    open_clip_shapes,
    pictures,
    random_like,
)

ROOT = Path(__file__).resolve().parents[3]


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


def test_any_backbone_is_asked_for_by_its_name(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_scorer("openclip=ViT-B-32/laion2b_s34b_b79k", "cpu")
    assert package.asked == ("ViT-B-32", "laion2b_s34b_b79k", "cpu")
    for name in ("hf-hub:org/model", "local-dir:weights/tiny"):
        (tmp_path / "weights" / "tiny").mkdir(parents=True, exist_ok=True)
        load_scorer(f"openclip={name}", "cpu")
        assert package.asked == (name, None, "cpu")


def test_a_model_without_weights_is_refused_and_so_is_another_activation_than_theirs(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="MODEL/PRETRAINED"):
        load_scorer("openclip=ViT-B-32/", "cpu")  # open_clip would take random ones
    create = package.create_model_and_transforms

    def warned(*given, **named):
        warnings.warn("QuickGELU mismatch between final model config (quick_gelu=False) and 'x' (True).", stacklevel=2)
        return create(*given, **named)

    monkeypatch.setattr(package, "create_model_and_transforms", warned)
    with pytest.raises(InputError, match="another activation.*ViT-B-32-quickgelu"):
        load_scorer("openclip=ViT-B-32/openai", "cpu")


def test_files_of_this_machine_leave_their_hashes(package: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "b.pt").write_bytes(b"weights")
    scorer = load_scorer(f"openclip=ViT-B-32/{tmp_path / 'b.pt'}", "cpu")
    assert package.asked == ("ViT-B-32", str(tmp_path / "b.pt"), "cpu")
    assert scorer.checkpoint == {"open_clip (package)": "3.0", "b.pt": hashlib.sha256(b"weights").hexdigest()}


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


def write_local_dir(folder: Path) -> dict[str, Tensor]:
    """A tiny backbone in the layout of open_clip's own folders; returns its tensors."""
    shapes = open_clip_shapes(
        (VISION_WIDTH, VISION_LAYERS, 96), (TEXT_WIDTH, TEXT_LAYERS, 112), SIDE, projection=32, vocabulary=49408
    )
    tensors = random_like(shapes) | {"logit_scale": torch.tensor(4.5)}
    tensors["text_projection"] = -tensors["text_projection"]  # positive cosines, of which the score is made
    vision = {"layers": VISION_LAYERS, "width": VISION_WIDTH, "head_width": VISION_WIDTH // 16, "patch_size": PATCH,
              "mlp_ratio": 96 / VISION_WIDTH, "image_size": SIDE}  # fmt: skip
    text = {"context_length": LIMIT, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 16, "layers": TEXT_LAYERS,
            "mlp_ratio": 112 / TEXT_WIDTH}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "open_clip_model.safetensors")
    return tensors


@pytest.fixture
def real_package() -> ModuleType:
    try:
        import open_clip
    except Exception as error:  # beside a torchvision that does not fit, almost anything
        pytest.skip(f"open_clip cannot be imported ({error}); would score with the real package")
    return open_clip


def test_the_real_package_scores_a_local_backbone(real_package: ModuleType, tmp_path: Path) -> None:
    tensors = write_local_dir(tmp_path / "tiny")
    scorer = load_scorer(f"openclip=local-dir:{tmp_path / 'tiny'}", "cpu")
    images = [*pictures(3), Image.new("RGBA", (90, 60), (9, 200, 30, 128))]
    prompts = ["a red fox", "it\u2019s an egg", "a red fox " * 60, ""]
    reference = OpenClipReference(tensors)
    with torch.no_grad():
        image = F.normalize(reference.encode_image(torch.stack([crop_middle_round(i, SIDE) for i in images])))
        text = F.normalize(reference.encode_text(real_package.SimpleTokenizer()(prompts)))
    assert (scorer.features(images) - image).abs().max() < 1e-5
    expected = 100 * (image * text).sum(dim=1).clamp(min=0)
    assert (scorer(images, prompts) - expected).abs().max() < 1e-3 and expected.max() > 1
    assert scorer.truncated(prompts) == [False, False, True, False]
    assert scorer.checkpoint["open_clip (package)"] == real_package.__version__
    assert len(scorer.checkpoint["open_clip_model.safetensors"]) == 64


def test_the_real_package_runs_in_the_command(real_package: ModuleType, tmp_path: Path) -> None:
    write_local_dir(tmp_path / "tiny")
    models = []
    for number, name in enumerate(("base", "plus")):
        (tmp_path / name).mkdir()
        lines = []
        for i, image in enumerate(pictures(3, seed=number)):
            image.save(tmp_path / name / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "prompt": PROMPTS[i]}))
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
        models.append(f"{name}={tmp_path / name}")
    main = runpy.run_path(str(ROOT / "evaluation" / "evaluate.py"))["main"]
    argv = ["--models", *models, "--images_per_prompt", "1", "--scorers", f"openclip=local-dir:{tmp_path / 'tiny'}"]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (said,) = results["scorers"]
    assert said["state"] == "run" and said["checkpoint"]["open_clip_config.json"]
    states = {alarm["id"]: alarm["state"] for alarm in results["alarms"]}
    assert states["style_collapse"] != "not run", "its features serve the diversity alarms"
