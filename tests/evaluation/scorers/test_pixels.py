import numpy as np
import pytest
import torch
from PIL import Image

from spin_diffusion.evaluation.scorers._inputs import (
    MEAN,
    STD,
    crop_middle,
    crop_middle_floor,
    crop_middle_round,
    letterbox,
)
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import to_rgb
from tests.evaluation.scorers.tiny_models import pictures

SIZES = [(224, 224), (512, 512), (832, 1216), (1216, 832), (640, 427), (227, 224), (225, 100), (3, 7), (1, 1), (1, 9)]


def normalise(unit: torch.Tensor) -> torch.Tensor:
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def to_unit(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", ["floor", "round"])
def test_the_middle_is_pillows_to_the_bit(size: tuple[int, int], offset: str) -> None:
    image = pictures(1, size=size)[0]
    long = max(size) * 224 // min(size)
    resized = image.resize((224, long) if size[0] <= size[1] else (long, 224), Image.Resampling.BICUBIC)
    margin = long - 224
    start = margin // 2 if offset == "floor" else round(margin / 2)
    box = (0, start, 224, start + 224) if size[0] <= size[1] else (start, 0, start + 224, 224)
    assert torch.equal(crop_middle(image, 224, offset), normalise(to_unit(resized.crop(box))))


def test_the_two_dialects_differ_by_a_pixel_where_the_margin_is_odd() -> None:
    # Margins at 224 px: 832 x 1216 -> 103 (floor 51, round 52); 640 x 427 -> 111 (55, 56); 228 x 224 -> 4.
    for size, differs in (((832, 1216), True), ((640, 427), True), ((228, 224), False), ((512, 512), False)):
        image = pictures(1, size=size)[0]
        floor, rounded = crop_middle_floor(image, 224), crop_middle_round(image, 224)
        assert torch.equal(floor, rounded) != differs
        if differs:
            axis = 2 if size[0] > size[1] else 1
            assert torch.equal(floor.narrow(axis, 1, 223), rounded.narrow(axis, 0, 223))


@pytest.mark.parametrize(("width", "is_equal"), [(225, True), (227, False), (229, True), (231, False)])
def test_halves_are_rounded_to_the_even_number(width: int, is_equal: bool) -> None:
    # Margins 1, 3, 5, 7: offsets 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
    image = pictures(1, size=(width, 224))[0]
    assert torch.equal(crop_middle_floor(image, 224), crop_middle_round(image, 224)) == is_equal


@pytest.mark.parametrize("size", [(300, 300), (832, 1216), (640, 427), (224, 224)])
def test_the_middle_agrees_with_transformers_on_pillow(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = pictures(1, size=size)[0]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    assert (crop_middle_floor(image, 224) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "height", "width"), [((832, 1216), 224, 153), ((1216, 832), 153, 224), ((1, 9), 224, 25)]
)
def test_the_letterbox_has_black_bars_of_the_right_size(size: tuple[int, int], height: int, width: int) -> None:
    boxed = letterbox(Image.new("RGB", size, "white"), 224)
    assert boxed.shape == (3, 224, 224)
    black = normalise(torch.zeros(3, 1, 1))
    top, left = (224 - height) // 2, (224 - width) // 2
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal((boxed == black).all(dim=0), ~inside)
    assert torch.allclose(boxed[:, inside], normalise(torch.ones(3, 1, 1)).flatten(1), atol=1e-5)


def test_the_letterbox_resizes_floats_and_does_not_clip() -> None:
    image = pictures(1, size=(500, 500))[0]
    edges = Image.fromarray((np.indices((500, 500)).sum(axis=0) // 25 % 2 * 255).astype(np.uint8)).convert("RGB")
    for picture in (image, edges):
        expected = torch.nn.functional.interpolate(
            to_unit(picture)[None], (224, 224), mode="bicubic", align_corners=False, antialias=True
        )
        boxed = letterbox(picture, 224)
        assert torch.equal(boxed, normalise(expected[0]))
    assert expected.min() < -0.01 and expected.max() > 1.01, "a resize of bytes would have clipped"


def test_the_letterbox_itself_matters() -> None:
    wide = pictures(1, size=(832, 1216))[0]
    assert (letterbox(wide, 224) - crop_middle_floor(wide, 224)).abs().mean() > 0.3


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = pictures(1, size=(224, 224))[0]
    for transformed in (crop_middle_floor(image, 224), crop_middle_round(image, 224), letterbox(image, 224)):
        assert torch.equal(transformed, normalise(to_unit(image)))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3)])
def test_images_of_a_pixel_are_read(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    for transform in (crop_middle_floor, crop_middle_round):
        red = normalise(torch.tensor([1.0, 0, 0]).view(3, 1, 1))
        assert torch.equal(transform(image, 224), red.expand(3, 224, 224))
    assert letterbox(image, 224).shape == (3, 224, 224)
    assert letterbox(Image.new("RGB", (1, 1000)), 224).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (10, 161), (161, 10)])
def test_of_a_long_strip_the_middle_is_enough(size: tuple[int, int]) -> None:
    """Resized as a whole, the first would be 224 x 14,560,000 px."""
    ramp = np.linspace(0, 255, max(size))[None].repeat(min(size), axis=0).astype(np.uint8)
    image = Image.fromarray(ramp if size[0] > size[1] else np.ascontiguousarray(ramp.T)).convert("RGB")
    for transform in (crop_middle_floor, crop_middle_round):
        square = transform(image, 224)
        middle = normalise(torch.full((3, 1, 1), 0.5)).expand(3, 224, 224)
        assert square.shape == (3, 224, 224) and (square - middle).abs().max() < 0.2


def colour_of(image: Image.Image) -> tuple[int, int, int]:
    return to_rgb(image).getpixel((0, 0))


def test_every_mode_shows_what_a_viewer_shows() -> None:
    orange = (255, 128, 0)
    palette = Image.new("RGB", (4, 4), orange).quantize(4)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes([0] * 256)
    grey16 = np.full((4, 4), 128 * 257)
    assert colour_of(Image.new("RGB", (4, 4), orange)) == orange
    assert colour_of(palette) == orange
    assert colour_of(see_through) == (255, 255, 255)
    assert colour_of(Image.new("RGBA", (4, 4), (*orange, 255))) == orange
    assert colour_of(Image.new("RGBA", (4, 4), (*orange, 0))) == (255, 255, 255)
    assert colour_of(Image.new("RGBA", (4, 4), (0, 0, 0, 128))) == (127, 127, 127)
    assert colour_of(Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert("RGBa")) == (127, 127, 127)
    assert colour_of(Image.new("LA", (4, 4), (77, 255))) == (77, 77, 77)
    assert colour_of(Image.new("LA", (4, 4), (77, 0))) == (255, 255, 255)
    assert colour_of(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert colour_of(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert colour_of(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == (255, 0, 0)
    assert colour_of(Image.new("YCbCr", (4, 4), (255, 128, 128))) == (255, 255, 255)
    assert colour_of(Image.new("HSV", (4, 4), (0, 255, 255))) == (255, 0, 0)
    assert colour_of(Image.fromarray(grey16.astype(np.uint16))) == (128, 128, 128)
    assert colour_of(Image.fromarray(grey16.astype(np.int32))) == (128, 128, 128)
    assert Image.fromarray(grey16.astype(np.uint16)).convert("RGB").getpixel((0, 0)) == (255, 255, 255), "Pillow clips"
    keyed = Image.new("RGB", (4, 4), orange)
    keyed.info["transparency"] = orange
    assert colour_of(keyed) == (255, 255, 255)


def test_big_endian_16_bit_images_are_read() -> None:
    big = Image.frombytes("I;16B", (2, 2), np.full((2, 2), 200 * 257, dtype=">u2").tobytes())
    assert colour_of(big) == (200, 200, 200)


def test_a_mode_without_a_white_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="an image of 32-bit floats has no defined white") as caught:
        to_rgb(Image.new("F", (4, 4), 0.5))
    assert "\n" not in str(caught.value)


def test_an_image_is_turned_upright() -> None:
    image = pictures(1, size=(30, 20))[0]
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    assert to_rgb(turned).size == (20, 30)
    assert np.array_equal(np.array(to_rgb(turned)), np.array(image.transpose(Image.Transpose.ROTATE_270)))


def test_opaque_images_are_not_changed() -> None:
    image = pictures(1)[0]
    opaque = image.copy()
    opaque.putalpha(255)
    assert np.array_equal(np.array(to_rgb(opaque)), np.array(image))
    assert np.array_equal(np.array(to_rgb(image)), np.array(image))
