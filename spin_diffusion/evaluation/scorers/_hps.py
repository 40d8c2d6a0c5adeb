"""What both versions of HPS v2 share: ViT-H/14, letterboxed pixels, cleaned prompts, the bare cosine.

`hps_v2_1=PATH`: the published .pt file, a folder that holds it, or a hub id; a port to transformers' layout works too.
The published files have no tokenizer: it is read beside them (vocab.json and merges.txt, or tokenizer.json), else taken
from the hub (that of LAION's ViT-H/14, a few MB).

Token ids, pixels and scores are those of the authors' package (hpsv2 1.2.0), save where it is meant otherwise:

- it computes the product in half precision (steps of 0.00024) on a GPU, here it is fp32;
- it resizes as its torchvision does, here antialiased, as torchvision does since 0.17;
- "<end_of_text>" in a prompt is plain text here and ends the prompt there;
- it fails on transparency (RGBA), on images whose long side is 224 px already and on ones 450 times as long as wide;
  here the first stand over white and all have bars. EXIF's rotation, transparency without RGBA (palette, grey) and 16
  bits per channel are minded here.
"""

from dataclasses import replace
from pathlib import Path

from spin_diffusion.evaluation.scorers._clip import H14, CosineScorer, load_clip
from spin_diffusion.evaluation.scorers._inputs import letterbox, load_ftfy
from spin_diffusion.store.input_error import InputError

PUBLISHED = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def load_hps(device: str, path: str, version: str) -> CosineScorer:
    """The scorer of a version of HPS.

    Args:
        version: "v2.0" or "v2.1", which are not comparable.

    Raises:
        InputError: ftfy is not installed, or the weights cannot be had, or are another model's or the other version's.
    """
    load_ftfy()
    for other, name in PUBLISHED.items():
        if other != version and Path(path).name == name:
            raise InputError(f"{path} is HPS {other}; HPS {version} is {PUBLISHED[version]}")
    recipe = replace(
        H14,
        weights=(PUBLISHED[version], "model.safetensors"),
        pixels=letterbox,
        cleans_like_open_clip=True,
    )
    return CosineScorer(load_clip(device, path, recipe), lambda cosine: cosine)
