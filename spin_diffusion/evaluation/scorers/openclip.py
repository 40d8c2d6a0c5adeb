"""CLIP score with any backbone of the package open_clip.

    openclip=MODEL/PRETRAINED       PRETRAINED: a tag that open_clip lists (ViT-B-32/laion2b_s34b_b79k), or the path of
                                    a file of weights (ViT-B-32/weights/b32.safetensors, ViT-B-32//data/b32.pt)
    openclip=hf-hub:ORG/NAME        a repository of the hub in open_clip's layout
    openclip=local-dir:FOLDER       a folder in that layout: open_clip_config.json and the weights

It needs the extra "openclip", which nothing else here does: the
package pulls in torchvision, and one that does not fit the installed torch breaks transformers and diffusers.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import About, Scorer
from spin_diffusion.store.input_error import InputError

ABOUT = About(
    title="CLIP score (open_clip)",
    scale="100 max(cos, 0), 0 to 100; backbones are not comparable",
    role="alignment",
    preprocessing="the package's own, on RGB",
    text="the backbone's tokenizer and length",
    licence="the backbone's",
    citation="arXiv 2212.07143",
)
BATCH_SIZE = 32
WHOLE = ("hf-hub:", "local-dir:")
"""How a name begins that says model and weights in one."""


PACKAGES = ("open_clip_torch",)


def places(place: str | None) -> list[str]:
    """What is read: the name itself, which is a tag of the package, say, and the file or folder or repository in it."""
    name = place or ""
    inside = [name.removeprefix(kind) for kind in WHOLE if name.startswith(kind)] or [name.partition("/")[2]]
    return [name, *filter(None, inside)]


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer of a backbone.

    Args:
        path: one of the forms above.

    Raises:
        InputError: no backbone is named, the package is missing or broken, or it cannot load the backbone.
    """
    from spin_diffusion.store.input_error import one_line
    from spin_diffusion.store.run_dir import file_hash

    # Without PRETRAINED, open_clip gives random weights and a warning
    if not path or path.endswith("/") or ("/" not in path and not path.startswith(WHOLE)):
        raise InputError(
            f"openclip needs a backbone: openclip=MODEL/PRETRAINED, such as ViT-B-32/laion2b_s34b_b79k, not {path!r}"
        )
    try:
        import open_clip
    except Exception as error:  # beside a torchvision that does not fit, importing it raises almost anything
        raise InputError(
            "openclip needs the optional extra: pip install 'spin-diffusion[openclip]' "
            f"(open_clip cannot be imported: {one_line(error)})"
        ) from error
    model_name, pretrained = (path, None) if path.startswith(WHOLE) else path.split("/", 1)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model, _, transform = open_clip.create_model_and_transforms(
                model_name, pretrained=pretrained, device=device
            )
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # its loaders let through whatever hub, torch and torchvision raise
        raise InputError(f"open_clip cannot load {path}: {one_line(error)}") from error
    if mismatch := next((w for w in said if "quickgelu mismatch" in str(w.message).lower()), None):
        raise InputError(
            f"openclip={path} has another activation than its weights were trained with, and its scores would be "
            f"nobody's: name the model {model_name}-quickgelu, or without it ({one_line(mismatch.message)})"
        )
    checkpoint = {"open_clip (package)": open_clip.__version__} | {
        file.name: file_hash(file) for file in _local_files(path, pretrained)
    }
    return OpenClip(model.float().eval(), transform, tokenizer, device, checkpoint)


@dataclass(frozen=True, eq=False)
class OpenClip:
    """100 max(cos, 0) by an open_clip model."""

    model: Any
    transform: Callable[[Image.Image], Float[Tensor, "3 side side"]]
    tokenizer: Any
    device: str
    checkpoint: dict[str, str]

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One score per image, fp32 on the CPU."""
        from spin_diffusion.evaluation.scorers._inputs import full_precision

        unique = list(dict.fromkeys(prompts))
        embed = self.model.encode_text
        with full_precision(self.device):
            parts = [embed(self.tokenizer(part).to(self.device)) for part in _batches(unique)]
        texts = torch.nn.functional.normalize(torch.cat(parts).float(), dim=1).cpu()
        cosines = (self.features(images) * texts[[unique.index(prompt) for prompt in prompts]]).sum(dim=1)
        return 100 * cosines.clamp(min=0)

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        """Image embeddings of length 1, fp32 on the CPU."""
        from spin_diffusion.evaluation.scorers._inputs import full_precision, without_far_ends
        from spin_diffusion.store.pictures import to_rgb

        images = [without_far_ends(to_rgb(image)) for image in images]
        with full_precision(self.device):
            parts = [
                self.model.encode_image(torch.stack([self.transform(image) for image in part]).to(self.device))
                for part in _batches(images)
            ]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1).cpu()

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts are longer than what the backbone reads."""
        limit = self.tokenizer([""]).shape[1]
        longer = self.tokenizer([*prompts, ""], context_length=limit + 1)
        # One place more than the backbone has: filled by a longer prompt, empty (as in "") by others.
        return (longer[:-1, -1] != longer[-1, -1]).tolist()


def _local_files(path: str, pretrained: str | None) -> list[Path]:
    """What was read of this machine's own files; what the package downloads keeps its name."""
    if path.startswith("local-dir:"):
        folder = Path(path.removeprefix("local-dir:"))
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin", ".pt"))
    return [Path(pretrained)] if pretrained and Path(pretrained).is_file() else []


def _batches(items: list) -> list[list]:
    return [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
