"""PickScore v1: which image of a prompt users of Pick-a-Pic prefer. Whoever trains on Pick-a-Pic is in its domain.

`pickscore=PATH`: folder, file of weights or hub id, see `_clip`. Diffusion-DPO's code returns the bare cosine (about
0.21) and others divide by 26; here it is the authors' number.
"""

from spin_diffusion.evaluation.scorers import About, Scorer

ABOUT = About(
    title="PickScore",
    scale="exp(logit_scale) cos, about 100 cos; usually 19 to 23",
    role="in-domain",
    checkpoint="yuvalkirstain/PickScore_v1",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square (offset floored), CLIP's mean and std",
    text="CLIP's tokenizer, 77 tokens with the end token kept",
    licence="none stated for the weights; code MIT",
    citation="arXiv 2305.01569",
)
BESIDE = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",)


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is a folder, a file of weights or a hub id, default ABOUT.checkpoint."""
    from spin_diffusion.evaluation.scorers._clip import H14, ClipScorer, load_clip

    towers = load_clip(device, ABOUT.place(path), H14)
    return ClipScorer(towers, lambda cosine: towers.scale * cosine)
