"""HPS v2.1: which image people prefer, trained on HPD v2. Versions and prompts are not comparable with each other.

`hps_v2_1=PATH`: the .pt file, a folder that holds it (with the tokenizer's files, to stay offline), or a hub id; see
`_hps` for that and for the differences to the authors' package.
"""

from spin_diffusion.evaluation.scorers import About, Scorer

ABOUT = About(
    title="HPS v2.1",
    scale="cos, without a scale; usually 0.14 to 0.32; papers often multiply by 100",
    role="held-out",
    checkpoint="xswu/HPSv2",
    preprocessing="RGB, long side to 224 px (bicubic on floats, antialiased), black bars, CLIP's mean and std",
    text="encodings (by ftfy) and HTML mended, lower case; CLIP's tokenizer, 77 tokens, end token kept",
    licence="Apache-2.0",
    citation="arXiv 2306.09341",
)
PACKAGES = ("ftfy",)
BESIDE = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",)


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is the .pt file, its folder or a hub id, default ABOUT.checkpoint."""
    from spin_diffusion.evaluation.scorers._hps import load_hps

    return load_hps(device, ABOUT.place(path), "v2.1")
