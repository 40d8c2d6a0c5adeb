"""CLIP score with LAION's ViT-H/14: whether an image shows what its prompt says, by a model that drew no part of it.

`clip_h14=PATH`: folder, file of weights (transformers' or open_clip's layout) or hub id, see `_clip`.
"""

from spin_diffusion.evaluation.scorers import About, Scorer

ABOUT = About(
    title="CLIP score (ViT-H/14)",
    scale="100 max(cos, 0), 0 to 100; usually 25 to 40, not comparable with ViT-L/14",
    role="alignment",
    checkpoint="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square (offset floored as in transformers), "
    "CLIP's mean and std",
    text="CLIP's tokenizer as in transformers (open_clip's own mends quotes and HTML first), no prefix, 77 "
    "tokens, end token kept",
    licence="MIT",
    citation="arXiv 2212.07143, 2104.08718",
)
BESIDE = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",)


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is a folder, a file of weights or a hub id, default ABOUT.checkpoint."""
    from spin_diffusion.evaluation.scorers._clip import H14, ClipScorer, clip_score, load_clip

    return ClipScorer(load_clip(device, ABOUT.place(path), H14), clip_score)
