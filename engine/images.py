"""Pictures from outside: file content, data: URLs and local files become checked, upright RGB images.

PNG, JPEG and WebP by content; sizes are bounded from the header, before anything is decoded.
Nothing is fetched: http(s) URLs are refused, because nothing leaves the machine.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib
from pathlib import Path

from PIL import Image

from engine.errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000
MAX_IMAGES = 16  # of one request
MAX_ASPECT = 100  # a thinner strip grows huge when its short edge is resized to a tower's size

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,20}):/")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow's parsers raise on broken files; its UnidentifiedImageError is an OSError
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: bytes | str | Path) -> Image.Image:
    """An upright RGB picture from file content, a data: URL or a local path.

    Transparent pictures are laid on white; of an animation the first frame is taken.
    """
    if isinstance(source, bytes):
        return _decode(source)
    if isinstance(source, str) and (source[:5].lower() == "data:" or _SCHEME.match(source)):
        return load_data_url(source)
    return _decode(_read_file(Path(source)))


def load_data_url(url: str) -> Image.Image:
    """A picture from a data: URL and nothing else: a path in a request would read our own files."""
    if url[:5].lower() == "data:":
        return _decode(_data_url_content(url))
    if match := _SCHEME.match(url):
        raise RequestError(
            f"Images are not fetched from {match.group(1).lower()} addresses; nothing leaves this "
            "machine. Send the picture itself as data:image/png;base64,..."
        )
    raise RequestError(
        "The image is not a data: URL. Send a PNG, JPEG or WebP picture as data:image/png;base64,..."
    )


def check_num_images(num_images: int, *, supports_images: bool) -> None:
    """Refuse more pictures than a request may bring, and any for a model that reads text only."""
    if num_images and not supports_images:
        raise RequestError(
            "This model reads text only, and the request has an image. Remove the image or load a "
            "model with vision, such as LLaVA."
        )
    if num_images > MAX_IMAGES:
        raise RequestError(
            f"The request has {num_images} images; at most {MAX_IMAGES} are accepted. Remove some."
        )


def check_image(image: Image.Image) -> Image.Image:
    """Hold the same bounds for a picture that did not come through load_image; returns it as RGB."""
    _check_size(*image.size)
    try:
        image.load()
        is_plain = image.mode == "RGB" and "transparency" not in image.info
        return image if is_plain else _to_rgb(image)  # convert copies, and pictures are large
    except _BROKEN:
        raise _broken() from None


def _decode(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"The image has {len(data):,} bytes; at most {MAX_BYTES:,} are accepted. Scale it down."
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(_too_many_pixels("far too many")) from None
    except _BROKEN:  # Pillow's own message holds a heap address
        raise RequestError(
            "The image is not a readable PNG, JPEG or WebP picture. Save it as one of these."
        ) from None
    with image:
        _check_size(*image.size)  # from the header
        try:
            image.load()
            return _to_rgb(_upright(image))
        except _BROKEN:
            raise _broken() from None


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise RequestError("The image has no pixels. Send another picture.")
    if width * height > MAX_PIXELS:
        raise RequestError(_too_many_pixels(f"{width:,} x {height:,}"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(
            f"The image is {width:,} x {height:,} pixels; one side may be at most {MAX_ASPECT} times "
            "the other. Crop it."
        )


def _too_many_pixels(found: str) -> str:
    limit = MAX_PIXELS // 10**6
    return f"The image has {found} pixels; at most {limit} million are accepted. Scale it down."


def _broken() -> RequestError:
    return RequestError("The image is cut off or damaged. Save it again and send the whole file.")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _BROKEN:
        return image  # damaged EXIF says nothing about the pixels
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _data_url_content(url: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError(
            "The image's data: URL is not base64. Send it as data:image/png;base64,... (PNG, JPEG or WebP)."
        )
    if len(content) > MAX_BYTES * 4 // 3 + 4:
        raise RequestError(
            f"The image has over {MAX_BYTES:,} bytes, the most that is accepted. Scale it down."
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "The image's data: URL holds characters that are not base64. Encode the file again."
        ) from None


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(
                f"The image {path.name!r} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} "
                "are accepted. Scale it down."
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"The image file {path.name[:100]!r} cannot be read. Check its path."
        ) from error
