"""Whether encoded bytes are a whole image that training can use."""

import io
import warnings

from PIL import Image, ImageFile

from spin_diffusion.data.report import CORRUPT_IMAGE, LeftOut

MIN_SIDE_PX = 8
"""An image with a smaller side is a placeholder, or too small for one cell of the latents."""
FORMATS = ("JPEG", "PNG", "WEBP")


def check_image(encoded: bytes) -> None:
    """Decode the whole image and drop the pixels.

    Raises LeftOut("corrupt image") if it is no JPEG, PNG or WebP, is cut short or damaged, has a side below
    MIN_SIDE_PX, or has more pixels than Pillow's limit against decompression bombs.
    """
    # A picture that is cut short must not pass because another library of the process switched tolerance on.
    tolerance, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                width, height = image.size
                if min(width, height) >= MIN_SIDE_PX:
                    image.load()
    except Image.UnidentifiedImageError as error:
        raise LeftOut(CORRUPT_IMAGE, "not a JPEG, PNG or WebP image") from error
    except Exception as error:  # decoders of damaged bytes raise almost anything: struct.error, SyntaxError, zlib.error
        raise LeftOut(CORRUPT_IMAGE, " ".join(str(error).split()) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerance
    if min(width, height) < MIN_SIDE_PX:
        raise LeftOut(CORRUPT_IMAGE, f"{width} x {height} px is smaller than {MIN_SIDE_PX} px a side")
