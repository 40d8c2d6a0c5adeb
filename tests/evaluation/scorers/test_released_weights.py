"""Numbers of the released checkpoints: `SPIN_WEIGHTS=FOLDER pytest -m weights -rs tests/evaluation/scorers`.

FOLDER has one folder per scorer, whatever `NAME=PATH` accepts there (weights and tokenizer files):

    imagereward/   ImageReward.pt, vocab.txt, and images/1.webp to 4.webp of the authors' README
    aesthetics/    sac+logos+ava1-l14-linearMSE.pth (for two tests, with OpenAI's ViT-L/14 beside it)
    pickscore/     yuvalkirstain/PickScore_v1
    hps_v2_1/      HPS_v2.1_compressed.pt, CLIP's vocab.json and merges.txt, and of SDXL base 0.9, as the authors
                   publish them, benchmark/STYLE/00000.jpg to 00799.jpg and benchmark/STYLE.json (a list of 800 prompts)

Without these every test is skipped and says which numbers it would check.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._checkpoints import read_tensors
from spin_diffusion.evaluation.scorers._inputs import ClipText, clean_like_open_clip
from spin_diffusion.evaluation.scorers._linear_head import build_head
from tests.evaluation.scorers.test_hps_package import CLAIMS_AN_END, FIXTURES, PROMPTS

pytestmark = pytest.mark.weights
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
REWARDS = (0.58116, 0.27453, -1.41318, -2.02957)
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
STYLES = {"anime": 31.03, "concept-art": 29.42, "paintings": 28.83, "photo": 25.56}


def released(name: str, checks: str, *needed: str) -> Path:
    """The scorer's folder, or skip and say what would have been checked."""
    root = os.environ.get("SPIN_WEIGHTS")
    if not root:
        pytest.skip(f"SPIN_WEIGHTS is not set; would check {checks}")
    folder = Path(root) / name
    missing = [file for file in needed if not (folder / file).exists()]
    if missing:
        pytest.skip(f"{folder} has no {', '.join(missing)}; would check {checks}")
    print(f"checking {checks}")
    return folder


def test_imagereward_gives_the_published_rewards() -> None:
    files = [f"images/{i}.webp" for i in range(1, 5)]
    checks = f"ImageReward of its README's four images: {', '.join(map(str, REWARDS))} (to 0.01)"
    folder = released("imagereward", checks, "ImageReward.pt", *files)
    images = [Image.open(folder / file) for file in files]
    rewards = load_scorer(f"imagereward={folder}", "cpu")(images, [OCEAN] * 4)
    assert rewards.tolist() == pytest.approx(REWARDS, abs=0.01)


def test_the_aesthetic_head_has_its_anchors() -> None:
    anchors = "5.236645845 at 0, 4.883284860 at ones, 4.545052 at e_0, 5.867869361 at sin, weight norm 17.99562478"
    folder = released("aesthetics", f"the head's SHA-256 and its values {anchors}", HEAD)
    assert hashlib.sha256((folder / HEAD).read_bytes()).hexdigest() == HEAD_SHA256
    head = build_head(read_tensors(folder / HEAD), HEAD)
    inputs = torch.stack([torch.zeros(768), torch.ones(768), torch.eye(768)[0], torch.arange(768.0).sin()])
    found = head(torch.nn.functional.normalize(inputs, dim=1)).tolist()
    assert found == pytest.approx([5.236645845, 4.883284860, 4.545052, 5.867869361], abs=1e-5)
    norm = (head(torch.eye(768)) - head(torch.zeros(1, 768))).norm().item()
    assert norm == pytest.approx(17.99562478, abs=1e-3)


def test_aesthetics_and_clip_score_are_in_their_usual_range() -> None:
    folder = released("aesthetics", "aesthetics of a grey image between 1 and 10", HEAD, "model.safetensors")
    grey = Image.new("RGB", (512, 512), "grey")
    assert 1 < load_scorer(f"aesthetics={folder}", "cpu")([grey], [""]).item() < 10
    assert 5 < load_scorer(f"clip_l14={folder}", "cpu")([grey], ["a grey square"]).item() < 45


def test_pickscore_has_its_scale() -> None:
    folder = released("pickscore", "PickScore's exp(logit_scale), about 100", "model.safetensors")
    assert load_scorer(f"pickscore={folder}", "cpu").score.towers.scale.item() == pytest.approx(100, rel=0.02)


def test_hps_reads_awkward_prompts_as_the_package_does(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = f"token ids of {len(PROMPTS)} awkward prompts against the package hpsv2 with CLIP's whole vocabulary"
    folder = released("hps_v2_1", checks, "vocab.json", "merges.txt")
    made = json.loads((FIXTURES / "hpsv2.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(
        sys.modules, "ftfy", SimpleNamespace(fix_text=dict(made["mended"]).__getitem__, __version__="6.3.1")
    )
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = ClipText(tokenizer, 77, clean_like_open_clip, reads_special_tokens=False)
    found = [text.ids([prompt])[0].tolist() for prompt in PROMPTS]
    assert [i for i, ids in enumerate(made["whole"]) if found[i] != ids] == [CLAIMS_AN_END]


def test_hps_gives_the_reproduced_benchmark_means() -> None:
    checks = f"mean HPS v2.1 x 100 of SDXL base 0.9: {STYLES}, overall 28.71 (to 0.05)"
    needed = [f"benchmark/{style}.json" for style in STYLES]
    folder = released("hps_v2_1", checks, "HPS_v2.1_compressed.pt", *needed)
    scorer = load_scorer(f"hps_v2_1={folder}", "cuda" if torch.cuda.is_available() else "cpu")
    means = {}
    for style in STYLES:
        prompts = json.loads((folder / "benchmark" / f"{style}.json").read_text(encoding="utf-8"))
        files = sorted((folder / "benchmark" / style).iterdir())
        scores = [scorer([Image.open(file)], [prompt]) for file, prompt in zip(files, prompts, strict=True)]
        means[style] = 100 * torch.cat(scores).mean().item()
    assert means == pytest.approx(STYLES, abs=0.05)
    assert sum(means.values()) / len(means) == pytest.approx(28.71, abs=0.05)
