"""Two-tower scorers: the cosine of an image's and a prompt's embedding, by transformers' CLIPModel.

CLIP score, PickScore, HPS and the aesthetics' backbone are one architecture with several weights. `load_clip` takes any
of them, in transformers' or open_clip's layout; the file of each scorer says which, and what becomes of the cosine.

Where weights come from, `NAME=PATH`: a folder with the weights, config.json and the tokenizer's files; or one file of
weights (what else is needed lies beside it); or a hub id. Without config.json, sizes are read from the shapes of the
tensors, heads and activation are the recipe's. Without a tokenizer, the recipe's is taken from the hub.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spin_diffusion.evaluation.scorers._checkpoints import (
    Files,
    count_blocks,
    fill,
    load_tokenizer,
    open_place,
    take,
)
from spin_diffusion.evaluation.scorers._inputs import (
    ClipText,
    clean_like_open_clip,
    crop_middle_floor,
    full_precision,
    load_ftfy,
)
from spin_diffusion.evaluation.scorers._open_clip_weights import is_open_clip, to_clip_model
from spin_diffusion.store.input_error import InputError, one_line
from spin_diffusion.store.keys import place_hash
from spin_diffusion.store.pictures import to_rgb

BATCH_SIZE = 32
BACKBONES = {
    (768, 512): "ViT-B",
    (1024, 768): "ViT-L/14",
    (1280, 1024): "ViT-H/14",
    (1408, 1024): "ViT-g/14",
    (1664, 1280): "ViT-bigG/14",
}
"""Width of the vision and of the text tower -> published model. Another one's weights would give plausible nonsense."""


@dataclass(frozen=True)
class Recipe:
    """What the name of a scorer fixes about its CLIP."""

    backbone: str
    """As in BACKBONES; sizes that are nobody's are taken as they are."""
    vision_heads: int
    text_heads: int
    activation: str
    """Heads and activation leave no trace in the tensors; config.json goes before them."""
    tokenizer: str
    """Hub id of the tokenizer, for checkpoints that have none."""
    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    """Names under which weights are looked for."""
    pixels: Callable[[Image.Image, int], Float[Tensor, "3 side side"]] = crop_middle_floor
    cleans_like_open_clip: bool = False


H14 = Recipe(
    "ViT-H/14",
    vision_heads=16,
    text_heads=16,
    activation="gelu",
    tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    weights=("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
L14 = Recipe(
    "ViT-L/14",
    vision_heads=16,
    text_heads=12,
    activation="quick_gelu",
    tokenizer="openai/clip-vit-large-patch14",
)


class FeatureCache:
    """Features of the last `size` inputs: an image of several scorers, or a prompt of several images, is embedded
    once."""

    def __init__(self, size: int = 8192) -> None:
        self.size = size
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(
        self, keys: list[Hashable], compute: Callable[[list[int]], Float[Tensor, "missing width"]]
    ) -> Float[Tensor, "batch width"]:
        """One row per key, computed where it is not yet known.

        Args:
            compute: rows of the inputs at these positions; called once, or not at all.
        """
        known = {key: self._features[key] for key in keys if key in self._features}
        # The first position of each key that is missing, so that equal inputs are computed once.
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
        if missing:
            known |= zip(missing, compute(list(missing.values())), strict=True)
        for key in keys:
            self._features[key] = known[key]
            self._features.move_to_end(key)
        while len(self._features) > self.size:
            self._features.popitem(last=False)
        return torch.stack([known[key] for key in keys])


def pixels_key(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    """Size and hash of an RGB image's pixels."""
    return image.size, hashlib.sha256(image.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class ClipTowers:
    """The image and the text tower of a CLIP, with what turns images and prompts into their inputs."""

    model: CLIPModel
    pixels: Callable[[Image.Image], Float[Tensor, "3 side side"]]
    text: ClipText
    device: str
    checkpoint: dict[str, str] = field(default_factory=dict)
    """Files that were loaded: name -> SHA-256."""
    _image_cache: FeatureCache = field(default_factory=FeatureCache)
    _text_cache: FeatureCache = field(default_factory=FeatureCache)

    def image_features(self, images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        """Embeddings of length 1, fp32 on the CPU; equal pixels are embedded once."""
        upright = [to_rgb(image) for image in images]
        keys: list[Hashable] = [pixels_key(image) for image in upright]
        return self._image_cache.get(keys, lambda at: self._embed(self._embed_images, [upright[i] for i in at]))

    def text_features(self, prompts: list[str]) -> Float[Tensor, "batch width"]:
        """Embeddings of length 1, fp32 on the CPU; equal prompts are embedded once."""
        return self._text_cache.get(list(prompts), lambda at: self._embed(self._embed_texts, [prompts[i] for i in at]))

    def cosines(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """Cosine of each image and its prompt, in [-1, 1], computed in fp32."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=1)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """exp(logit_scale), about 100."""
        return self.model.logit_scale.detach().float().cpu().exp()

    @torch.no_grad()
    def _embed(self, embed: Callable, inputs: list) -> Float[Tensor, "batch width"]:
        with full_precision(self.device):
            starts = range(0, len(inputs), BATCH_SIZE)
            parts = [pooled(embed(inputs[start : start + BATCH_SIZE])).float() for start in starts]
            return torch.nn.functional.normalize(torch.cat(parts), dim=1).cpu()

    def _embed_images(self, images: list[Image.Image]) -> Any:
        pixels = torch.stack([self.pixels(image) for image in images])
        return self.model.get_image_features(pixel_values=pixels.to(self.device))

    def _embed_texts(self, prompts: list[str]) -> Any:
        return self.model.get_text_features(input_ids=self.text.ids(prompts).to(self.device))


@dataclass(frozen=True, eq=False)
class CosineScorer:
    """A function of the cosine of image and prompt."""

    towers: ClipTowers
    of_cosine: Callable[[Float[Tensor, " batch"]], Float[Tensor, " batch"]]

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One score per image, fp32 on the CPU."""
        return self.of_cosine(self.towers.cosines(images, prompts))

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts the text tower does not read to their end."""
        return self.towers.text.truncated(prompts)

    @property
    def checkpoint(self) -> dict[str, str]:
        """Files that were loaded: name -> SHA-256."""
        return self.towers.checkpoint


class ClipScorer(CosineScorer):
    """A CosineScorer whose image embeddings serve the diversity alarms as well."""

    def features(self, images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        """Image embeddings of length 1, fp32 on the CPU."""
        return self.towers.image_features(images)


def clip_score(cosine: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """100 max(cos, 0), as most papers report CLIP score."""
    return 100 * cosine.clamp(min=0)


def pooled(output: Any) -> Float[Tensor, "batch width"]:
    """The projected embedding in what get_image_features or get_text_features returns.

    transformers 5 wraps it; what is called `pooler_output` there is already projected.
    """
    return output if isinstance(output, Tensor) else output.pooler_output


_loaded: WeakValueDictionary[tuple[str, str | None, str, Recipe], ClipTowers] = WeakValueDictionary()


def load_clip(device: str, path: str, recipe: Recipe) -> ClipTowers:
    """The towers of a checkpoint, on `device` in fp32; loaded once as long as anybody holds them.

    Args:
        path: folder, file of weights, or hub id.

    Raises:
        InputError: it cannot be had, or is another model's.
    """
    files = open_place(path)
    place = str(files.first or files.place)
    key = (place, place_hash(place), device, recipe)
    towers = _loaded.get(key)
    if towers is None:
        towers = _load(device, files, recipe)
        _loaded[key] = towers
    return towers


def _load(device: str, files: Files, recipe: Recipe) -> ClipTowers:
    where, tensors = files.weights(*recipe.weights)
    names: dict[str, str] = {}
    config = None
    if is_open_clip(tensors):
        tensors, names = to_clip_model(tensors, where)
    else:
        config = _read_config(files)
    config = config or config_of_shapes(tensors, recipe, where)
    backbone = BACKBONES.get((config.vision_config.hidden_size, config.text_config.hidden_size), recipe.backbone)
    if backbone != recipe.backbone:
        raise InputError(f"{where} is a {backbone}; this scorer is a {recipe.backbone}")
    tokenizer = load_tokenizer(CLIPTokenizer, files, ("vocab.json", "merges.txt"), recipe.tokenizer)
    if len(tokenizer) > config.text_config.vocab_size:
        raise InputError(
            f"{where} knows {config.text_config.vocab_size} tokens, its tokenizer has {len(tokenizer)}: "
            "they belong to different models"
        )
    # Published configs name an end token (2) that no tokenizer has; the embedding is read at the real one.
    config.text_config.eos_token_id = tokenizer.eos_token_id
    model = build_clip(config, tensors, where, names).to(device)
    checkpoint = dict(files.read)
    if recipe.cleans_like_open_clip:
        checkpoint["ftfy (package)"] = load_ftfy().__version__
    text = ClipText(
        tokenizer,
        limit=config.text_config.max_position_embeddings,
        clean=clean_like_open_clip if recipe.cleans_like_open_clip else None,
        reads_special_tokens=not recipe.cleans_like_open_clip,
    )
    side = config.vision_config.image_size
    return ClipTowers(model, lambda image: recipe.pixels(image, side), text, device, checkpoint)


def build_clip(
    config: CLIPConfig, tensors: dict[str, Tensor], where: str, names: dict[str, str] | None = None
) -> CLIPModel:
    """A CLIPModel of exactly these tensors, without initialising one first.

    Args:
        where: the file, for the error.
        names: CLIPModel's key -> the file's, where they differ.

    Raises:
        InputError: a key is missing, unexpected or of another shape.
    """
    try:
        with torch.device("meta"):
            model = CLIPModel(config)
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"{where}: its sizes make no CLIP: {one_line(error)}") from error
    fill(model, tensors, where, in_file=lambda name: (names or {}).get(name, name))
    return model


def config_of_shapes(tensors: dict[str, Tensor], recipe: Recipe, where: str) -> CLIPConfig:
    """The config of a CLIPModel with tensors of these shapes.

    Raises:
        InputError: a tensor that tells a size is missing, or the sizes make no model.
    """
    names = [
        f"{tower}_model.{part}.weight"
        for tower, first in (("vision", "patch_embedding"), ("text", "token_embedding"))
        for part in (f"embeddings.{first}", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    ]
    shapes = [tuple(take(dict(tensors), name, where).shape) for name in (*names, "visual_projection.weight")]
    try:
        (vision_width, _, patch, _), (positions, _), (vision_inner, _), *rest = shapes
        (vocabulary, text_width), (limit, _), (text_inner, _), (projection, _) = rest

        def tower(name: str, width: int, inner: int, heads: int) -> dict[str, int | str]:
            return {
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": count_blocks(tensors, f"{name}_model.encoder.layers."),
                "num_attention_heads": heads,
                "hidden_act": recipe.activation,
                "projection_dim": projection,
            }

        vision = tower("vision", vision_width, vision_inner, recipe.vision_heads)
        text = tower("text", text_width, text_inner, recipe.text_heads)
        return CLIPConfig(
            vision_config=vision | {"patch_size": patch, "image_size": patch * round((positions - 1) ** 0.5)},
            text_config=text | {"vocab_size": vocabulary, "max_position_embeddings": limit},
            projection_dim=projection,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{where}: its sizes make no CLIP: {one_line(error)}") from error


def _read_config(files: Files) -> CLIPConfig | None:
    path = files.find("config.json")
    if path is None:
        return None
    files.record(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("model_type") != "clip":
            raise InputError(f"{path} describes a model of type {values.get('model_type')!r}, not 'clip'")
        return CLIPConfig.from_dict(values)
    except (OSError, TypeError, AttributeError, json.JSONDecodeError, StrictDataclassError) as error:
        raise InputError(f"{path} is no config of a CLIP: {one_line(error)}") from error
