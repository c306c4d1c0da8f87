"""Pictures from outside: what is accepted, how it is laid out, and that damage is a sentence."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import RequestError
from engine.images import MAX_BYTES, check_image, load_data_url, load_image


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


RED = Image.new("RGB", (5, 3), (255, 0, 0))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_formats_are_known_by_content_from_bytes_urls_and_files(tmp_path, form):
    content = encoded(RED, form)
    (tmp_path / "picture.txt").write_bytes(content)
    for source in (
        content,
        data_url(content),
        tmp_path / "picture.txt",
        str(tmp_path / "picture.txt"),
    ):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (5, 3))


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF", "EPS"])
def test_other_formats_are_refused_without_an_address(form):
    with pytest.raises(RequestError, match="not a readable PNG, JPEG or WebP") as caught:
        load_image(encoded(RED, form))
    assert "0x" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (4, 6), "white")
    upright.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    from PIL import ImageOps

    stored = encoded(upright, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert load_image(stored).tobytes() == expected.tobytes()


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half = Image.new("LA", (1, 1), (0, 128))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([1, 2, 3])
    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert load_image(encoded(Image.new(mode, (3, 3)), form)).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = Image.new("I;16", (1, 1), 0x8000)
    assert load_image(encoded(grey)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(form):
    blue = Image.new("RGB", (5, 3), (0, 0, 255))
    content = encoded(RED, form, save_all=True, append_images=[blue] * 3, lossless=True)
    assert load_image(content).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 5_001), (13_000, 13_000), (2**31 - 1, 2**31 - 1)])
def test_size_is_bounded_from_the_header(size):
    with pytest.raises(RequestError, match=r"million are accepted|damaged|not a readable"):
        load_image(png_header(*size))


def test_thin_strips_are_refused():
    with pytest.raises(RequestError, match="Crop it"):
        load_image(encoded(Image.new("RGB", (1001, 10))))
    with pytest.raises(RequestError, match="Crop it"):
        check_image(Image.new("RGB", (1, 101)))


def test_too_many_bytes_are_refused():
    content = encoded(RED) + b"\0" * MAX_BYTES
    with pytest.raises(RequestError, match="Scale it down"):
        load_image(content)
    with pytest.raises(RequestError, match="Scale it down"):
        load_image(data_url(content))


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "https://a/b.png", "file:///etc/passwd", "ftp://a/b", "HTTP:/a"]
)
def test_nothing_is_fetched(url):
    for load in (load_image, load_data_url):
        with pytest.raises(RequestError, match="nothing leaves this machine"):
            load(url)


@pytest.mark.parametrize(
    "url",
    ["", "/etc/passwd", "data:", "data:image/png,abc", "data:image/png;base64,@@", "data:;base64,ab c=",
     "data:image/png;base64,é", "data:;base64,", "\ud800", "data:;base64,\ud800"],
)  # fmt: skip
def test_bad_data_urls_are_sentences(url):
    with pytest.raises(RequestError, match=r"[.)]$|\.\.\.$"):
        load_data_url(url)


@pytest.mark.parametrize("path", ["/no/such/file.png", "a\0b", "/"])
def test_unreadable_files_are_sentences_without_folders(path):
    with pytest.raises(RequestError, match="cannot be read") as caught:
        load_image(path)
    assert "/no/such" not in str(caught.value)


NOISE = Image.effect_noise((40, 30), 50).convert("RGB")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_a_picture_or_a_sentence(form, data):
    content = bytearray(encoded(NOISE, form))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(content))
    except RequestError as error:
        assert "0x" not in str(error)  # noqa: PT017
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(form):
    content = encoded(NOISE, form)
    with pytest.raises(RequestError):
        load_image(content[: len(content) // 2])
