"""The one reader of pictures: what a file shows, whatever it is called and whatever stands beside its pixels."""

import ast
import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import spin_diffusion
from spin_diffusion.store import pictures
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture, read_picture, to_rgb

PACKAGE = Path(spin_diffusion.__file__).parent
WHITE = (255, 255, 255)
TURNED = {
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.transpose(1, 0, 2),
    6: lambda rows: rows[::-1].transpose(1, 0, 2),
    7: lambda rows: rows[::-1, ::-1].transpose(1, 0, 2),
    8: lambda rows: rows[:, ::-1].transpose(1, 0, 2),
}
"""EXIF's orientation -> the rows of pixels as they are shown (EXIF 2.32, table 6)."""


def encoded(image: Image.Image, format: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def coloured(height: int = 32, width: int = 48) -> np.ndarray:
    """Blocks of 8 x 8 px, each of a colour of its own."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def exif(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """EXIF data with these entries: tag, type, count, value of at most 4 bytes."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return head + body + bytes(4)


def orientation(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(f"{order}H", value)


def png(depth: int, colour_type: int, row: bytes, width: int, height: int, transparent: bytes = b"") -> bytes:
    """A PNG of equal rows, by hand: Pillow does not write every depth."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    header += chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * min(height, 64)))
        + chunk(b"IEND", b"")
    )


def shown(data: bytes) -> tuple[int, int, int]:
    return open_picture(data).getpixel((0, 0))


# What is read


def test_encoded_pictures_are_opened_in_one_place_alone():
    for path in PACKAGE.rglob("*.py"):
        code = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(code) if isinstance(node, ast.Call)}
        opens = {name for name in called if name in ("Image.open", "PIL.Image.open", "Image.frombytes")}
        opens |= {name for name in called if name.endswith(("exif_transpose", "ImageFile.Parser"))}
        assert not opens or path == PACKAGE / "store" / "pictures.py", (path, opens)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_a_picture_of_each_format_comes_back_as_rgb_without_anything_else(format, tmp_path):
    rows = coloured()[:, :, :1].repeat(3, axis=2)  # of greys a GIF keeps all
    data = encoded(Image.fromarray(rows), format, **({"lossless": True} if format == "WEBP" else {"quality": 100}))
    (tmp_path / "called.txt").write_bytes(data)
    for picture in (open_picture(data), read_picture(tmp_path / "called.txt")):
        assert picture.mode == "RGB" and picture.info == {} and to_rgb(picture) is picture
        assert np.abs(np.asarray(picture).astype(int) - rows).max() <= (2 if format == "JPEG" else 0)


@pytest.mark.parametrize("format", ["EPS", "PPM", "ICO", "TGA", "PCX", "PDF", "DIB"])
def test_other_formats_are_refused_whatever_they_are_called(format, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.new("RGB", (16, 16)), format))
    with pytest.raises(InputError, match="^not a PNG, JPEG, WebP, GIF, BMP or TIFF picture$"):
        read_picture(tmp_path / "photo.jpg")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    red, _, blue = shown(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    assert red > 250 and blue < 5


# Upright


@pytest.mark.parametrize("value", TURNED)
@pytest.mark.parametrize(
    ("format", "settings"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {})],
)
def test_a_picture_is_turned_as_its_orientation_says(format, settings, value):
    tags = Image.Exif()
    tags[0x0112] = value
    if format == "JPEG":
        settings = {"quality": 100, "subsampling": 0}
    picture = np.asarray(open_picture(encoded(Image.fromarray(coloured()), format, exif=tags.tobytes(), **settings)))
    right = TURNED[value](coloured()).astype(int)
    assert picture.shape == right.shape and np.abs(picture - right).max() <= (6 if format == "JPEG" else 0)


@pytest.mark.parametrize(
    "data",
    [
        exif([orientation(6), (0x0103, 2, 4, b"abc\0")]),  # a text where a number should be
        exif([orientation(6), (0x011A, 5, 0, b""), (0x011B, 3, 0, b""), (0x0128, 7, 9, b"\xff" * 4)]),
        exif([(0x8769, 4, 1, b"\xff\xff\xff\x7f"), orientation(6)]),  # a directory beyond the end
        exif([orientation(6)]) + b"\xff" * 1000,
        exif([orientation(6, ">")], ">"),
        exif([(0x0112, 4, 1, struct.pack("<I", 6))]),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_other_tags_may_hold_anything(format, data):
    picture = open_picture(encoded(Image.fromarray(coloured(32, 48)), format, exif=data))
    assert picture.size == (32, 48)


@pytest.mark.parametrize(
    "data",
    [
        exif([orientation(0)]),
        exif([orientation(9)]),
        exif([(0x0112, 2, 4, b"six\0")]),
        exif([orientation(6)])[:20],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0",
        b"Exif\0\0what is this",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_unreadable_exif_data_is_upright(format, data):
    assert open_picture(encoded(Image.fromarray(coloured(32, 48)), format, exif=data)).size == (48, 32)


def test_text_and_profiles_of_any_size_make_no_picture_unreadable():
    """Pillow reads a compressed text of at most a megabyte, and a chunk whose sum is right alone."""
    whole = encoded(Image.fromarray(coloured()), "PNG")
    for name, content in (
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(2_000_000))),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<a tiff:Orientation="6"/>'),
        (b"gAMA", b"?"),
    ):
        chunk = struct.pack(">I", len(content)) + name + content + bytes(4)  # a wrong sum
        assert np.array_equal(np.asarray(open_picture(whole[:33] + chunk + whole[33:])), coloured())


def test_no_exif_data_make_a_whole_jpeg_unreadable():
    random = np.random.default_rng(0)
    whole = exif([orientation(6), (0x011A, 5, 1, bytes(4)), (0x0103, 2, 4, b"abc\0"), (0x8769, 4, 1, bytes(4))])
    for _ in range(300):
        data = bytearray(whole)
        for place in random.integers(6, len(data), 4):
            data[place] = random.integers(0, 256)
        assert sorted(open_picture(encoded(Image.new("RGB", (16, 8)), "JPEG", exif=bytes(data))).size) == [8, 16]


# On white, 8 bits


def test_grey_of_16_bits_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for format, settings in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        picture = open_picture(encoded(Image.fromarray(ramp), format, **settings))
        assert [picture.getpixel(place) for place in ((0, 0), (8, 32), (63, 63))] == [(0,) * 3, (128,) * 3, WHITE]
        assert np.array_equal(np.asarray(picture)[:, :, 0], (ramp / 257).round())


def test_a_grey_tiff_without_a_known_white_is_refused():
    for values in (np.int32(70000), np.int16(7), np.float32(0.5), np.float32("nan")):
        image = Image.fromarray(np.full((8, 8), values, np.asarray(values).dtype))
        with pytest.raises(InputError, match="no defined white|not finite"):
            open_picture(encoded(image, "TIFF"))


@pytest.mark.parametrize(
    ("depth", "colour_type", "hidden", "visible", "transparent", "right"),
    [
        (1, 0, b"\xff\xff", b"\0\0", b"\0\1", (0, 0, 0)),
        (2, 0, b"\x55" * 4, b"\xaa" * 4, b"\0\1", (170, 170, 170)),
        (4, 0, b"\x55" * 8, b"\xaa" * 8, b"\0\5", (170, 170, 170)),
        (8, 0, b"\x05" * 16, b"\xaa" * 16, b"\0\5", (170, 170, 170)),
        (16, 0, b"\1\2" * 16, b"\x80\x80" * 16, b"\1\2", (128, 128, 128)),
        (8, 2, b"\xff\0\xff" * 16, b"\x0a\xc8\x1e" * 16, b"\0\xff\0\0\0\xff", (10, 200, 30)),
        (16, 2, b"\x80\1\x12\x34\0\0" * 16, b"\x0a\0\xc8\0\x1e\0" * 16, b"\x80\1\x12\x34\0\0", (10, 200, 30)),
    ],
)
def test_the_transparent_colour_of_a_png_becomes_white_and_no_other(
    depth, colour_type, hidden, visible, transparent, right
):
    assert shown(png(depth, colour_type, hidden, 16, 16, transparent)) == WHITE
    assert shown(png(depth, colour_type, visible, 16, 16, transparent)) == right
    assert shown(png(depth, colour_type, hidden, 16, 16)) != WHITE or depth == 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_lies_on_white(format):
    settings = {"lossless": True} if format == "WEBP" else {}
    for alpha, right in ((0, WHITE), (128, (127, 127, 127)), (255, (0, 0, 0))):
        assert shown(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, alpha)), format, **settings)) == right
        if format != "WEBP":
            assert shown(encoded(Image.new("LA", (8, 8), (0, alpha)), format)) == right


def test_a_transparent_place_of_a_palette_lies_on_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    for format, transparency in (("PNG", 1), ("PNG", bytes([255, 0])), ("GIF", 1)):
        assert shown(encoded(palette, format, transparency=transparency)) == WHITE
    assert shown(encoded(palette, "PNG", transparency=bytes([255, 128]))) == (227, 132, 132)
    assert shown(encoded(palette, "PNG", transparency=0)) == (200, 10, 10)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(format):
    red, green, blue = shown(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format))
    assert red > 250 and green < 5 and blue < 5


def test_a_picture_that_is_open_already_is_read_in_the_same_way():
    tags = Image.Exif()
    tags[0x0112] = 6
    files = [
        encoded(Image.fromarray(coloured()), "JPEG", exif=tags.tobytes()),
        encoded(Image.fromarray(coloured()), "TIFF", exif=tags.tobytes()),
        encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "PNG"),
        encoded(Image.new("RGB", (8, 8), "red"), "PNG", transparency=(255, 0, 0)),
        encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 77)), "PNG"),
    ]
    for data in files:
        assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(data)))), np.asarray(open_picture(data)))
    whole = Image.new("RGB", (8, 8))
    assert to_rgb(whole) is whole


# What is refused before it is decoded


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1), (1, 65_536)])
def test_too_many_pixels_are_refused_by_the_header(width, height, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=f"^{width} x {height} px, at most 100,000,000 pixels"):
        open_picture(png(8, 2, b"", width, height))


def test_the_limit_on_pixels_is_not_another_librarys(monkeypatch):
    for limit in (None, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert shown(encoded(Image.new("RGB", (8, 8)), "PNG")) == (0, 0, 0) and limit == Image.MAX_IMAGE_PIXELS


def test_a_tile_of_a_tiff_counts_as_what_it_is_decoded_to():
    tags = [(256, 64), (257, 64), (258, 8), (259, 5), (262, 1), (277, 1), (322, 30_000), (323, 30_000), (324, 200)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, 50)])
    with pytest.raises(InputError, match="^30000 x 30000 px, at most"):
        open_picture(struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1) + entries + bytes(400))


def test_a_jpeg_of_countless_segments_is_not_walked_through():
    with pytest.raises(InputError, match="more than 10,000 segments"):
        open_picture(b"\xff\xd8" + b"\xff\xe1\0\2" * 1_000_000)


def test_too_many_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 50)
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    with pytest.raises(InputError, match="at most 50 are read"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="at most 50 are read"):
        open_picture((tmp_path / "a.png").read_bytes())


def test_a_png_whose_end_was_never_written_is_not_read_as_black():
    data = encoded(Image.fromarray(coloured(64, 80)), "PNG")
    with pytest.raises(InputError, match="damaged: the checksum of its IDAT chunk is wrong"):
        open_picture(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    # what follows the picture is not looked at
    assert np.array_equal(open_picture(data + bytes(4) + b"JUNK" + bytes(8)), coloured(64, 80))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_is_told_in_one_line_that_can_be_printed(format, monkeypatch):
    """Not a picture of another library's patience, and never another error than InputError."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data, random = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), format), np.random.default_rng(0)
    with pytest.raises(InputError) as caught:
        open_picture(data[: len(data) // 2])
    assert str(caught.value).isprintable()
    for _ in range(200):
        broken = bytearray(data)
        for place in random.integers(0, min(len(data), 300), 3):
            broken[place] = random.integers(0, 256)
        try:
            open_picture(bytes(broken))
        except InputError as error:
            assert str(error).isprintable()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_read_by_our_rules_and_the_last_puts_back_another_librarys(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    filters, seen = list(warnings.filters), []
    whole = encoded(Image.fromarray(coloured(64, 80)), "JPEG")
    inside, on_white = threading.Barrier(2, timeout=30), pictures._on_white

    def at_once(image):
        inside.wait()  # both are at it
        seen.append((ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS))
        return on_white(image)

    monkeypatch.setattr(pictures, "_on_white", at_once)
    with ThreadPoolExecutor(2) as threads:
        read = list(threads.map(open_picture, [whole] * 4))
    assert {picture.size for picture in read} == {(80, 64)} and seen == [(False, None)] * 4
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 5)
    assert list(warnings.filters) == filters
