"""ImageReward v1.0: which image of a prompt experts prefer; trained on DiffusionDB, so held out from Pick-a-Pic.

It reads the first 35 tokens of a prompt: look at the share of prompts that are cut.

`imagereward=PATH`: ImageReward.pt (or the same tensors as .safetensors), a folder that holds it, or a hub id. The
tokenizer is bert-base-uncased's: it is read beside the weights (vocab.txt or tokenizer.json), else taken from the hub.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import About, Scorer
from spin_diffusion.store.input_error import InputError

if TYPE_CHECKING:
    from spin_diffusion.evaluation.scorers._blip import Blip
    from spin_diffusion.evaluation.scorers._inputs import BertText

ABOUT = About(
    title="ImageReward",
    scale="standardised reward, mean 0 and standard deviation 1 over its training images; usually -2 to 2",
    role="held-out",
    checkpoint="THUDM/ImageReward",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square (offset rounded), CLIP's mean and std",
    text="BERT's tokenizer, the first 35 tokens",
    licence="Apache-2.0",
    citation="arXiv 2304.05977",
)
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
BATCH_SIZE = 16
TOKENIZER = "google-bert/bert-base-uncased"
BESIDE = (TOKENIZER,)


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is the .pt file, its folder or a hub id, default ABOUT.checkpoint.

    Raises:
        InputError: the weights cannot be had, or are another model's.
    """
    from transformers import BertTokenizer

    from spin_diffusion.evaluation.scorers._blip import build_blip
    from spin_diffusion.evaluation.scorers._checkpoints import load_tokenizer, open_place
    from spin_diffusion.evaluation.scorers._inputs import BertText

    files = open_place(ABOUT.place(path))
    where, tensors = files.weights("ImageReward.pt", "model.safetensors")
    blip = build_blip(tensors, where)
    tokenizer = load_tokenizer(BertTokenizer, files, ("vocab.txt",), TOKENIZER)
    if len(tokenizer) > blip.text.config.vocab_size:
        raise InputError(
            f"{where} knows {blip.text.config.vocab_size} tokens, its tokenizer has {len(tokenizer)}: "
            "they belong to different models"
        )
    return ImageReward(blip.to(device), BertText(tokenizer, MAX_TOKENS), device, files.read)


@dataclass(frozen=True, eq=False)
class ImageReward:
    """(head([CLS] of the prompt, read beside the image) - mean) / std."""

    blip: "Blip"
    text: "BertText"
    device: str
    checkpoint: dict[str, str]

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One reward per image, fp32 on the CPU."""
        from spin_diffusion.evaluation.scorers._inputs import crop_middle_round, full_precision

        side = self.blip.vision.config.image_size
        rewards = []
        with full_precision(self.device):
            for start in range(0, len(images), BATCH_SIZE):
                batch = slice(start, start + BATCH_SIZE)
                pixels = torch.stack([crop_middle_round(image, side) for image in images[batch]])
                ids, mask = self.text.ids(prompts[batch])
                rewards.append(self.blip(pixels.to(self.device), ids.to(self.device), mask.to(self.device)).cpu())
        return (torch.cat(rewards) - MEAN) / STD

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts have more than 35 tokens."""
        return self.text.truncated(prompts)
