"""HPS against the authors' package: token ids, pixels and scores that it computed of the same inputs.

fixtures/hpsv2.json and hpsv2.safetensors hold its numbers, written by fixtures/make_hpsv2.py. No test needs it.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.evaluation.scorers._inputs import ClipText, clean_like_open_clip, letterbox
from spin_diffusion.store.input_error import InputError
from tests import tiny
from tests.evaluation.scorers.tiny_models import (
    END,
    LIMIT,
    SIDE,
    START,
    TEXT_LAYERS,
    TEXT_WIDTH,
    VISION_LAYERS,
    VISION_WIDTH,
    VOCABULARY,
    open_clip_shapes,
    pictures,
    random_like,
    write_hps,
)

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = [
    "a red fox",
    "A RED Fox, Digital ART",
    "",
    "   ",
    "a  red\t\tfox \n\n in   snow ",
    "red " * 75,  # fits
    "red " * 76,  # one too many
    "a red fox " * 60,
    "x" * 300,
    "!!! ?? -- #hash @at ~`^ a-b/c\\d {x} [y]",
    "it's we'll they've I'm you'd won't foo_bar'S 'LL",
    "1234 56.7 8k 1990s",
    "A&amp;amp;B &lt;3 caf&eacute; &#39;x&#x27; &nbsp;y",
    "&amp;amp;amp;lt;",
    "it\u2019s a \u201cred\u201d fox\u2026 \u2014 really",
    "\ufb01ne dining",
    "caf\u00c3\u00a9",  # UTF-8 read as Latin-1
    "\uff21\uff22\uff23 wide",
    "r\u00e9sum\u00e9 \u00fc\u00f6\u00e4\u00df \u00c9COLE",
    "e\u0301 decomposed",
    "\u0130stanbul STRASSE \u1e9e",
    "\U0001f98a fox \u732b",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea thumb \U0001f44d\U0001f3fd",
    "\ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u200bzero\u200b width\ufeff",
    "\u00bd \u00b2 \u2167",
    "c\u00a0d \u3000e",
    "a\x1cb\x85c",
    "x\x00y\x07",
    "red <|endoftext|> fox",
    "<|startoftext|>red",
    "red <end_of_text> fox",
    "<script>alert('x')</script>",
    "<b>A&amp;amp;B&amp;nbsp;c</b>",  # ftfy leaves entities beside a tag alone
]
CLAIMS_AN_END = PROMPTS.index("red <end_of_text> fox")
"""The package ends a prompt at its own name of the end token. Here no prompt can: a tower read there would be told
nothing of the rest, and the prompt would not be counted as cut."""
SCORED = ["a RED  fox", "an egg &amp; blue", "re " * 90, "", "it\u2019s r\u00e9d \U0001f98a"]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image in which no pixel is like its neighbours, without a library's random numbers."""
    bands = Image.getmodebands(mode)
    y, x, band = np.indices((height, width, bands), dtype=np.uint64)
    mixed = (x * 7919 + y * 104729 + band * 1299709 + 17) * np.uint64(2654435761)
    pixels = (mixed >> np.uint64(16)).astype(np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def read_images() -> dict[str, Image.Image]:
    """Images that the package reads, by a name that says their size and mode."""
    sizes = {
        "square": (300, 300),
        "landscape": (640, 427),
        "portrait": (166, 243),
        "wide": (450, 31),
        "tall": (29, 400),
        "one_more": (225, 224),
        "small": (101, 77),
        "as_it_is": (224, 224),
        "pixel": (1, 1),
    }
    images = {name: noise(*size) for name, size in sizes.items()}
    images |= {mode: noise(130, 97, mode) for mode in ("L", "CMYK", "YCbCr")}
    images["P"] = noise(130, 97, "L").convert("P")
    images["1"] = noise(130, 97, "L").convert("1", dither=Image.Dither.NONE)
    opaque = noise(130, 97)
    opaque.putalpha(255)
    return images | {"opaque_RGBA": opaque}


def sampled(pixels: Tensor) -> Tensor:
    """Every ninth pixel of every ninth row: in noise, a shift by one pixel shows in each of them."""
    return pixels[:3, 3::9, 3::9].contiguous()


def hps_tensors() -> dict[str, Tensor]:
    """A tiny random HPS, rounded to half precision as it is published; the package's inner text width is 4 widths."""
    shapes = open_clip_shapes(
        (VISION_WIDTH, VISION_LAYERS, 96),
        (TEXT_WIDTH, TEXT_LAYERS, 4 * TEXT_WIDTH),
        SIDE,
        projection=32,
        vocabulary=VOCABULARY,
    )
    tensors = random_like(shapes, seed=3) | {"logit_scale": torch.tensor(4.5)}
    return {name: tensor.half().float() for name, tensor in tensors.items()}


def scored_images() -> list[Image.Image]:
    """As many images as there are prompts in SCORED, none of which is a square of SIDE."""
    images = pictures(2, size=(90, 60)) + pictures(1, size=(61, 100)) + pictures(1, size=(200, 33))
    return [*images, pictures(1, size=(120, 120))[0].convert("L")]


@pytest.fixture(scope="module")
def package() -> dict:
    return json.loads((FIXTURES / "hpsv2.json").read_text(encoding="utf-8"))


@pytest.fixture
def ftfy_as_it_was(package: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ftfy made of these prompts when the fixture was written, whether it is installed or not."""
    made = dict(package["mended"])
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=made.__getitem__, __version__="6.3.1"))


@pytest.fixture
def text(tmp_path: Path) -> ClipText:
    return ClipText(tiny.build_tokenizer(tmp_path, pad="!"), LIMIT, clean_like_open_clip, reads_special_tokens=False)


def up_to_the_end(ids: list[int], end: int = END) -> list[int]:
    return ids[: ids.index(end) + 1]


def test_the_fixture_is_of_these_prompts(package: dict) -> None:
    assert [prompt for prompt, _ in package["mended"]] == list(dict.fromkeys([*PROMPTS, *SCORED]))
    assert package["made_by"].startswith("hpsv2 1.2.0") and len(package["tiny"]) == len(PROMPTS)


@pytest.mark.parametrize("number", [i for i in range(len(PROMPTS)) if i != CLAIMS_AN_END])
def test_awkward_prompts_get_the_packages_token_ids(
    number: int, package: dict, ftfy_as_it_was: None, text: ClipText
) -> None:
    ids = text.ids([PROMPTS[number]])[0].tolist()
    assert ids == package["tiny"][number]
    assert ids[0] == START and ids[-1] == END and len(ids) <= LIMIT, "a long prompt keeps its end token"


def test_a_prompt_cannot_claim_its_own_end(package: dict, ftfy_as_it_was: None, text: ClipText) -> None:
    theirs, ours = package["tiny"][CLAIMS_AN_END], text.ids([PROMPTS[CLAIMS_AN_END]])[0].tolist()
    assert len(theirs) == 3 and ours[:2] == theirs[:2] and ours.count(END) == 1 and len(ours) > 10


@pytest.mark.skipif(
    importlib.util.find_spec("ftfy") is None,
    reason="ftfy is not installed; would check what it makes of awkward prompts",
)
def test_the_installed_ftfy_mends_as_it_did_for_the_package(package: dict) -> None:
    import ftfy

    assert [ftfy.fix_text(prompt) for prompt, _ in package["mended"]] == [mended for _, mended in package["mended"]]


@pytest.mark.parametrize("name", ["hps_v2_0", "hps_v2_1"])
def test_without_ftfy_hps_is_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match="pip install ftfy") as caught:
        load_scorer(f"{name}={tmp_path}", "cpu")
    assert "\n" not in str(caught.value) and "curly quotes" in str(caught.value)
    with pytest.raises(InputError, match="pip install ftfy"):
        clean_like_open_clip("plain")


def test_what_ftfy_decides_is_what_it_mends(package: dict, text: ClipText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=str))
    different = [i for i, prompt in enumerate(PROMPTS) if text.ids([prompt])[0].tolist() != package["tiny"][i]]
    mended = {prompt for prompt, made in package["mended"] if made != prompt}
    assert {PROMPTS[i] for i in different if i != CLAIMS_AN_END} < mended
    assert 5 <= len(different) <= 10, "quotes, ligatures, wide letters, wrong encodings, control characters"


@pytest.mark.parametrize("name", list(read_images()))
def test_images_become_the_packages_pixels(name: str) -> None:
    theirs = load_file(FIXTURES / "hpsv2.safetensors")
    assert list(theirs) and set(theirs) == set(read_images())
    assert (sampled(letterbox(read_images()[name], 224)) - theirs[name]).abs().max() < 1e-5


def test_one_pixel_beside_would_show() -> None:
    theirs = load_file(FIXTURES / "hpsv2.safetensors")
    for name in ("square", "landscape", "wide", "tall"):
        pixels = letterbox(read_images()[name], 224)
        assert all((sampled(pixels.roll(1, dims=axis)) - theirs[name]).abs().max() > 0.1 for axis in (1, 2))


@pytest.mark.parametrize(
    ("name", "file"), [("hps_v2_0", "HPS_v2_compressed.pt"), ("hps_v2_1", "HPS_v2.1_compressed.pt")]
)
def test_scores_of_random_weights_are_the_packages(
    name: str, file: str, package: dict, ftfy_as_it_was: None, tmp_path: Path
) -> None:
    scorer = load_scorer(f"{name}={write_hps(tmp_path, hps_tensors(), file)}", "cpu")
    theirs = torch.tensor(package["scores"])
    assert (scorer(scored_images(), SCORED) - theirs).abs().max() < 1e-6
    assert theirs.abs().max() > 0.05 and theirs.std() > 0.01
