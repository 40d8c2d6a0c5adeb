import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spin_diffusion.evaluation.gallery import draw_gallery, log_pictures

RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def area(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of one colour."""
    y, x = np.nonzero((sheet == colour).all(axis=2))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_columns_go_right_and_rows_go_down(tmp_path: Path) -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 0, 255)]]
    rows = [(f"prompt {i}", [flat(colour) for colour in row]) for i, row in enumerate(colours)]
    draw_gallery(["base", "round 1"], rows, tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    places = [[area(sheet, colour) for colour in row] for row in colours]
    assert places[0][0][0] == places[1][0][0] < places[0][1][0] == places[1][1][0]
    assert places[0][0][1] == places[0][1][1] < places[1][0][1] == places[1][1][1]
    assert (sheet[:, : places[0][0][0]] < 128).any(), "the captions are left of the images"
    assert (sheet[: places[0][0][1], places[0][0][0] :] < 128).any(), "the headings are above the images"


def test_tiny_images_are_enlarged_without_blur(tmp_path: Path) -> None:
    image = flat(RED, (8, 8))
    image.paste(BLUE, (4, 0, 8, 8))
    draw_gallery(["base"], [("p", [image])], tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    red, blue = area(sheet, RED), area(sheet, BLUE)
    assert red[2] == blue[0] and blue[2] - red[0] >= 128 and red[3] - red[1] == blue[2] - red[0]
    assert (sheet[red[1] : red[3], red[0] : red[2]] == RED).all()


def test_large_images_are_reduced_and_keep_their_proportions(tmp_path: Path) -> None:
    draw_gallery(["base"], [("p", [flat(RED, (2048, 1024))])], tmp_path / "sheet.png")
    left, top, right, bottom = area(read(tmp_path / "sheet.png"), RED)
    assert (right - left, bottom - top) == (512, 256)


def test_many_rows_get_smaller_cells(tmp_path: Path) -> None:
    image = flat(RED, (512, 512))
    draw_gallery(["base"], [("p", [image])] * 400, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width * sheet.height < Image.MAX_IMAGE_PIXELS, "Pillow warns about larger files"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   \n\t ",
        "costs $5, $x^2$ and $\\frac{",
        "a very long prompt, " * 500,
        "W" * 10_000,
        "ein B\u00e4r \u72d0 \U0001f98a \u202eleft\u202c",
        "null \x00 escape \x1b[31m surrogate \ud800",
        "x" * 5_000_000,
    ],
)
def test_any_prompt_can_be_a_caption_and_stays_left_of_the_images(prompt: str, tmp_path: Path) -> None:
    draw_gallery(["base"], [(prompt, [flat(RED)])], tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    left, top, right, bottom = area(sheet, RED)
    assert (bottom - top, right - left) == (160, 160)
    assert (sheet[top:bottom, left:right] == RED).all(), "the caption must not be drawn over the image"
    assert (sheet[:top, :left] == 255).all() and (sheet[bottom:] == 255).all()
    assert (sheet[top:bottom, :left] < 200).any()


def test_images_of_other_modes_and_mixed_sizes_are_drawn(tmp_path: Path) -> None:
    images = [flat(RED, (32, 32), "P"), flat(BLUE, (48, 24), "RGBA"), Image.new("L", (16, 64), 77)]
    draw_gallery(["a", "b", "c"], [("p", images)], tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    assert area(sheet, RED) and area(sheet, BLUE) and area(sheet, (77, 77, 77))


def test_the_file_appears_whole_and_replaces_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "sheet.png"
    draw_gallery(["base"], [("p", [flat(RED)])], path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Image.Image, "save", fail)
        draw_gallery(["base"], [("p", [flat(BLUE)])], path)
    assert path.read_bytes() == before
    draw_gallery(["base"], [("p", [flat(BLUE)])], path)
    assert path.read_bytes() != before and list(path.parent.iterdir()) == [path]


def test_a_sheet_without_images_or_with_too_few_is_refused(tmp_path: Path) -> None:
    for columns, rows in (([], []), (["base"], []), ([], [("p", [])])):
        with pytest.raises(ValueError, match="columns and rows"):
            draw_gallery(columns, rows, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="1 images do not match 2 columns, prompt 'p'"):
        draw_gallery(["a", "b"], [("p", [flat(RED)])], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_pictures_reach_a_tracker_with_their_prompts_and_the_step(name, monkeypatch):
    told: list[dict[str, object]] = []
    library = SimpleNamespace(Image=lambda picture, caption: f"{caption}, {picture.width} px")
    monkeypatch.setitem(sys.modules, name, library)
    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name=name, log=told.append)])
    pictures = [("a fox", Image.new("RGB", (8, 8))), ("a boat", Image.new("RGB", (16, 8)))]
    log_pictures("spin/round-1/previews", pictures, 50, accelerator, axis="spin/round-1")
    shown = ["a fox, 8 px", "a boat, 16 px"]
    if name == "wandb":
        assert told == [{"spin/round-1/previews": shown, "spin/round-1/step": 50}]
    else:
        assert told == [{"spin/round-1/previews/1": shown[0], "spin/round-1/previews/2": shown[1]}]
