"""Tiny random checkpoints in the layouts in which scorers are published, and plain-torch forwards of two of them.

Every parameter is random, LayerNorms and biases too: with the usual ones and zeros a swapped LayerNorm or a lost bias
would pass unseen. The forwards are written from the papers' and packages' descriptions, on nothing but torch.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from tests import tiny

SIDE = 56
PATCH = 14
VISION_WIDTH, VISION_LAYERS = 80, 3
TEXT_WIDTH, TEXT_LAYERS = 64, 2
VOCABULARY, LIMIT = 517, 77
START, END = 515, 516
PROMPTS = ["a red fox", "an egg, blue", "re", "an apple and a chair " * 3]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "egg", "blue", "##s", ",", "an"]


def pictures(number: int, seed: int = 0, size: tuple[int, int] = (68, 60)) -> list[Image.Image]:
    """Images of smooth random colours, of `size` (width, height) px.

    By default the margin at SIDE is 7 px, where half a margin is 3 or 4 by dialect.
    """
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (number, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in small]


def random_like(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes: matrices keep the size of what they multiply, vectors are about 0 or, for gains, 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_gain = len(shape) == 1 and name.endswith("weight")
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "embedding" not in name else 25
        tensors[name] = 1 + 0.3 * noise if is_gain else noise / fan_in**0.5
    return tensors


def clip_config(activation: str, projection: int) -> CLIPConfig:
    """A tiny CLIP whose towers differ in every size."""
    return CLIPConfig(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 5,
            "patch_size": PATCH,
            "image_size": SIDE,
            "hidden_act": activation,
            "projection_dim": projection,
        },
        text_config={
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 112,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "hidden_act": activation,
            "projection_dim": projection,
            # As in published configs: an end token that no tokenizer has.
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        projection_dim=projection,
    )


def write_clip(folder: Path, activation: str = "gelu", projection: int = 32, seed: int = 0) -> CLIPModel:
    """Write a folder in transformers' layout with a tokenizer; returns the model, made by transformers alone."""
    tiny.build_tokenizer(folder, pad="<|endoftext|>")
    model = CLIPModel(clip_config(activation, projection)).eval()
    tensors = random_like({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, seed)
    tensors["logit_scale"] = torch.tensor(4.5)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    return model


def open_clip_shapes(
    vision: tuple[int, int, int], text: tuple[int, int, int], side: int, projection: int, vocabulary: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's ViT state dict. `vision` and `text` are (width, layers, inner width)."""
    width, _, _ = vision
    shapes = {
        "positional_embedding": (LIMIT, text[0]),
        "text_projection": (text[0], projection),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((side // PATCH) ** 2 + 1, width),
        "visual.proj": (width, projection),
        "visual.conv1.weight": (width, 3, PATCH, PATCH),
        "token_embedding.weight": (vocabulary, text[0]),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text[0]}
    for prefix, (wide, layers, inner) in {"visual.": vision, "": text}.items():
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": wide, f"{block}.ln_2": wide}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * wide, wide), f"{block}.attn.in_proj_bias": (3 * wide,)}
            for layer, (rows, columns) in {
                "attn.out_proj": (wide, wide),
                "mlp.c_fc": (inner, wide),
                "mlp.c_proj": (wide, inner),
            }.items():
                shapes |= {f"{block}.{layer}.weight": (rows, columns), f"{block}.{layer}.bias": (rows,)}
    return shapes | {f"{name}.{kind}": (wide,) for name, wide in norms.items() for kind in ("weight", "bias")}


def open_clip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tiny random open_clip state dict; both towers have 16 heads, as in ViT-H/14."""
    shapes = open_clip_shapes(
        (VISION_WIDTH, VISION_LAYERS, 96), (TEXT_WIDTH, TEXT_LAYERS, 112), SIDE, projection=32, vocabulary=VOCABULARY
    )
    return random_like(shapes, seed) | {"logit_scale": torch.tensor(4.5)}


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, of (batch, tokens, width)."""
    split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    logits = split[0] @ split[1].transpose(2, 3) / math.sqrt(split[0].shape[3])
    return ((logits if mask is None else logits + mask).softmax(dim=3) @ split[2]).transpose(1, 2).flatten(2)


class OpenClipReference:
    """open_clip's forward on its own state dict."""

    def __init__(self, tensors: dict[str, Tensor], heads: int = 16, activation=F.gelu) -> None:
        self.tensors, self.heads, self.activation = tensors, heads, activation

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-5)

    def blocks(self, x: Tensor, prefix: str, layers: int, mask: Tensor | None = None) -> Tensor:
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            weight, bias = self.tensors[f"{block}.attn.in_proj_weight"], self.tensors[f"{block}.attn.in_proj_bias"]
            query, key, value = F.linear(self.norm(x, f"{block}.ln_1"), weight, bias).chunk(3, dim=2)
            x = x + self.linear(attention(query, key, value, self.heads, mask), f"{block}.attn.out_proj")
            inner = self.activation(self.linear(self.norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = x + self.linear(inner, f"{block}.mlp.c_proj")
        return x

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, side, side) -> (batch, projection)."""
        patches = F.conv2d(pixels, self.tensors["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
        first = self.tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.tensors["visual.positional_embedding"]
        x = self.blocks(self.norm(x, "visual.ln_pre"), "visual.", VISION_LAYERS)
        return self.norm(x[:, 0], "visual.ln_post") @ self.tensors["visual.proj"]

    def encode_text(self, ids: Tensor) -> Tensor:
        """(batch, 77), filled up with 0 -> (batch, projection), read at the highest id."""
        causal = torch.full((LIMIT, LIMIT), -math.inf).triu(1)
        x = self.tensors["token_embedding.weight"][ids] + self.tensors["positional_embedding"]
        x = self.norm(self.blocks(x, "", TEXT_LAYERS, causal), "ln_final")
        return x[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.tensors["text_projection"]


def write_hps(folder: Path, tensors: dict[str, Tensor], name: str = "HPS_v2_compressed.pt") -> Path:
    """Write the tensors in half precision under "state_dict", as HPS is published, and a tokenizer beside them."""
    tiny.build_tokenizer(folder, pad="<|endoftext|>")
    halves = {key: tensor.half() for key, tensor in tensors.items()}
    torch.save({"epoch": 1, "state_dict": halves}, folder / name)
    return folder / name


def imagereward_shapes(
    vision: tuple[int, int, int], text: tuple[int, int, int], side: int, vocabulary: int, positions: int = 512
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward's state dict. `vision` and `text` are (width, layers, inner width)."""
    width, layers, inner = vision
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // PATCH) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
    }
    norms = {"norm": width}
    linears: dict[str, tuple[int, int]] = {}
    for i in range(layers):
        norms |= {f"blocks.{i}.norm1": width, f"blocks.{i}.norm2": width}
        linears |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        linears |= {f"blocks.{i}.mlp.fc1": (inner, width), f"blocks.{i}.mlp.fc2": (width, inner)}
    vision_shapes = shapes | _with_biases(norms, linears)

    wide, layers, inner = text
    shapes = {
        "embeddings.position_ids": (1, positions),
        "embeddings.word_embeddings.weight": (vocabulary, wide),
        "embeddings.position_embeddings.weight": (positions, wide),
    }
    norms, linears = {"embeddings.LayerNorm": wide}, {}
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for kind, key_width in {"attention": wide, "crossattention": width}.items():
            linears |= {f"{layer}.{kind}.self.query": (wide, wide), f"{layer}.{kind}.output.dense": (wide, wide)}
            linears |= {f"{layer}.{kind}.self.{part}": (wide, key_width) for part in ("key", "value")}
            norms[f"{layer}.{kind}.output.LayerNorm"] = wide
        linears |= {f"{layer}.intermediate.dense": (inner, wide), f"{layer}.output.dense": (wide, inner)}
        norms[f"{layer}.output.LayerNorm"] = wide
    text_shapes = shapes | _with_biases(norms, linears)

    heads = {"blip.vision_proj": (256, width), "blip.text_proj": (256, wide)}
    return (
        {f"blip.visual_encoder.{name}": shape for name, shape in vision_shapes.items()}
        | {f"blip.text_encoder.{name}": shape for name, shape in text_shapes.items()}
        | _with_biases({}, heads)
        | {f"mlp.{name}": shape for name, shape in head_shapes().items()}
    )


def head_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head that aesthetics and ImageReward share."""
    linears = {"0": (1024, 768), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}
    return _with_biases({}, {f"layers.{i}": shape for i, shape in linears.items()})


def _with_biases(norms: dict[str, int], linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def imagereward_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tiny random ImageReward: vision as narrow as its 16 heads allow, text as wide as the head reads.

    What enters the first LayerNorms is small, so that their eps shows.
    """
    tensors = random_like(imagereward_shapes((32, 2, 48), (768, 2, 64), SIDE, len(BERT_WORDS), positions=40), seed)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"blip.visual_encoder.{name}"] *= 0.003
    for name in ("word_embeddings", "position_embeddings"):
        tensors[f"blip.text_encoder.embeddings.{name}.weight"] *= 0.003
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


class ImageRewardReference:
    """The forward of the package image-reward on its own state dict, up to the reward."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=eps)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(batch, 3, side, side) -> (batch, 1 + patches, width)."""
        v = "blip.visual_encoder"
        weight, bias = self.tensors[f"{v}.patch_embed.proj.weight"], self.tensors[f"{v}.patch_embed.proj.bias"]
        x = F.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([self.tensors[f"{v}.cls_token"].expand(len(x), 1, -1), x], dim=1) + self.tensors[f"{v}.pos_embed"]
        for i in range(2):
            block = f"{v}.blocks.{i}"
            query, key, value = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=2)
            x = x + self.linear(attention(query, key, value, heads=16), f"{block}.attn.proj")
            inner = F.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(inner, f"{block}.mlp.fc2")
        return self.norm(x, f"{v}.norm", 1e-6)

    def attend(self, x: Tensor, source: Tensor, name: str, mask: Tensor | None) -> Tensor:
        query, key, value = (
            self.linear(states, f"{name}.self.{part}")
            for part, states in (("query", x), ("key", source), ("value", source))
        )
        read = self.linear(attention(query, key, value, heads=12, mask=mask), f"{name}.output.dense")
        return self.norm(read + x, f"{name}.output.LayerNorm", 1e-12)

    def reward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch,) standardised rewards; words see all words, and all of the image."""
        patches, t = self.encode_image(pixels), "blip.text_encoder"
        x = self.tensors[f"{t}.embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{t}.embeddings.LayerNorm", 1e-12)
        padding = torch.where(mask.bool(), 0.0, -1e9)[:, None, None]
        for i in range(2):
            layer = f"{t}.encoder.layer.{i}"
            x = self.attend(x, x, f"{layer}.attention", padding)
            x = self.attend(x, patches, f"{layer}.crossattention", None)
            inner = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(self.linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm", 1e-12)
        x = x[:, 0]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_bert_tokenizer(folder: Path) -> None:
    """Write the vocabulary of BERT_WORDS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_imagereward(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write ImageReward.pt as it is published, and a tokenizer beside it."""
    write_bert_tokenizer(folder)
    torch.save(tensors, folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def head_tensors(seed: int = 0, of_zero: float = 5.236645845) -> dict[str, Tensor]:
    """A random head that says `of_zero` of a feature of zeros, as the published one does."""
    tensors = random_like(head_shapes(), seed)
    x = torch.zeros(1, 768)
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"])
    tensors["layers.7.bias"] = tensors["layers.7.bias"] + of_zero - x[0]
    return tensors


def write_aesthetics(folder: Path, head: dict[str, Tensor], projection: int = 768) -> CLIPModel:
    """Write a backbone and the head beside it; returns the backbone."""
    model = write_clip(folder, "quick_gelu", projection)
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return model


def rewrite(path: Path, change) -> None:
    """Change the tensors of a file of weights in place."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    else:
        loaded = torch.load(path, weights_only=True)
        change(loaded.get("state_dict", loaded))
        torch.save(loaded, path)


def shard(folder: Path, num_shards: int = 3, name: str = "model.safetensors") -> Path:
    """Split a folder's weights as transformers splits large ones; returns the index, which replaces the one file."""
    from safetensors.torch import load_file

    one = folder / name
    is_safe = one.suffix == ".safetensors"
    tensors = load_file(one) if is_safe else torch.load(one, weights_only=True)
    one.unlink()
    weight_map = {}
    for i in range(num_shards):
        part = {key: tensors[key] for key in sorted(tensors)[i::num_shards]}
        shard_name = f"{one.stem}-{i + 1:05d}-of-{num_shards:05d}{one.suffix}"
        save_file(part, folder / shard_name) if is_safe else torch.save(part, folder / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}), encoding="utf-8")
    return index
