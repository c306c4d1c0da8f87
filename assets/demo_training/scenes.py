"""Pictures the demo model learns from: a `Scene` is a pure function of its seed, and Pillow draws it.

Coordinates are fractions of the canvas (x to the right, y down), because the image processor squeezes
every picture to a square: what is "left" or "long" is judged after the squeeze. Nothing here is
photographic; a small share of pictures shows nothing nameable, so that the model learns to say so.
"""

# ruff: noqa: SIM905 - word lists read better as one string

import io
import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

GRID = 12  # patches a side; the patch labels below teach the vision tower

SHAPES = (
    "circle",
    "square",
    "triangle",
    "rectangle",
    "oval",
    "star",
    "heart",
    "diamond",
    "hexagon",
    "cross",
)

# Several anchors a colour: what drawing programs, CSS names and plotting palettes call by that name.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 30, 40), (200, 20, 20), (230, 57, 70)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 130, 30), (255, 127, 14)),
    "yellow": ((255, 255, 0), (255, 221, 40), (250, 230, 60), (255, 235, 59)),
    "green": ((0, 128, 0), (0, 255, 0), (40, 170, 70), (44, 160, 44), (34, 139, 34)),
    "cyan": ((0, 255, 255), (30, 220, 220), (0, 206, 209), (23, 200, 215)),
    "blue": ((0, 0, 255), (30, 80, 220), (31, 119, 180), (30, 144, 255), (65, 105, 225)),
    "purple": ((128, 0, 128), (140, 40, 180), (148, 60, 200), (120, 30, 160)),
    "pink": ((255, 192, 203), (255, 150, 190), (255, 105, 180), (250, 170, 200)),
    "brown": ((139, 69, 19), (120, 66, 30), (150, 85, 40), (101, 57, 25)),
    "black": ((0, 0, 0), (20, 20, 20), (35, 35, 38)),
    "gray": ((128, 128, 128), (140, 140, 145), (115, 115, 118), (150, 150, 150)),
    "white": ((255, 255, 255), (250, 250, 248), (245, 245, 245)),
}
SIZES = {"small": (0.066, 0.082), "medium": (0.108, 0.132), "large": (0.165, 0.205)}
CHARS = "0123456789abcdefghijklmnopqrstuvwxyz"

WORDS = (
    "apple baby ball bank bear bed bell bird blue boat book box boy bread bridge brown bus cake car cat "
    "chair city clock cloud coat coffee cold cow cup dance day deck demo desk dog door dream duck ear "
    "earth egg exit eye face farm fast fire fish flag flower food fox free friend frog game garden gift "
    "girl glass go gold good grass green hand happy hat heart hello help hill home horse hot house ice "
    "idea ink island juice jump key king kite lake lamp leaf left lemon light lion list lock love lucky "
    "magic map milk mind model moon mouse music name new nice night no nose note ocean ok old open "
    "orange page paint paper park peace pen pig pink pizza plane play please pool quick quiet rain red "
    "rice right ring river road robot rock rose run sad safe sale salt sea seed shoe shop sky sleep slow "
    "smile snow soap song soup south space spring star stop street sugar summer sun table tea team test "
    "thanks time today tree truck up view wall warm watch water wave wind window winter wolf word work "
    "world yellow yes zebra zero zoo"
).split()

PLACES = ("house", "car", "tree", "face", "flower", "boat")


@dataclass(frozen=True)
class Shape:
    """One drawn shape; x, y is its centre and rx, ry its half extents, all in fractions of the canvas."""

    name: str
    colour: str
    size: str
    x: float
    y: float
    rx: float
    ry: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Text:
    """A drawn number or word."""

    text: str
    colour: str
    x: float
    y: float
    char_boxes: tuple[tuple[float, float], ...]  # centre of every letter, fractions of the canvas

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass
class Scene:
    """What a picture shows; `marks` are the primitives that `draw` paints in order."""

    seed: int
    kind: str  # shapes, text, place name, blank, noise
    width: int
    height: int
    background: str | None = None  # colour name where the background is plain
    shapes: list[Shape] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    place: dict[str, str] = field(
        default_factory=dict
    )  # part -> colour or position, for composed pictures
    marks: list[tuple] = field(default_factory=list)


def make_scene(seed: int, kind: str | None = None, more_fonts: bool = False) -> Scene:
    """The scene of a seed; `kind` forces one of shapes, shapes_text, number, word, place, nothing.

    `more_fonts` adds matplotlib's fonts where it is installed; without it a seed means one scene everywhere.
    """
    rng = random.Random(seed)
    kind_drawn = rng.choices(
        ("shapes", "shapes_text", "number", "word", "place", "nothing"), (57, 12, 11, 9, 7, 4)
    )[0]
    kind = kind or kind_drawn
    width, height = _canvas(rng)
    if kind == "word" and rng.random() < 0.4:
        height = round(width / rng.uniform(1.3, 3.0))
    scene = Scene(seed, kind, width, height)
    if kind == "nothing":
        scene.kind = rng.choice(
            ("blank", "noise", "plasma", "gradient", "clutter", "clutter", "fractal")
        )
        scene.background = _paint_background(scene, rng) if scene.kind == "blank" else None
        return scene
    if kind == "place":
        scene.kind = rng.choice(PLACES)
        _compose(scene, rng)
        return scene
    scene.background = _paint_background(scene, rng)
    if kind in ("number", "word", "shapes_text"):
        number = kind == "number" or (kind == "shapes_text" and rng.random() < 0.6)
        font = rng.choice(("", "", *font_files())) if more_fonts else ""
        _add_text(scene, rng, number, font, room=1.0 if kind != "shapes_text" else 0.45)
    if kind in ("shapes", "shapes_text"):
        _add_shapes(scene, rng, _how_many(rng, kind))
    scene.kind = "shapes" if scene.shapes else "text" if scene.texts else "blank"
    return scene


def draw(scene: Scene, supersample: int = 1) -> Image.Image:
    """The scene as an RGB picture of its own size."""
    width, height = scene.width * supersample, scene.height * supersample
    rng = random.Random(scene.seed ^ 0x5EED)
    if scene.kind == "fractal":
        corner = rng.uniform(-2, 0), rng.uniform(-1.4, 0)
        side = rng.uniform(0.3, 2.4)
        swirl = Image.effect_mandelbrot((96, 96), (*corner, corner[0] + side, corner[1] + side), 40)
        inks = [tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(2)]
        swirl = Image.composite(
            Image.new("RGB", (96, 96), inks[0]), Image.new("RGB", (96, 96), inks[1]), swirl
        )
        return swirl.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
    if scene.kind == "clutter":
        return _clutter(rng).resize((scene.width, scene.height), Image.Resampling.BICUBIC)
    if scene.kind in ("noise", "plasma", "gradient"):
        cells = {"noise": (48, 48), "plasma": (rng.randint(4, 9),) * 2, "gradient": (2, 2)}[
            scene.kind
        ]
        tiny = Image.frombytes("RGB", cells, rng.randbytes(3 * cells[0] * cells[1]))
        return tiny.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
    image = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for mark in scene.marks:
        _draw_mark(image, pen, mark, width, height)
    if supersample > 1:
        image = image.resize((scene.width, scene.height), Image.Resampling.BOX)
    return _wear(image, rng)


def patch_labels(scene: Scene) -> tuple[bytes, bytes, bytes]:
    """Shape, colour and character index of every patch (0: none), for the training-only vision heads."""
    shape, colour, char = (bytearray(GRID * GRID) for _ in range(3))
    colours = list(COLOURS)
    for item in scene.shapes:
        for row in range(GRID):
            dy = ((row + 0.5) / GRID - item.y) / item.ry
            for column in range(GRID):
                dx = ((column + 0.5) / GRID - item.x) / item.rx
                if dx * dx + dy * dy < 0.8:
                    shape[row * GRID + column] = 1 + SHAPES.index(item.name)
                    colour[row * GRID + column] = 1 + colours.index(item.colour)
    for text in scene.texts:
        for letter, (x, y) in zip(text.text.lower().replace(" ", ""), text.char_boxes, strict=True):
            patch = min(int(y * GRID), GRID - 1) * GRID + min(int(x * GRID), GRID - 1)
            shape[patch] = 1 + len(SHAPES)
            colour[patch] = 1 + colours.index(text.colour)
            char[patch] = 1 + CHARS.index(letter)
    return bytes(shape), bytes(colour), bytes(char)


def _how_many(rng: random.Random, kind: str) -> int:
    if kind == "shapes_text":
        return rng.randint(1, 3)
    return rng.randint(7, 9) if rng.random() < 0.06 else rng.randint(1, 6)


def _canvas(rng: random.Random) -> tuple[int, int]:
    side = rng.choice((rng.randint(170, 260), rng.randint(220, 340), rng.randint(300, 620)))
    if rng.random() < 0.85:
        side = min(side, 340)
    ratio = rng.choices((1.0, rng.uniform(1.0, 1.25), rng.uniform(1.25, 1.45)), (58, 32, 10))[0]
    other = round(side / ratio)
    return (side, other) if rng.random() < 0.7 else (other, side)


def _shade(rng: random.Random, name: str) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in rng.choice(COLOURS[name]))


def _contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Weighted RGB distance, 0 to about 765 (the 'redmean' formula)."""
    red = (a[0] + b[0]) / 2
    dr, dg, db = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return math.sqrt((2 + red / 256) * dr * dr + 4 * dg * dg + (2 + (255 - red) / 256) * db * db)


def _paint_background(scene: Scene, rng: random.Random) -> str | None:
    style = rng.choices(("white", "black", "plain", "tint", "gradient"), (50, 6, 18, 16, 10))[0]
    if style in ("white", "black"):
        rgb = (255, 255, 255) if style == "white" else _shade(rng, "black")
        name = style
    elif style == "plain":
        name = rng.choice([c for c in COLOURS if c not in ("white", "black")])
        rgb = _shade(rng, name)
    else:
        name, rgb = None, tuple(rng.randint(205, 250) for _ in range(3))
    scene.marks.append(("fill", rgb))
    if style == "gradient":
        end = tuple(max(0, c - rng.randint(10, 60)) for c in rgb)
        scene.marks.append(("gradient", rgb, end, rng.random() < 0.5))
    return name


def _grounds(scene: Scene) -> list[tuple[int, int, int]]:
    """The RGB values that lie behind the shapes."""
    fills = [mark for mark in scene.marks[:2] if mark[0] in ("fill", "gradient")]
    return [rgb for mark in fills for rgb in mark[1:3] if isinstance(rgb, tuple)]


def _visible_colour(rng: random.Random, name: str | None, scene: Scene) -> tuple[str, tuple] | None:
    for _ in range(8):
        colour = name or rng.choice(list(COLOURS))
        rgb = _shade(rng, colour)
        if colour != scene.background and all(_contrast(rgb, g) > 130 for g in _grounds(scene)):
            return colour, rgb
    return None


def _add_shapes(scene: Scene, rng: random.Random, count: int) -> None:
    names, colours = list(SHAPES), list(COLOURS)
    if rng.random() < 0.5:  # few kinds, so that counting has something to count
        names = rng.sample(names, rng.randint(1, 2))
        colours = rng.sample(colours, rng.randint(1, 4))
    sizes = list(SIZES) if count <= 3 else ["small", "medium"] if count <= 6 else ["small"]
    squeeze = math.sqrt(scene.height / scene.width)
    style = rng.choices(("plain", "outlined", "line drawing"), (79, 15, 6))[0]
    for _ in range(count):
        found = _visible_colour(rng, rng.choice(colours), scene)
        if found is None:
            continue
        name, size = rng.choice(names), rng.choice(sizes)
        radius = rng.uniform(*SIZES[size])
        if size == "large" and not scene.texts and count <= 2 and rng.random() < 0.5:
            radius = rng.uniform(0.2, 0.44 if count == 1 else 0.27)
        rx, ry = radius * squeeze, radius / squeeze
        rx, ry = min(rx, 0.475), min(ry, 0.475)
        if name in ("rectangle", "oval"):  # at least 1.9 : 1 after the squeeze, so never a square
            long, aspect = min(radius * 1.12, 0.475), rng.uniform(1.9, 2.7)
            rx, ry = (long, long / aspect) if rng.random() < 0.6 else (long / aspect, long)
        for _ in range(25):
            x, y = rng.uniform(rx + 0.02, 0.98 - rx), rng.uniform(ry + 0.02, 0.98 - ry)
            if _is_free(scene, x, y, rx, ry):
                shape = Shape(name, found[0], size, x, y, rx, ry, found[1])
                scene.shapes.append(shape)
                _mark_shape(scene, rng, shape, style)
                break


def _is_free(scene: Scene, x: float, y: float, rx: float, ry: float) -> bool:
    gap = 0.025
    for o in scene.shapes:
        if abs(x - o.x) < rx + o.rx + gap and abs(y - o.y) < ry + o.ry + gap:
            return False
    for t in scene.texts:
        left, right = t.char_boxes[0][0] - 0.12, t.char_boxes[-1][0] + 0.12
        if left - rx < x < right + rx and abs(y - t.y) < ry + 0.15:
            return False
    return True


def _mark_shape(scene: Scene, rng: random.Random, shape: Shape, style: str) -> None:
    points = shape_points(shape.name, rng)
    line, line_width = None, 0.0
    if style == "outlined":
        line = (30, 30, 30) if _contrast(shape.rgb, (30, 30, 30)) > 150 else (240, 240, 240)
        line_width = rng.uniform(0.004, 0.012)
    fill = shape.rgb
    if style == "line drawing":
        fill, line, line_width = None, shape.rgb, rng.uniform(0.012, 0.03)
    elif style == "plain" and shape.size != "small" and rng.random() < 0.05:  # a thick outline only
        fill, line, line_width = None, shape.rgb, rng.uniform(0.03, 0.04)
    if points is None:
        box = (shape.x - shape.rx, shape.y - shape.ry, shape.x + shape.rx, shape.y + shape.ry)
        scene.marks.append(("ellipse", box, fill, line, line_width))
    else:
        placed = [(shape.x + px * shape.rx, shape.y + py * shape.ry) for px, py in points]
        scene.marks.append(("polygon", placed, fill, line, line_width))


def shape_points(name: str, rng: random.Random) -> list[tuple[float, float]] | None:
    """Outline of a shape within the unit circle (the unit square for a rectangle); None for ellipses."""
    if name in ("circle", "oval"):
        return None
    if name == "rectangle":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    tilt = math.radians(rng.uniform(-10, 10) if rng.random() < 0.5 else 0)
    if name == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif name == "diamond":
        points = [(0, -1), (0.74, 0), (0, 1), (-0.74, 0)]
    elif name == "cross":
        a = 0.3
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        points += [(-x, -y) for x, y in points]
    elif name == "heart":
        points = []
        for k in range(32):
            t = 2 * math.pi * k / 32
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((16 * math.sin(t) ** 3 / 16.5, -(y + 2.5) / 15))
    else:
        corners = {"triangle": 3, "star": 10, "hexagon": 6}[name]
        if (name != "triangle" and rng.random() < 0.4) or (
            name == "triangle" and rng.random() < 0.15
        ):
            tilt = rng.uniform(0, 2 * math.pi)
        points = []
        for k in range(corners):
            radius = 0.42 if name == "star" and k % 2 else 1.0
            angle = 2 * math.pi * k / corners - math.pi / 2
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
    c, s = math.cos(tilt), math.sin(tilt)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


@lru_cache(maxsize=1)
def font_files() -> tuple[str, ...]:
    """DejaVu files of matplotlib where it is installed; Pillow's own font is always there."""
    try:
        import matplotlib
    except ImportError:
        return ()
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    return tuple(
        f"{folder}/{name}.ttf"
        for name in (
            "DejaVuSans",
            "DejaVuSans-Bold",
            "DejaVuSerif",
            "DejaVuSansMono",
            "DejaVuSerif-Bold",
        )
    )


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def _add_text(scene: Scene, rng: random.Random, number: bool, name: str, room: float) -> None:
    if number:
        digits = rng.choices((1, 2, 3), (55, 25, 20))[0]
        text = str(rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
    elif rng.random() < 0.12:
        text = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))
    else:
        text = rng.choice(WORDS)
        if room == 1.0 and rng.random() < 0.2:
            text += f" {rng.choice(WORDS)}"
        text = rng.choice((text, text.upper(), text.capitalize(), text.title()))
    found = _visible_colour(rng, "black" if rng.random() < 0.35 else None, scene)
    found = found or _visible_colour(rng, "white", scene) or ("black", (0, 0, 0))
    probe = _font(name, 100)
    unit_width = probe.getlength(text) / 100  # text width at font size 1
    largest = min(0.92 * scene.width / unit_width, 0.85 * scene.height) * (
        room if number else max(room, 0.75)
    )
    smallest = min(0.15 * scene.height + 6, largest)
    size = max(12, round(rng.uniform(max(smallest, largest * 0.3), largest)))
    half_width, half_height = unit_width * size / scene.width / 2, 0.42 * size / scene.height
    x = rng.uniform(min(half_width + 0.02, 0.5), max(0.98 - half_width, 0.5))
    y = rng.uniform(min(half_height + 0.03, 0.5), max(0.97 - half_height, 0.5))
    if room == 1.0 and rng.random() < 0.5:
        x = y = 0.5
    boxes, left = [], x - half_width
    for index, letter in enumerate(text):
        if letter == " ":
            continue
        before = probe.getlength(text[:index]) / 100 * size / scene.width
        wide = probe.getlength(letter) / 100 * size / scene.width
        boxes.append((min(max(left + before + wide / 2, 0.0), 0.999), y))
    stroke = rng.choice((0, 0, 0, max(1, size // 30)))
    scene.texts.append(Text(text, found[0], x, y, tuple(boxes)))
    scene.marks.append(
        ("text", text, x, y, name, size / scene.height, found[1], stroke / scene.height)
    )


def _draw_mark(
    image: Image.Image, pen: ImageDraw.ImageDraw, mark: tuple, width: int, height: int
) -> None:
    kind = mark[0]
    if kind == "fill":
        pen.rectangle((0, 0, width, height), fill=mark[1])
    elif kind == "gradient":
        ramp = Image.linear_gradient("L")
        ramp = (ramp.rotate(90) if mark[3] else ramp).resize((width, height))
        image.paste(Image.composite(Image.new("RGB", ramp.size, mark[2]), image, ramp))
    elif kind == "ellipse":
        (x0, y0, x1, y1), line_width = mark[1], max(1, round(mark[4] * min(width, height)))
        box = (x0 * width, y0 * height, x1 * width, y1 * height)
        pen.ellipse(box, fill=mark[2], outline=mark[3], width=line_width if mark[3] else 0)
    elif kind == "polygon":
        points = [(x * width, y * height) for x, y in mark[1]]
        if mark[2]:
            pen.polygon(points, fill=mark[2])
        if mark[3]:
            line_width = max(1, round(mark[4] * min(width, height)))
            pen.line([*points, points[0], points[1]], fill=mark[3], width=line_width, joint="curve")
    elif kind == "text":
        _, text, x, y, name, size, rgb, stroke = mark
        font = _font(name, max(8, round(size * height)))
        pen.text(
            (x * width, y * height),
            text,
            rgb,
            font,
            anchor="mm",
            stroke_width=round(stroke * height),
        )


def _wear(image: Image.Image, rng: random.Random) -> Image.Image:
    """Now and then the traces that real files carry: JPEG blocks, light noise."""
    luck = rng.random()
    if luck < 0.06:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(45, 90))
        return Image.open(buffer).convert("RGB")
    if luck < 0.11:
        noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
        return Image.blend(image, noise, rng.uniform(0.03, 0.10))
    return image


def _clutter(rng: random.Random) -> Image.Image:
    """Overlapping soft patches in muted colours, as a far away photograph might look."""
    base = [rng.randint(30, 220) for _ in range(3)]

    def tone(spread: int) -> tuple[int, ...]:
        return tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in base)

    image = Image.new("RGB", (64, 64), tone(10))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(25, 90)):
        x, y, w, h = (
            rng.uniform(-12, 64),
            rng.uniform(-12, 64),
            rng.uniform(3, 30),
            rng.uniform(3, 30),
        )
        box = (x, y, x + w, y + h)
        if rng.random() < 0.5:
            pen.ellipse(box, fill=tone(80))
        else:
            corners = [
                (x + rng.uniform(-w, w), y + rng.uniform(-h, h)) for _ in range(rng.randint(3, 6))
            ]
            pen.polygon(corners, fill=tone(80))
    return image.resize((rng.randint(20, 64),) * 2, Image.Resampling.BILINEAR)


def _compose(scene: Scene, rng: random.Random) -> None:
    """A house, car, tree, face, flower or boat put together from plain marks."""
    skies = (
        (255, 255, 255),
        (225, 240, 255),
        (200, 228, 250),
        (250, 245, 230),
        (135, 206, 235),
        (170, 215, 245),
    )
    sky = rng.choice(skies)
    scene.marks.append(("fill", sky))
    place, marks = scene.place, scene.marks

    def paint(part: str, *names: str) -> tuple[int, int, int]:
        choices = [n for n in (names or COLOURS) if n not in ("white", "cyan", *place.values())]
        place[part] = rng.choice(choices)
        return _shade(rng, place[part])

    def box(x0: float, y0: float, x1: float, y1: float, rgb: tuple) -> None:
        marks.append(("polygon", [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], rgb, None, 0))

    def disc(x: float, y: float, r: float, rgb: tuple, squash: float = 1.0) -> None:
        marks.append(("ellipse", (x - r, y - r * squash, x + r, y + r * squash), rgb, None, 0))

    grass = rng.choice(((110, 190, 90), (0, 128, 0), (60, 160, 60), (150, 200, 110)))
    s, x = rng.uniform(0.75, 1.1), 0.5 + rng.uniform(-0.08, 0.08)
    if scene.kind in ("house", "car", "tree", "flower"):
        box(0, rng.uniform(0.7, 0.8), 1, 1, grass if scene.kind != "car" else (120, 120, 120))
    if scene.kind == "house":
        wide, eaves = rng.uniform(0.18, 0.26) * s, rng.uniform(0.03, 0.08)
        top = 0.8 - rng.uniform(0.28, 0.4) * s
        box(x - wide, top, x + wide, 0.82, paint("house"))
        roof = [
            (x - wide - eaves, top),
            (x + wide + eaves, top),
            (x, top - rng.uniform(0.16, 0.28) * s),
        ]
        marks.append(
            ("polygon", roof, paint("roof", "red", "brown", "gray", "black", "blue"), None, 0)
        )
        box(x - 0.05 * s, 0.82 - 0.19 * s, x + 0.05 * s, 0.82, paint("door"))
    elif scene.kind == "car":
        rgb = paint("car")
        box(x - 0.34 * s, 0.56, x + 0.34 * s, 0.74, rgb)
        cabin = [(x - 0.2 * s, 0.57), (x - 0.12 * s, 0.4), (x + 0.12 * s, 0.4), (x + 0.2 * s, 0.57)]
        marks.append(("polygon", cabin, rgb, None, 0))
        box(x - 0.1 * s, 0.44, x + 0.1 * s, 0.55, (215, 235, 250))
        for side in (-1, 1):
            disc(x + side * 0.2 * s, 0.75, 0.08 * s, (25, 25, 25))
            disc(x + side * 0.2 * s, 0.75, 0.03 * s, (200, 200, 200))
    elif scene.kind == "tree":
        box(x - 0.05, 0.5, x + 0.05, 0.84, _shade(rng, "brown"))
        rgb = paint("leaves", "green", "green", "green", "orange", "yellow")
        for dx, dy in ((-0.13, 0), (0.13, 0), (0, -0.13), (0, 0.05)):
            disc(x + dx * s, 0.42 + dy * s, 0.16 * s, rgb)
        place["apples"] = str(rng.randint(0, 5) if place["leaves"] == "green" else 0)
        spots = [(-0.16, -0.02), (0.15, 0.03), (0.0, -0.17), (0.01, 0.1), (-0.01, -0.03)]
        for dx, dy in rng.sample(spots, int(place["apples"])):
            disc(x + dx * s, 0.42 + dy * s, 0.032, (215, 20, 30))
    elif scene.kind == "face":
        disc(x, 0.5, 0.36 * s, paint("face", "yellow", "pink", "orange", "green", "blue"))
        for side in (-1, 1):
            disc(x + side * 0.13 * s, 0.42, 0.04 * s, (20, 20, 20), 1.3)
        place["mood"] = rng.choice(("happy", "sad"))
        bend = 0.09 * s if place["mood"] == "happy" else -0.09 * s
        arc = [
            (x + t * 0.018 * s, 0.64 + bend * (1 - (t / 10) ** 2) - bend / 2)
            for t in range(-10, 11)
        ]
        arc += [(px, py + 0.03) for px, py in reversed(arc)]
        marks.append(("polygon", arc, (20, 20, 20), None, 0))
    elif scene.kind == "flower":
        box(x - 0.015, 0.5, x + 0.015, 0.85, (40, 140, 60))
        petals = paint("petals", "red", "pink", "purple", "blue", "orange", "yellow")
        for k in range(6):
            a = math.pi * k / 3
            disc(x + 0.15 * s * math.cos(a), 0.42 + 0.15 * s * math.sin(a), 0.09 * s, petals)
        disc(x, 0.42, 0.085 * s, paint("middle", "yellow", "brown", "orange", "black"))
    elif scene.kind == "boat":
        box(0, 0.7, 1, 1, (50, 120, 210))
        hull = [(x - 0.3 * s, 0.6), (x + 0.3 * s, 0.6), (x + 0.2 * s, 0.75), (x - 0.2 * s, 0.75)]
        marks.append(
            ("polygon", hull, paint("hull", "red", "brown", "black", "green", "purple"), None, 0)
        )
        box(x - 0.012, 0.6 - 0.4 * s, x + 0.012, 0.61, (110, 70, 40))
        sail = [(x + 0.02, 0.6 - 0.4 * s), (x + 0.02, 0.57), (x + 0.25 * s, 0.57)]
        marks.append(
            ("polygon", sail, paint("sail", "red", "orange", "yellow", "pink", "purple"), None, 0)
        )
    if scene.kind != "face" and rng.random() < 0.6:
        side = rng.choice(("left", "right"))
        place["sun"] = side
        disc(0.12 if side == "left" else 0.88, 0.12, 0.085, (255, 205, 30))
