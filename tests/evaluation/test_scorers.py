import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spin_diffusion.evaluation.scorers import About, LoadedScorer, Scorer, load_scorer
from spin_diffusion.evaluation.scorers.sharpness import sharpness
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.named import load_named

SCORERS, JUDGES = "spin_diffusion.evaluation.scorers", "spin_diffusion.evaluation.judges"


def write_scorer(folder: Path, returned: str, name: str = "mine") -> str:
    path = folder / f"{name}.py"
    path.write_text(f"import torch\ndef load(device):\n    return lambda images, prompts: {returned}\n")
    return str(path)


def pictures(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8)) for _ in range(number)]


def test_a_scorer_is_found_by_the_name_of_its_file() -> None:
    scorer = load_scorer("sharpness", "cpu")
    assert scorer.name == "sharpness" and isinstance(scorer, Scorer)
    assert scorer(pictures(3), ["a", "b", "c"]).tolist() == [0.0, 0.0, 0.0]


def test_a_scorer_is_found_by_the_path_of_its_file(tmp_path: Path) -> None:
    spec = write_scorer(tmp_path, "torch.tensor([float(len(p)) for p in prompts])")
    scorer = load_scorer(spec, "cpu")
    assert scorer.name == "mine" and scorer(pictures(2), ["a", "abc"]).tolist() == [1.0, 3.0]


def test_two_files_of_one_name_do_not_shadow_each_other_nor_a_library(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = load_scorer(write_scorer(tmp_path / "a", "torch.ones(len(images))", "torch"), "cpu")
    second = load_scorer(write_scorer(tmp_path / "b", "torch.zeros(len(images))", "torch"), "cpu")
    assert first(pictures(1), ["p"]).item() == 1 and second(pictures(1), ["p"]).item() == 0
    assert sys.modules["torch"] is torch


def test_the_device_reaches_load(tmp_path: Path) -> None:
    path = tmp_path / "where.py"
    path.write_text("def load(device):\n    raise RuntimeError('on ' + device)\n")
    with pytest.raises(InputError, match="on cuda:3"):
        load_scorer(str(path), "cuda:3")


def test_scores_come_back_as_fp32_on_the_cpu_without_gradient(tmp_path: Path) -> None:
    spec = write_scorer(tmp_path, "torch.ones(len(images), dtype=torch.bfloat16, requires_grad=True) * 2")
    scores = load_scorer(spec, "cpu")(pictures(2), ["a", "b"])
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_no_image_gives_no_score() -> None:
    assert load_scorer("sharpness", "cpu")([], []).shape == (0,)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("torch.zeros(len(images), 1)", r"scorer mine must return a tensor of shape \(2,\), got \(2, 1\).*'a red fox'"),
        ("torch.zeros(())", r"got \(\)"),
        ("torch.zeros(5)", r"got \(5,\)"),
        ("[0.0, 0.0]", "got list"),
        ("None", "got NoneType"),
        ("torch.tensor([0.0, float('nan')])", "scorer mine returned nan for the prompt 'a blue boat'"),
        ("torch.tensor([float('inf'), 0.0])", "scorer mine returned inf for the prompt 'a red fox'"),
    ],
)
def test_what_a_scorer_returns_is_checked(returned: str, message: str, tmp_path: Path) -> None:
    scorer = load_scorer(write_scorer(tmp_path, returned), "cpu")
    with pytest.raises(InputError, match=message):
        scorer(pictures(2), ["a red fox", "a blue boat"])


def test_a_long_prompt_is_shortened_in_the_error(tmp_path: Path) -> None:
    scorer = load_scorer(write_scorer(tmp_path, "torch.tensor([float('nan')])"), "cpu")
    with pytest.raises(InputError) as caught:
        scorer(pictures(1), ["word\n" * 1000])
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_as_many_prompts_as_images_are_needed() -> None:
    with pytest.raises(ValueError, match="2 images do not match 1 prompts"):
        load_scorer("sharpness", "cpu")(pictures(2), ["a"])


class Small:
    """A stand-in whose memory holds `most` images at a time; it scores the length of the prompt."""

    def __init__(self, most: int, error: RuntimeError) -> None:
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return self.features(images)[:, 0] * torch.tensor([float(len(prompt)) for prompt in prompts])

    def features(self, images: list[Image.Image]) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.error
        return torch.ones(len(images), 2)


def loaded(score: Small) -> LoadedScorer:
    return LoadedScorer("small", About("Small", "none"), score, "")


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    torch.OutOfMemoryError(),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=str)
def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does(error: RuntimeError, capsys) -> None:
    stand_in = Small(3, error)
    scorer, prompts = loaded(stand_in), ["x" * length for length in range(16)]
    assert scorer(pictures(16), prompts).tolist() == list(range(16))
    assert stand_in.sizes == [16, 8, 4, *[2] * 8]
    assert capsys.readouterr().out.count("small: the memory does not hold 16 images") == 1
    assert scorer(pictures(5), prompts[:5]).tolist() == list(range(5))
    assert scorer.features(pictures(3)).shape == (3, 2)
    assert stand_in.sizes[11:] == [2, 2, 1, 2, 1], "the batch that fits is remembered"
    assert capsys.readouterr().out == "", "it is said once"


def test_features_alone_are_halved_too() -> None:
    stand_in = Small(1, MEMORY_ERRORS[0])
    assert loaded(stand_in).features(pictures(3)).shape == (3, 2) and stand_in.sizes == [3, 1, 1, 1]


def test_no_memory_for_a_single_image_is_said_in_one_line() -> None:
    with pytest.raises(
        InputError, match="scorer small: the memory does not hold a single image .CUDA out of"
    ) as caught:
        loaded(Small(0, MEMORY_ERRORS[0]))(pictures(4), ["a"] * 4)
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    stand_in = Small(0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(InputError, match="failed: RuntimeError .*shapes cannot be multiplied"):
        loaded(stand_in)(pictures(4), ["a"] * 4)
    assert stand_in.sizes == [4]


def test_weights_that_memory_does_not_hold_are_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text(
        "import torch\ndef load(device):\n    raise torch.OutOfMemoryError('CUDA out of memory.\\n More')\n"
    )
    with pytest.raises(
        InputError, match="scorer large: the memory of cpu does not hold its weights .CUDA out of memory"
    ):
        load_scorer(str(path), "cpu")


def test_a_misspelt_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match="no 'sharpnes'.*did you mean sharpness.*It has .*sharpness") as caught:
        load_scorer("sharpnes", "cpu")
    assert "\n" not in str(caught.value)
    for name in ("zzz", "", "sharpness.sharpness", "../named", "__init__"):
        with pytest.raises(InputError, match="It has .*sharpness"):
            load_named(SCORERS, name, "load")


def test_a_missing_file_and_a_missing_load_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone.py does not exist"):
        load_scorer(str(tmp_path / "gone.py"), "cpu")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=f"empty.py must define `load`, see the docstring of {SCORERS}"):
        load_scorer(str(tmp_path / "empty.py"), "cpu")
    (tmp_path / "nothing.py").write_text("def load(device): return 3")
    with pytest.raises(InputError, match="scorer nothing: load.* must return a function, got int"):
        load_scorer(str(tmp_path / "nothing.py"), "cpu")


def test_a_file_that_fails_says_why_and_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package")
    for _ in range(2):
        with pytest.raises(InputError, match="ModuleNotFoundError at broken.py line 1.*no_such_package"):
            load_scorer(str(path), "cpu")
    write_scorer(tmp_path, "torch.zeros(len(images))", "broken")
    assert load_scorer(str(path), "cpu").name == "broken"


def test_naming_scorers_and_judges_imports_no_heavy_package() -> None:
    heavy = {"transformers", "diffusers", "open_clip"}
    code = f"import sys, {SCORERS}, {JUDGES}; assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_flat_image_has_no_sharpness_and_a_checkerboard_the_most() -> None:
    board = np.indices((8, 8)).sum(axis=0) % 2 * 255
    flat, sharp = Image.new("RGB", (8, 8), (90, 90, 90)), Image.fromarray(board.astype(np.uint8))
    scores = sharpness([flat, sharp], ["", ""])
    assert scores[0] == 0
    # 36 inner pixels differ from 4 neighbours, 24 of an edge from 3, 4 of a corner from 2; the border repeats itself.
    assert scores[1].item() == pytest.approx((36 * 4 + 24 * 3 + 4 * 2) / 64)


def test_sharpness_agrees_with_scipy_and_falls_with_blur() -> None:
    from PIL import ImageFilter
    from scipy import ndimage

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    image = Image.fromarray(pixels)
    expected = np.abs(ndimage.laplace(pixels / 255, mode="nearest")).mean()
    blurred = sharpness([image, image.filter(ImageFilter.GaussianBlur(1)), image.resize((1, 1))], [""] * 3)
    assert blurred[0].item() == pytest.approx(expected)
    assert blurred[1] < 0.5 * blurred[0] and blurred[2] == 0
