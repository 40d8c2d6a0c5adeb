import ast
import importlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import CLIPModel

from spin_diffusion.evaluation.scorers import About, LoadedScorer, Scorer, about, load_scorer
from spin_diffusion.evaluation.scorers._clip import (
    H14,
    L14,
    FeatureCache,
    build_clip,
    config_of_shapes,
    load_clip,
    pooled,
)
from spin_diffusion.evaluation.scorers._inputs import crop_middle_floor, full_precision
from spin_diffusion.store.input_error import InputError
from tests import tiny
from tests.evaluation.scorers.tiny_models import (
    PROMPTS,
    SIDE,
    clip_config,
    pictures,
    random_like,
    rewrite,
    write_clip,
    write_hps,
)

LEARNED = ("pickscore", "hps_v2_0", "hps_v2_1", "clip_h14", "clip_l14", "aesthetics", "imagereward", "openclip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with gelu, in transformers' layout; do not write into it."""
    path = tmp_path_factory.mktemp("clip")
    write_clip(path)
    return path


def embed_directly(model: CLIPModel, folder: Path, images: list[Image.Image], prompts: list[str]):
    """Features by transformers alone, one at a time, prompts cut and filled by the tokenizer."""
    tokenizer = tiny.CLIPTokenizer.from_pretrained(folder)
    image_rows, text_rows = [], []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            pixels = crop_middle_floor(image, SIDE)[None]
            image_rows.append(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))
            ids = tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
            hidden = model.text_model(**ids).last_hidden_state
            end = ids["input_ids"][0].tolist().index(tokenizer.eos_token_id)
            text_rows.append(model.text_projection(hidden[:, end]))
    normalise = torch.nn.functional.normalize
    return normalise(torch.cat(image_rows)), normalise(torch.cat(text_rows))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", ["pickscore", "clip_h14", "clip_l14"])
def test_scores_equal_transformers_own(name: str, activation: str, tmp_path: Path) -> None:
    model = write_clip(tmp_path, activation)
    images = pictures(4)
    scorer = load_scorer(f"{name}={tmp_path}", "cpu")
    image_features, text_features = embed_directly(model, tmp_path, images, PROMPTS)
    cosines = (image_features * text_features).sum(dim=1)
    assert cosines.abs().max() > 0.05 and cosines.min() < 0 < cosines.max(), "the test would see no difference"
    expected = torch.exp(torch.tensor(4.5)) * cosines if name == "pickscore" else 100 * cosines.clamp(min=0)
    assert (scorer.features(images) - image_features).abs().max() < 1e-5
    assert (scorer.score.towers.text_features(PROMPTS) - text_features).abs().max() < 1e-5
    assert (scorer(images, PROMPTS) - expected).abs().max() < 1e-3  # 1e-5 of the cosine, times 100
    assert scorer.score.towers.scale.item() == pytest.approx(90.017, abs=1e-3)


def test_the_wrong_activation_and_swapped_norms_would_be_seen(folder: Path) -> None:
    images = pictures(4)
    right = load_clip("cpu", str(folder), H14)
    tensors = {name: tensor.clone() for name, tensor in right.model.state_dict().items()}
    pixels = torch.stack([crop_middle_floor(image, SIDE) for image in images])

    def features(config, tensors) -> torch.Tensor:
        config.text_config.eos_token_id = 516
        model = build_clip(config, tensors, "x")
        with torch.no_grad():
            return torch.nn.functional.normalize(pooled(model.get_image_features(pixel_values=pixels)), dim=1)

    same = features(clip_config("gelu", 32), tensors)
    assert (same - right.image_features(images)).abs().max() < 1e-6
    assert (features(clip_config("quick_gelu", 32), tensors) - same).abs().max() > 1e-4
    swapped = dict(tensors)
    for kind in ("weight", "bias"):
        first, second = (f"vision_model.encoder.layers.0.layer_norm{i}.{kind}" for i in (1, 2))
        swapped[first], swapped[second] = tensors[second], tensors[first]
    assert (features(clip_config("gelu", 32), swapped) - same).abs().max() > 1e-3


def test_scores_do_not_depend_on_the_batch_or_the_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(6), ["a red fox", "an egg", "a red fox", "x " * 200, "", "an egg"]
    together = load_clip("cpu", str(folder), H14).cosines(images, prompts)
    monkeypatch.setattr("spin_diffusion.evaluation.scorers._clip.BATCH_SIZE", 2)
    fresh = load_clip("cpu", str(folder), H14)
    backwards = fresh.cosines(images[::-1], prompts[::-1]).flip(0)
    alone = torch.cat([fresh.cosines([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert (together - backwards).abs().max() < 1e-6 and (together - alone).abs().max() < 1e-6
    assert not torch.allclose(together, fresh.cosines(images, prompts[::-1]), atol=1e-3)


def test_features_are_unit_vectors_in_fp32_without_gradient(folder: Path) -> None:
    features = load_scorer(f"clip_h14={folder}", "cpu").features(pictures(3))
    assert features.shape == (3, 32) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.allclose(features.norm(dim=1), torch.ones(3))


def test_equal_images_and_prompts_are_embedded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = load_clip("cpu", str(folder), H14)
    images = pictures(3)
    seen: list[tuple[str, int]] = []

    def count(name: str) -> None:
        embed = getattr(towers.model, name)

        def counted(**inputs: torch.Tensor):
            seen.extend((name, len(tensor)) for tensor in inputs.values())
            return embed(**inputs)

        monkeypatch.setattr(towers.model, name, counted)

    count("get_image_features")
    count("get_text_features")
    first = towers.cosines([images[0], images[1], images[0]], ["a", "b", "a"])
    assert sorted(seen) == [("get_image_features", 2), ("get_text_features", 2)]
    again = towers.cosines([images[1].copy(), images[2], images[0]], ["b", "c", "a"])
    assert sorted(seen[2:]) == [("get_image_features", 1), ("get_text_features", 1)]
    assert first[0] == first[2] == again[2] and first[1] == again[0]


def test_the_cache_forgets_the_oldest() -> None:
    cache = FeatureCache(size=2)
    computed: list[int] = []

    def compute(positions: list[int]) -> torch.Tensor:
        computed.append(len(positions))
        return torch.tensor([[float(i)] for i in positions])

    assert cache.get(["a", "b", "c", "b"], compute).flatten().tolist() == [0, 1, 2, 1] and computed == [3]
    cache.get(["c"], compute)
    assert computed == [3], "c is known"
    cache.get(["a"], compute)
    assert computed == [3, 1], "a was forgotten"


def test_a_backbone_is_loaded_once_and_freed_when_nobody_holds_it(folder: Path) -> None:
    first, second = load_clip("cpu", str(folder), L14), load_clip("cpu", f"{folder}/.", L14)
    assert first is second and load_clip("cpu", str(folder / "model.safetensors"), L14).model is not None
    assert load_scorer(f"clip_l14={folder}", "cpu").score.towers is first
    alive = weakref.ref(first.model)
    del first, second
    assert alive() is None


def test_what_was_loaded_is_recorded(folder: Path) -> None:
    import hashlib

    scorer = load_scorer(f"pickscore={folder}", "cpu")
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert scorer.checkpoint["model.safetensors"] == expected
    assert {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= set(scorer.checkpoint)
    assert scorer.source == str(folder)


def test_long_prompts_are_counted_and_still_told_apart(folder: Path) -> None:
    scorer = load_scorer(f"clip_h14={folder}", "cpu")
    prompts = ["red fox " * 60, "blue egg " * 60, "red"]
    assert scorer.truncated(prompts) == [True, True, False]
    features = scorer.score.towers.text_features(prompts)
    assert (features[0] - features[1]).norm() > 0.1


def test_the_embedding_is_read_at_the_tokenizers_end_whatever_the_config_says(tmp_path: Path) -> None:
    write_clip(tmp_path)
    towers = load_clip("cpu", str(tmp_path), H14)
    texts = towers.text_features(PROMPTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    del towers
    assert torch.equal(load_clip("cpu", str(tmp_path), H14).text_features(PROMPTS), texts)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_are_read_from_both_formats(suffix: str, folder: Path, tmp_path: Path) -> None:
    write_clip(tmp_path)
    if suffix == ".bin":
        from safetensors.torch import load_file

        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    for path in (tmp_path, tmp_path / name):
        scores = load_scorer(f"pickscore={path}", "cpu")(pictures(2), PROMPTS[:2])
        assert torch.equal(scores, load_scorer(f"pickscore={folder}", "cpu")(pictures(2), PROMPTS[:2]))


def test_half_precision_weights_and_old_position_ids_are_read(tmp_path: Path) -> None:
    write_clip(tmp_path)
    expected = load_scorer(f"pickscore={tmp_path}", "cpu")(pictures(2), PROMPTS[:2])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    rewrite(tmp_path / "model.safetensors", change)
    scorer = load_scorer(f"pickscore={tmp_path}", "cpu")
    assert scorer.score.towers.model.dtype == torch.float32
    scores = scorer(pictures(2), PROMPTS[:2])
    assert torch.allclose(scores, expected, atol=0.5) and not torch.equal(scores, expected)


def test_a_file_without_a_config_is_read_by_its_shapes(tmp_path: Path) -> None:
    write_hps(tmp_path, {})  # the tokenizer
    config = clip_config("gelu", 32)
    config.vision_config.num_attention_heads = config.text_config.num_attention_heads = 16
    shapes = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    tensors = random_like(shapes) | {"logit_scale": torch.tensor(4.5)}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    model = CLIPModel(config).eval()
    model.load_state_dict(tensors)
    images = pictures(4)
    expected = embed_directly(model, tmp_path, images, PROMPTS)[0]
    found = load_scorer(f"clip_h14={tmp_path}", "cpu").features(images)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("vision_model.encoder.layers.1.mlp.fc1.bias"),
            r"model.safetensors: key vision_model.encoder.layers.1.mlp.fc1.bias is missing",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if "text_model" in key],
            r"key .* and \d+ more is missing",
        ),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "key extra is not expected"),
        (
            lambda tensors: tensors.update({"visual_projection.weight": torch.zeros(31, 80)}),
            r"visual_projection.weight has shape \(31, 80\), not \(32, 80\)",
        ),
    ],
)
def test_a_wrong_key_or_shape_is_named(change, message: str, tmp_path: Path) -> None:
    write_clip(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(InputError, match=message) as caught:
        load_scorer(f"pickscore={tmp_path}", "cpu")
    assert "\n" not in str(caught.value)


def damage(folder: Path, what: str) -> None:
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "cut weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({"x": Path("x")}, folder / "pytorch_model.bin")
    elif what == "no tensors":
        (folder / "model.safetensors").unlink()
        torch.save([1, 2], folder / "pytorch_model.bin")
    elif what == "config":
        (folder / "config.json").write_text("{")
    elif what == "another type":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif what == "impossible":
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["num_attention_heads"] = 7
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "no tokenizer":
        (folder / "vocab.json").unlink()
        (folder / "tokenizer.json").unlink(missing_ok=True)
    elif what == "damaged tokenizer":
        (folder / "vocab.json").write_text("{")
        (folder / "tokenizer.json").unlink(missing_ok=True)
    elif what == "larger tokenizer":
        vocabulary = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(vocabulary | {f"new{i}": 517 + i for i in range(9)}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "holds none of model.safetensors, pytorch_model.bin"),
        ("cut weights", "model.safetensors is no readable file of tensors"),
        ("pickle", "pytorch_model.bin is no readable file of tensors"),
        ("no tensors", "pytorch_model.bin must hold a dict of tensors"),
        ("config", "config.json is no config of a CLIP"),
        ("another type", "config.json describes a model of type 'bert', not 'clip'"),
        ("impossible", "sizes make no CLIP|is no config of a CLIP"),
        (
            "no tokenizer",
            "has no tokenizer, .* put its tokenizer.json .or vocab.json and merges.txt. beside the weights",
        ),
        ("damaged tokenizer", "the tokenizer in .* is damaged"),
        ("larger tokenizer", "knows 517 tokens, its tokenizer has 526"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(what: str, message: str, tmp_path: Path) -> None:
    write_clip(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(InputError, match=message) as caught:
        load_scorer(f"clip_h14={tmp_path}", "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "openclip"])
def test_without_a_path_the_hub_is_asked_and_its_absence_said(name: str) -> None:
    checkpoint = about(name).checkpoint
    with pytest.raises(InputError, match=f"'{checkpoint}' is no local file or folder, and .* from the hub") as caught:
        load_scorer(name, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="/nowhere/at/all does not exist, and a hub id is written ORG/NAME"):
        load_scorer(f"{name}=/nowhere/at/all", "cpu")


def test_weights_and_tokenizer_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {name: tmp_path / name for name in ("yuvalkirstain/PickScore_v1", H14.tokenizer, "some/port")}
    for name in ("yuvalkirstain/PickScore_v1", "some/port"):
        write_clip(hub[name])
    hub[H14.tokenizer].mkdir(parents=True)
    for file in (*hub["some/port"].glob("vocab*"), *hub["some/port"].glob("*.txt"), *hub["some/port"].glob("token*")):
        file.rename(hub[H14.tokenizer] / file.name)
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not (hub[repository] / file).is_file():
            raise EntryNotFoundError(f"{file} is not there")
        return str(hub[repository] / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    images = pictures(2)
    scorer = load_scorer("pickscore", "cpu")
    assert scorer.source == "yuvalkirstain/PickScore_v1" and {repository for repository, _ in asked} == {scorer.source}
    port = load_scorer("pickscore=some/port", "cpu")
    assert (H14.tokenizer, "vocab.json") in asked, "a port without a tokenizer gets the backbone's"
    assert torch.equal(port(images, PROMPTS[:2]), scorer(images, PROMPTS[:2]))
    assert {"model.safetensors", "vocab.json"} <= set(port.checkpoint)
    (hub["some/port"] / "model.safetensors").unlink()
    del port
    with pytest.raises(InputError, match="model.safetensors cannot be had from the hub: .* is not there"):
        load_scorer("pickscore=some/port", "cpu")


def test_another_published_backbone_is_refused(tmp_path: Path) -> None:
    config = clip_config("gelu", 32)
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1}
    config.vision_config.update(wide)
    config.text_config.update({"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1})
    tiny.build_tokenizer(tmp_path, pad="!")
    CLIPModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a ViT-L/14; this scorer is a ViT-H/14"):
        load_scorer(f"pickscore={tmp_path}", "cpu")


def test_the_published_sizes_make_the_published_models() -> None:
    published = {
        H14: ((1280, 32, 5120), (1024, 24, 4096), 1024, 910),
        L14: ((1024, 24, 4096), (768, 12, 3072), 768, 14 + 16 * 36),
    }
    for recipe, (vision, text, projection, count) in published.items():
        config = clip_config(recipe.activation, projection)
        config.vision_config.update(
            dict(zip(("hidden_size", "num_hidden_layers", "intermediate_size"), vision, strict=True))
            | {"num_attention_heads": 16, "image_size": 224}
        )
        config.text_config.update(
            dict(zip(("hidden_size", "num_hidden_layers", "intermediate_size"), text, strict=True))
            | {"num_attention_heads": text[0] // 64, "vocab_size": 49408}
        )
        with torch.device("meta"):
            tensors = dict(CLIPModel(config).state_dict())
        found = config_of_shapes(tensors, recipe, "x")
        assert found.vision_config.to_diff_dict() == config.vision_config.to_diff_dict()
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_act"):
            assert getattr(found.text_config, key) == getattr(config.text_config, key)
        assert len(build_clip(found, tensors, "x").state_dict()) == count
        tensors.pop("logit_scale")
        with pytest.raises(InputError, match="key logit_scale is missing"):
            build_clip(found, tensors, "x")


def test_embeddings_of_transformers_4_and_5_are_read() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features = torch.ones(2, 3)
    assert pooled(features) is features and pooled(BaseModelOutputWithPooling(pooler_output=features)) is features


def test_scores_are_fp32_under_autocast_and_fast_matrix_products(folder: Path) -> None:
    scorer = load_scorer(f"pickscore={folder}", "cpu")
    expected = scorer(pictures(3), PROMPTS[:3])
    del scorer
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = load_scorer(f"pickscore={folder}", "cpu")(pictures(3), PROMPTS[:3])
        assert torch.get_float32_matmul_precision() == "medium"
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (scores - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", LEARNED)
def test_a_scorer_says_what_it_is_without_importing_models(name: str) -> None:
    said = about(name)
    assert isinstance(said, About) and all((said.title, said.scale, said.preprocessing, said.text, said.licence))
    assert (said.checkpoint is None) == (name == "openclip")


@pytest.mark.parametrize("name", LEARNED)
def test_a_scorers_file_imports_nothing_heavy_until_it_is_loaded(name: str) -> None:
    light = {"collections.abc", "dataclasses", "pathlib", "typing", "warnings", "torch", "jaxtyping", "PIL"}
    light |= {"spin_diffusion.evaluation.scorers", "spin_diffusion.store.input_error"}
    path = Path(importlib.import_module(f"spin_diffusion.evaluation.scorers.{name}").__file__)
    for node in ast.parse(path.read_text()).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert light.issuperset(modules), modules


def test_shared_modules_are_not_listed_as_scorers() -> None:
    with pytest.raises(InputError, match="It has ") as caught:
        load_scorer("_clip", "cpu")
    listed = str(caught.value)
    assert all(name in listed for name in LEARNED) and "_text" not in listed


def test_loaded_scorers_keep_to_the_contract(folder: Path) -> None:
    scorer = load_scorer(f"clip_h14={folder}", "cpu")
    assert isinstance(scorer, LoadedScorer) and isinstance(scorer.score, Scorer)
    assert scorer([], []).shape == (0,)
