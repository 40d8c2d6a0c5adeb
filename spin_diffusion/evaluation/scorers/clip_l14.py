"""CLIP score with OpenAI's ViT-L/14: whether an image shows what its prompt says.

SD 1.5 is conditioned on this very text tower (SDXL on it and another), so it is no independent judge: see clip_h14.
`clip_l14=PATH`: folder, file of weights or hub id in transformers' layout, see `_clip`. Its backbone is shared with
the scorer "aesthetics" if both name the same place.
"""

from spin_diffusion.evaluation.scorers import About, Scorer

ABOUT = About(
    title="CLIP score (ViT-L/14)",
    scale="100 max(cos, 0), 0 to 100; usually 20 to 32",
    role="alignment",
    checkpoint="openai/clip-vit-large-patch14",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square (offset floored as in transformers), "
    "CLIP's mean and std",
    text="CLIP's tokenizer as in transformers (OpenAI's own package mends quotes and HTML first), no prefix, 77 "
    "tokens, end token kept",
    licence="MIT",
    citation="arXiv 2103.00020, 2104.08718",
)
BESIDE = ("openai/clip-vit-large-patch14",)


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is a folder, a file of weights or a hub id, default ABOUT.checkpoint."""
    from spin_diffusion.evaluation.scorers._clip import L14, ClipScorer, clip_score, load_clip

    return ClipScorer(load_clip(device, ABOUT.place(path), L14), clip_score)
