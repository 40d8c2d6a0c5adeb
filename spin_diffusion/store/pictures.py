"""The one reader of pictures: what is trained on, scored, measured and shown is read here and nowhere else.

What a file is, its bytes say, not its name: the first frame of a PNG, JPEG, WebP, GIF, BMP or TIFF. Nothing else is
ever opened (Pillow would start Ghostscript for a PostScript file). A picture comes back as a viewer shows it:

    upright         turned as EXIF's orientation says, which is read alone: other tags may hold anything
    on white        where it is transparent: alpha, palette, or the one colour that a PNG or GIF names
    8 bits          16-bit grey is divided by 257; of 16-bit colour the upper byte is taken
    RGB             as Pillow converts it; colour profiles (ICC) are not applied
"""

import io
import struct
import threading
import warnings
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, printable, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
"""300 MB once it is decoded."""
MAX_SIDE_PX = 65_535
MAX_SEGMENTS = 10_000
"""Most segments of a JPEG before its pixels; whole ones have a few hundred at most."""
ORIENTATION = 0x0112
"""EXIF's and TIFF's tag: 1 is upright, 2 to 8 are turned or mirrored."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _OurRules:
    """Within it, what another library of the process set does not decide what is read: patience with files that are cut
    short, another number of pixels, warnings that are errors. The first of several threads sets it aside, and the last
    one puts it back."""

    def __init__(self) -> None:
        self.lock, self.threads, self.set_aside = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.threads == 0:
                for of, name, value in ((ImageFile, "LOAD_TRUNCATED_IMAGES", False), (Image, "MAX_IMAGE_PIXELS", None)):
                    self.set_aside.callback(setattr, of, name, getattr(of, name))
                    setattr(of, name, value)
                self.set_aside.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.threads += 1

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.set_aside.close()


_OUR_RULES = _OurRules()


def read_picture(path: Path | str) -> Image.Image:
    """`open_picture` of a file. Raises InputError, also for what `open_regular` refuses."""
    return open_picture(read_bytes(path, MAX_PICTURE_BYTES))


def open_picture(data: bytes) -> Image.Image:
    """The picture in these bytes: RGB, upright, on white, wholly decoded, without metadata.

    Raises:
        InputError: another format, cut short or damaged, beyond MAX_PICTURE_BYTES, MAX_PIXELS or MAX_SIDE_PX (which its
            header says, before anything is decoded), or without a known white, as `to_rgb`.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise InputError(f"{len(data):,} bytes, at most {MAX_PICTURE_BYTES:,} are read: make it smaller")
    data, exif = _without_metadata(data)
    try:
        with _OUR_RULES, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            if isinstance(image, TiffImageFile):
                _prepare_tiff(image)
                _check_size(image.tag_v2.get(322, 1), image.tag_v2.get(323, 1))  # of a tile, which is decoded whole
            image.load()
            if image.format == "PNG":
                _scale_transparent_colour(image, bit_depth=data[24])
            rgb = _on_white(image)
            orientation = _orientation(exif or image.info.get("exif", b""))
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError("not a PNG, JPEG, WebP, GIF, BMP or TIFF picture") from error
    except Exception as error:  # decoders of damaged bytes raise almost anything: struct.error, SyntaxError, zlib.error
        raise InputError(printable(" ".join(str(error).split()) or type(error).__name__)) from error
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    rgb.info = {}
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture that was opened elsewhere or made in memory, as `open_picture` returns it; itself if it is that.

    Raises:
        InputError: its mode has no known white (32-bit numbers), or Pillow cannot convert it.
    """
    image.load()  # a PNG may have its EXIF data at the end
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises whatever damaged EXIF data lead to
        orientation = 1
    rgb = _on_white(image)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        raise InputError(
            f"{width} x {height} px, at most {MAX_PIXELS:,} pixels and {MAX_SIDE_PX:,} px a side are read: make it "
            "smaller"
        )


def _prepare_tiff(image: TiffImageFile) -> None:
    """Pillow turns a TIFF itself while it is loaded, by all of its EXIF and XMP data: leave it the orientation alone.

    Raises InputError where Pillow would not know what white is: it hands on grey of 9 to 32 bits as it is stored.
    """
    orientation = image.tag_v2.get(ORIENTATION)
    orientation = int(orientation) if orientation in _TURNS else 1
    image.info["exif"] = struct.pack("<6s2sHIHHHIHHI", b"Exif", b"II", 42, 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)
    for key in ("XML:com.adobe.xmp", "xmp"):
        image.info.pop(key, None)
    unsigned_16_bits = (image.tag_v2.get(258), image.tag_v2.get(262), image.tag_v2.get(339, (1,))) == ((16,), 1, (1,))
    if image.mode == "I" or image.mode.startswith("I;16") and not unsigned_16_bits:
        raise InputError("a grey TIFF of other than 1 to 8 or 16 unsigned bits has no defined white: save it with 8")


def _scale_transparent_colour(image: Image.Image, bit_depth: int) -> None:
    """Pillow scales a PNG's pixels to 8 bits a channel, but not the colour that it names as transparent."""
    colour = image.info.get("transparency")
    if image.mode == "1" and isinstance(colour, int):
        image.info["transparency"] = 255 if colour else 0
    elif image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and bit_depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB on white, not turned; itself if it is that already."""
    colour = image.info.get("transparency")
    if image.mode == "RGB" and colour is None:
        return image
    if image.mode == "F":
        fault = "has no defined white" if np.isfinite(np.asarray(image)).all() else "is not finite"
        raise InputError(f"an image of 32-bit floats {fault}: save it with 8 or 16 bits per channel")
    hidden = None
    if isinstance(colour, (int, tuple)) and image.mode in ("1", "L", "RGB", "I", "I;16", "I;16B", "I;16L"):
        straight = image.convert("L") if image.mode == "1" else image
        hidden = np.asarray(straight) == np.asarray(colour)
        hidden = hidden.all(axis=2) if hidden.ndim == 3 else hidden
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip at 255: all but the darkest 1/256 would be white. "I" is what 16-bit PNGs used to open as.
        grey = np.asarray(image)
        if image.mode == "I" and not 0 <= grey.min() <= grey.max() <= 65535:
            raise InputError("an image of 32-bit integers has no defined white: save it with 8 or 16 bits per channel")
        image = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif hidden is None and image.has_transparency_data:
        # Whatever colour lies under full transparency would otherwise show
        canvas = Image.new("RGBA", image.size, "white")
        straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGBA"))
        canvas.alpha_composite(straight.convert("RGBA"))
        image = canvas
    try:
        rgb = image.convert("RGB")
    except ValueError as error:
        raise InputError(f"an image of mode {image.mode} cannot be converted to RGB: {error}") from error
    if hidden is not None and hidden.any():
        rgb.paste("white", mask=Image.fromarray(hidden))
    return rgb


def _without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG or PNG without what Pillow interprets when it opens it beside the pixels, and its EXIF data; others as
    they are."""
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data)
    return data, b""


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, place = [data[:2]], b"", 2
    for _ in range(MAX_SEGMENTS):
        if place + 4 > len(data) or data[place] != 0xFF:
            break
        name = data[place + 1]
        if name == 0xFF:  # one byte more of the mark
            place += 1
            continue
        if name < 0xC0 or 0xD0 <= name <= 0xDA:  # the first scan, or what has no length
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        content = data[place + 4 : end]
        if name == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        elif name & 0xF0 != 0xE0 and name != 0xFE or name == 0xEE or content.startswith(b"JFIF\0"):
            kept.append(data[place:end])  # of the application's, JFIF's and Adobe's say how colours are coded
        place = end
    else:
        raise InputError(f"more than {MAX_SEGMENTS:,} segments before the pixels")
    return b"".join([*kept, data[place:]]), exif


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, place = [data[:8]], b"", 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if name == b"eXIf":
            exif = exif or data[place + 8 : end - 4]
        elif name == b"tRNS" or name[0] < 0x60:  # of capitals: without it the picture cannot be read
            # Pillow does not check the pixels' sums: the rest of a file that was never written would be read as black
            if end <= len(data) and zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise InputError(f"damaged: the checksum of its {printable(name.decode('latin-1'))} chunk is wrong")
            kept.append(data[place:end])
        place = end
        if name == b"IEND":
            break
    return b"".join([*kept, data[place:]]), exif


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8; 1 where there is none that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", exif, place + 8)
                return value if value in _TURNS else 1
    except struct.error:  # cut short, or a place beyond the end
        pass
    return 1
