"""Questions about a scene and their canonical answers, in English and simplified Chinese.

A question is asked only where its answer is beyond doubt: the thing meant is unique, and positions
and distances keep clear of the border between two answers. Each kind of question has phrasings
for training and others held back, to measure whether the model understands or recites.
"""

# ruff: noqa: SIM905 - word lists read better as one string

import random
from collections.abc import Callable

from assets.demo_training.chinese import full_width, is_chinese
from assets.demo_training.scenes import COLOURS, SHAPES, Scene, Shape

CATEGORIES = ("colour", "shape", "count", "position", "relation", "digit")

ZH_COLOURS = dict(
    zip(COLOURS, "红色 橙色 黄色 绿色 青色 蓝色 紫色 粉色 棕色 黑色 灰色 白色".split(), strict=True)
)
ZH_SHAPES = dict(
    zip(
        SHAPES, "圆形 正方形 三角形 长方形 椭圆形 星形 心形 菱形 六边形 十字形".split(), strict=True
    )
)
ZH_SIZES = {"small": "小的", "medium": "", "large": "大的"}
ZH_COUNT = "零一两三四五六七八九"
EN_COUNT = "no one two three four five six seven eight nine".split()
CELLS = (
    ("top left", "in the top left", "左上角"),
    ("top", "at the top", "上方"),
    ("top right", "in the top right", "右上角"),
    ("left", "on the left", "左边"),
    ("center", "in the center", "中间"),
    ("right", "on the right", "右边"),
    ("bottom left", "in the bottom left", "左下角"),
    ("bottom", "at the bottom", "下方"),
    ("bottom right", "in the bottom right", "右下角"),
)
PLACES_ZH = {
    "house": "房子",
    "car": "汽车",
    "tree": "树",
    "face": "脸",
    "flower": "花",
    "boat": "船",
}
PARTS = {
    "house": ("house", "房子"),
    "roof": ("roof", "屋顶"),
    "door": ("door", "门"),
    "car": ("car", "汽车"),
    "leaves": ("leaves", "树叶"),
    "face": ("face", "脸"),
    "petals": ("petals", "花瓣"),
    "middle": ("middle of the flower", "花心"),
    "hull": ("boat", "船身"),
    "sail": ("sail", "帆"),
}

Asked = tuple[str, str] | None

_OPENERS = {
    False: (
        "Please tell me: ",
        "Hello! ",
        "Look at the picture. ",
        "Question: ",
        "Hi, ",
        "Please answer: ",
        "Now, ",
    ),
    True: (
        "请回答\uff1a",
        "你好\uff0c",
        "看图回答\uff1a",
        "请看图。",
        "那么\uff0c",
        "请告诉我\uff0c",
    ),
}


# Phrasings: (training, held back) by language. {x}, {y} stand for what is referred to.
PHRASES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "colour": {
        "en": (
            (
                "What color is {x}?",
                "What colour is {x}?",
                "Which color is {x}?",
                "What is the color of {x}?",
                "Tell me the color of {x}.",
                "{x}: what color?",
                "Name the color of {x}.",
                "What's the colour of {x}?",
                "Do you know what color {x} is?",
                "Say what color {x} is.",
                "I want to know what colour {x} is.",
                "What color does {x} have?",
                "{x} is which color?",
                "Could you name the color of {x}?",
                "What color would you say {x} is?",
            ),
            ("Can you tell me what color {x} is?", "Which colour does {x} have?"),
        ),
        "zh": (
            (
                "{x}是什么颜色?",
                "{x}是什么颜色的?",
                "{x}的颜色是什么?",
                "请说出{x}的颜色。",
                "{x}什么颜色?",
                "请问{x}是什么颜色?",
                "你知道{x}是哪种颜色吗?",
                "我想知道{x}是什么颜色。",
                "{x}是哪种颜色?",
                "能说出{x}的颜色吗?",
                "告诉我{x}的颜色。",
            ),
            ("请问{x}是哪种颜色?", "你能说出{x}是什么颜色吗?"),
        ),
    },
    "shape": {
        "en": (
            (
                "What shape is {x}?",
                "Which shape is {x}?",
                "What is the shape of {x}?",
                "What kind of shape is {x}?",
                "Name the shape of {x}.",
                "Tell me the shape of {x}.",
                "Do you know what shape {x} is?",
                "Say what shape {x} is.",
                "I want to know what shape {x} is.",
                "What shape does {x} have?",
                "{x} is which shape?",
                "Could you name the shape of {x}?",
                "{x}: what shape?",
            ),
            ("Can you tell me what shape {x} is?", "Which shape does {x} have?"),
        ),
        "zh": (
            (
                "{x}是什么形状?",
                "{x}是什么形状的?",
                "{x}的形状是什么?",
                "请说出{x}的形状。",
                "告诉我{x}的形状。",
                "请问{x}是什么形状?",
                "你知道{x}是哪种形状吗?",
                "我想知道{x}是什么形状。",
                "{x}是哪种形状?",
                "能说出{x}的形状吗?",
            ),
            ("请问{x}是哪种形状?", "你能说出{x}是什么形状吗?"),
        ),
    },
    "count": {
        "en": (
            (
                "How many {x} are there?",
                "How many {x} do you see?",
                "How many {x} are in the picture?",
                "Count the {x}.",
                "What is the number of {x}?",
                "How many {x}?",
                "How many {x} can you see?",
                "how many {x} are in this image",
                "Please count the {x}.",
                "Count all {x} in the image.",
                "Do you know how many {x} there are?",
                "Tell me the number of {x}.",
                "I want to know how many {x} there are.",
                "Can you count the {x}?",
                "How many {x} does the picture show?",
                "Say how many {x} you see.",
                "How many {x} can you find?",
            ),
            ("Please count all the {x} in this picture.", "Tell me how many {x} you can find."),
        ),
        "zh": (
            (
                "有几个{x}?",
                "图中有几个{x}?",
                "有多少个{x}?",
                "图片里有多少个{x}?",
                "数一数{x}。",
                "数一数有几个{x}。",
                "请数一下{x}。",
                "你看到几个{x}?",
                "请问有几个{x}?",
                "我想知道有多少个{x}。",
                "{x}有几个?",
                "图里的{x}有多少个?",
                "能数一下{x}吗?",
                "你能数出几个{x}?",
                "能看到多少个{x}?",
                "可以看到几个{x}?",
                "一共有几个{x}?",
            ),
            ("请数一下图里的{x}有多少个。", "你能看到几个{x}?"),
        ),
    },
    "position": {
        "en": (
            (
                "Where is {x}?",
                "Where is {x} in the picture?",
                "In which part of the image is {x}?",
                "What is the position of {x}?",
                "Where can I find {x}?",
                "Where do you see {x}?",
                "Do you know where {x} is?",
                "Can you tell me where {x} is?",
                "Say where {x} is.",
                "Where is {x} located?",
                "Which part of the picture is {x} in?",
                "I want to know where {x} is.",
                "Find {x}.",
                "Which region of the image contains {x}?",
                "In which corner or on which side is {x}?",
                "At what place in the picture is {x}?",
                "{x}, where is it located?",
                "Which area of the image shows {x}?",
                "In what region do you see {x}?",
                "{x}: where is it?",
                "In what part of the image is {x} located?",
            ),
            ("In what area of the picture is {x} located?", "Tell me where {x} is."),
        ),
        "zh": (
            (
                "{x}在哪里?",
                "{x}在图中的什么位置?",
                "{x}在哪儿?",
                "{x}的位置在哪里?",
                "{x}在图片的哪个部分?",
                "请问{x}在哪里?",
                "你知道{x}在哪里吗?",
                "请说出{x}的位置。",
                "我想知道{x}在什么地方。",
                "{x}位于哪里?",
                "{x}处于什么地方?",
                "{x}在什么地方?",
                "{x}位于图中哪个位置?",
                "哪里有{x}?",
                "{x}在什么位置?",
                "告诉我{x}的位置。",
            ),
            ("请告诉我{x}在哪里。", "{x}位于什么地方?"),
        ),
    },
    "digit": {
        "en": (
            (
                "What number is written?",
                "Which number is this?",
                "What number is in the picture?",
                "Read the number.",
                "What number do you see?",
                "What is the number?",
                "What does the number say?",
                "Which number is shown?",
                "Do you know what number this is?",
                "Please read the number.",
                "Can you read the number?",
                "Tell me the number.",
                "Say which number is written.",
                "I want to know what number is shown.",
                "What number is this?",
                "What number does the image show?",
                "Read the digits.",
                "Which digits are written?",
                "What digit is this?",
            ),
            ("Can you read the number in this image?", "Please tell me which number you see."),
        ),
        "zh": (
            (
                "写的是什么数字?",
                "图中的数字是什么?",
                "这是什么数字?",
                "读出这个数字。",
                "图片里是什么数字?",
                "数字是多少?",
                "请读出数字。",
                "请问这是什么数字?",
                "告诉我图中的数字。",
                "你看到的数字是什么?",
                "你能读出数字吗?",
                "我想知道写的是哪个数字。",
            ),
            ("你能读出图里的数字吗?", "请告诉我你看到的是哪个数字。"),
        ),
    },
}
RELATIONS = {  # name -> axis, sign, English, Chinese
    "left": (0, -1, "to the left of", "左边"),
    "right": (0, 1, "to the right of", "右边"),
    "above": (1, -1, "above", "上面"),
    "below": (1, 1, "below", "下面"),
}
DESCRIBE = {
    "en": (
        "Describe this image.",
        "Describe the picture.",
        "Describe this picture in detail.",
        "What do you see?",
        "What can you see in this image?",
        "Can you describe this image?",
        "Please describe what you see.",
        "Tell me about this picture.",
        "What does this image show?",
        "Tell me what is in the image.",
        "What is in this image?",
        "Describe the image in one sentence.",
        "What's in the image?",
        "Give me a description of this picture.",
        "Explain this image.",
        "describe",
    ),
    "zh": (
        "描述这张图片。",
        "请描述这张图片。",
        "描述一下这张图。",
        "你看到了什么?",
        "图片里有什么?",
        "这张图里有什么?",
        "请说说这张图片。",
        "这张图片显示了什么?",
        "看图说话。",
        "这张图片里有什么?",
        "用一句话描述图片。",
        "介绍一下这张图片。",
        "请告诉我图里有什么。",
    ),
}
LIST = {
    "en": (
        "What is this?",
        "What's this?",
        "What is it?",
        "List the objects.",
        "What is in the picture?",
    ),
    "zh": ("这是什么?", "列出图中的物体。", "图中画的是什么?", "这是啥?"),
}


def ask(
    scene: Scene, rng: random.Random, lang: str, category: str, held_out: bool = False
) -> Asked:
    """A question of the category and its answer, or None where the scene has no clear one."""
    asked = _MAKERS[category](scene, rng, lang, held_out)
    return asked and (full_width(asked[0]), full_width(asked[1]))


def any_question(scene: Scene, rng: random.Random, lang: str) -> tuple[str, str]:
    """A training question: the six measured categories most often, then everything else."""
    while True:
        category = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        asked = ask(scene, rng, lang, category)
        if asked:
            return _casual(rng, asked[0], lang), asked[1]


def describe(scene: Scene, rng: random.Random, lang: str) -> tuple[str, str]:
    """The request for a description and the full description."""
    return full_width(rng.choice(DESCRIBE[lang])), description(scene, lang)


def description(scene: Scene, lang: str) -> str:
    """Sentences that name every object, in reading order."""
    return full_width(_description(scene, lang == "zh"))


def _description(scene: Scene, zh: bool) -> str:
    if scene.kind == "blank":
        if zh:
            ground = f"只有{ZH_COLOURS[scene.background]}的背景," if scene.background else ""
            return f"这是一张空白的图片,{ground}什么也没有画。"
        plain = f": plain {scene.background}," if scene.background else ""
        return f"This is an empty picture{plain} with nothing drawn on it."
    if scene.kind in ("noise", "plasma", "gradient", "clutter", "fractal"):
        return (
            "我没有看到认识的形状,只有混在一起的颜色。"
            if zh
            else "I see no shapes that I know here, only colors that run into each other."
        )
    if scene.place:
        return _describe_place(scene, zh)
    parts = []
    if scene.shapes:
        parts.append(_describe_shapes(scene, zh))
    for text in scene.texts:
        where = cell_of(text.x, text.y)
        if zh:
            what = f"数字{text.text}" if text.is_number else f"单词“{text.text}”"
            parts.append(f"{CELLS[where][2]}用{ZH_COLOURS[text.colour]}写着{what}。")
        else:
            what = f"number {text.text}" if text.is_number else f'word "{text.text}"'
            parts.append(f"The {what} is written in {text.colour} {CELLS[where][1]}.")
    if scene.background:
        background = ZH_COLOURS[scene.background] if zh else scene.background
        parts.append(f"背景是{background}。" if zh else f"The background is {background}.")
    return ("" if zh else " ").join(parts)


def cell_of(x: float, y: float) -> int:
    """Which of the nine fields of the picture a point is in, in reading order."""
    return 3 * min(int(y * 3), 2) + min(int(x * 3), 2)


def noun(shape: Shape, lang: str, size: bool = False) -> str:
    """'a large red star', '大的红色星形'."""
    if lang == "zh":
        return (
            (ZH_SIZES[shape.size] if size else "")
            + ZH_COLOURS[shape.colour]
            + ZH_SHAPES[shape.name]
        )
    words = f"{shape.size} " if size and shape.size != "medium" else ""
    return _article(f"{words}{shape.colour} {shape.name}")


def in_reading_order(scene: Scene) -> list[Shape]:
    return sorted(scene.shapes, key=lambda s: (min(int(s.y * 3), 2), s.x))


def _describe_shapes(scene: Scene, zh: bool) -> str:
    shapes = in_reading_order(scene)
    count = len(shapes)
    if zh:
        items = [f"{CELLS[cell_of(s.x, s.y)][2]}有一个{noun(s, 'zh', size=True)}" for s in shapes]
        return f"图中有{ZH_COUNT[count]}个图形:{','.join(items)}。"
    items = [f"{noun(s, 'en', size=True)} {CELLS[cell_of(s.x, s.y)][1]}" for s in shapes]
    return f"I see {EN_COUNT[count]} shape{'s' if count > 1 else ''}: {_join(items)}."


def _describe_place(scene: Scene, zh: bool) -> str:
    p, kind = scene.place, scene.kind
    colour = {part: (ZH_COLOURS[c] if zh else c) for part, c in p.items() if c in COLOURS}
    if zh:
        text = {
            "house": "图中有一座{house}的房子,屋顶是{roof},门是{door}。",
            "car": "图中有一辆{car}的汽车停在路上。",
            "tree": "图中有一棵树,树叶是{leaves}。",
            "face": "图中有一张{face}的脸。",
            "flower": "图中有一朵花,花瓣是{petals},花心是{middle}。",
            "boat": "图中有一条船漂在水上,船身是{hull},帆是{sail}。",
        }[kind].format(**colour)
        if p.get("apples", "0") != "0":
            text += f"树上有{ZH_COUNT[int(p['apples'])]}个红苹果。"
        if kind == "face":
            text += "它看起来很开心。" if p["mood"] == "happy" else "它看起来很难过。"
        if "sun" in p:
            text += f"太阳在{'左上角' if p['sun'] == 'left' else '右上角'}。"
        return text
    text = {
        "house": "I see {a_house} house with {a_roof} roof and {a_door} door.",
        "car": "I see {a_car} car on a road.",
        "tree": "I see a tree with {leaves} leaves.",
        "face": "I see {a_face} face.",
        "flower": "I see a flower with {petals} petals around {a_middle} middle.",
        "boat": "I see a boat on the water. It has {a_hull} hull and {a_sail} sail.",
    }[kind].format(**colour, **{f"a_{k}": _article(v) for k, v in colour.items()})
    apples = int(p.get("apples", "0"))
    if apples:
        text += f" There {'is' if apples == 1 else 'are'} {EN_COUNT[apples]} red apple"
        text += "s on it." if apples > 1 else " on it."
    if kind == "face":
        text += f" It looks {p['mood']}."
    if "sun" in p:
        text += f" The sun is in the top {p['sun']}."
    return text


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _phrase(rng: random.Random, category: str, lang: str, held_out: bool, **words: str) -> str:
    text = rng.choice(PHRASES[category][lang][held_out]).format(**words)
    return text[0].upper() + text[1:]


def _casual(rng: random.Random, question: str, lang: str) -> str:
    """The way people type: sometimes no capital, no question mark, a 'please'."""
    luck = rng.random()
    if rng.random() < 0.08:
        question = rng.choice(_OPENERS[is_chinese(question)]) + question
    if luck < 0.12:
        question = question.rstrip("?\uff1f。.")
    if lang == "en" and 0.06 < luck < 0.2:
        question = question[0].lower() + question[1:]
    if is_chinese(question) and rng.random() < 0.3:
        question = question.replace("\uff1f", "?").replace("\uff0c", ",")
    return question


def _only(shapes: list[Shape]) -> Shape | None:
    return shapes[0] if len(shapes) == 1 else None


def _named(rng: random.Random, lang: str, shape: Shape) -> str:
    """'the star' or '星形', with an everyday synonym now and then."""
    if lang == "zh":
        everyday = {
            "star": "星星",
            "heart": "爱心",
            "circle": "圆",
            "square": "方块",
            "cross": "十字",
        }
        name = everyday.get(shape.name) if rng.random() < 0.25 else None
        return name or ZH_SHAPES[shape.name]
    everyday = {"cross": "plus sign", "oval": "ellipse"}
    return "the " + ((rng.random() < 0.2 and everyday.get(shape.name)) or shape.name)


def _in_cell(scene: Scene, rng: random.Random) -> tuple[Shape, int] | None:
    """A shape well inside a field of the picture in which no other thing lies."""
    shape = rng.choice(scene.shapes)
    cell = _clear_cell(shape.x, shape.y)
    others = [cell_of(o.x, o.y) for o in (*scene.shapes, *scene.texts) if o is not shape]
    return (shape, cell) if cell is not None and cell not in others and not scene.texts else None


def _clear_cell(x: float, y: float) -> int | None:
    clear = all(abs(v - border) > 0.045 for v in (x, y) for border in (1 / 3, 2 / 3))
    return cell_of(x, y) if clear else None


def _colour(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    subject = None
    if scene.place:
        part = rng.choice([p for p in scene.place if p in PARTS])
        subject, colour = PARTS[part][lang == "zh"], scene.place[part]
        subject = subject if lang == "zh" else f"the {subject}"
        if part in ("leaves", "petals"):
            return _place_colour(rng, lang, subject, colour)
    elif scene.texts and (not scene.shapes or rng.random() < 0.4):
        text = scene.texts[0]
        word = ("number", "数字") if text.is_number else ("word", "文字")
        subject = word[1] if lang == "zh" else f"the {word[0]}"
        colour = text.colour
    elif scene.shapes:
        shape = rng.choice(scene.shapes)
        colour = shape.colour
        if len(scene.shapes) == 1 and not scene.texts and rng.random() < 0.4:
            subject = (
                rng.choice(("这个图形", "它"))
                if lang == "zh"
                else rng.choice(("the shape", "it", "this"))
            )
        elif _only([s for s in scene.shapes if s.name == shape.name]):
            subject = _named(rng, lang, shape)
        elif found := _in_cell(scene, rng):
            colour = found[0].colour
            subject = _cell_subject(lang, found[1])
    if not subject:
        return None
    answer = f"{ZH_COLOURS[colour]}。" if lang == "zh" else _sentence(colour)
    return _phrase(rng, "colour", lang, held_out, x=subject), answer


def _place_colour(rng: random.Random, lang: str, subject: str, colour: str) -> Asked:
    question = f"{subject}是什么颜色?" if lang == "zh" else f"What color are {subject}?"
    return question, f"{ZH_COLOURS[colour]}。" if lang == "zh" else _sentence(colour)


def _cell_subject(lang: str, cell: int) -> str:
    return f"{CELLS[cell][2]}的图形" if lang == "zh" else f"the shape {CELLS[cell][1]}"


def _shape(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    if not scene.shapes:
        return None
    shape = rng.choice(scene.shapes)
    subject = None
    if len(scene.shapes) == 1 and not scene.texts and rng.random() < 0.4:
        subject = (
            rng.choice(("这个图形", "它"))
            if lang == "zh"
            else rng.choice(("this", "it", "the object"))
        )
    elif _only([s for s in scene.shapes if s.colour == shape.colour]):
        if all(t.colour != shape.colour for t in scene.texts):
            thing = rng.choice(("thing", "object", "one"))
            subject = (
                f"{ZH_COLOURS[shape.colour]}的{rng.choice(('图形', '东西'))}"
                if lang == "zh"
                else f"the {shape.colour} {thing}"
            )
    elif found := _in_cell(scene, rng):
        shape = found[0]
        subject = (
            f"{CELLS[found[1]][2]}的东西" if lang == "zh" else f"the object {CELLS[found[1]][1]}"
        )
    if not subject:
        return None
    answer = f"{ZH_SHAPES[shape.name]}。" if lang == "zh" else _sentence(_article(shape.name))
    return _phrase(rng, "shape", lang, held_out, x=subject), answer


def _count(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    zh = lang == "zh"
    if "apples" in scene.place:
        words, count = ("苹果" if zh else "apples"), int(scene.place["apples"])
    elif not scene.shapes:
        if scene.texts or scene.place:
            return None
        words, count = ("图形" if zh else rng.choice(("shapes", "objects"))), 0
    else:
        style = rng.choice(("all", "name", "colour", "both"))
        like = rng.choice(scene.shapes)
        name, colour = like.name, like.colour
        if rng.random() < 0.1:
            name, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            if colour == scene.background:
                return None
        if style in ("all", "colour") and scene.texts:
            return None
        same_name = [s for s in scene.shapes if s.name == name or style in ("all", "colour")]
        count = len([s for s in same_name if s.colour == colour or style in ("all", "name")])
        plural = {"hexagon": "hexagons", "cross": "crosses"}.get(name, name + "s")
        thing = rng.choice(("shapes", "objects", "things"))
        words = {
            "all": "图形" if zh else thing,
            "name": ZH_SHAPES[name] if zh else plural,
            "colour": f"{ZH_COLOURS[colour]}的图形" if zh else f"{colour} {thing}",
            "both": f"{ZH_COLOURS[colour]}的{ZH_SHAPES[name]}" if zh else f"{colour} {plural}",
        }[style]
    if count > 5 and (held_out or rng.random() < 0.7):
        return None
    return _phrase(rng, "count", lang, held_out, x=words), f"{count}个。" if zh else f"{count}."


def _unique(scene: Scene, rng: random.Random, lang: str, shape: Shape) -> str | None:
    """A way to refer to the shape that fits no other."""
    if _only([s for s in scene.shapes if s.name == shape.name]) and rng.random() < 0.5:
        return _named(rng, lang, shape)
    if _only([s for s in scene.shapes if (s.name, s.colour) == (shape.name, shape.colour)]):
        if lang == "zh":
            return (
                f"{ZH_COLOURS[shape.colour]}的{ZH_SHAPES[shape.name]}"
                if rng.random() < 0.5
                else noun(shape, lang)
            )
        return f"the {shape.colour} {shape.name}"
    return None


def _position(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    zh = lang == "zh"
    if scene.place:
        if "sun" not in scene.place:
            return None
        subject, cell = ("太阳" if zh else "the sun"), 0 if scene.place["sun"] == "left" else 2
    elif scene.texts and (not scene.shapes or rng.random() < 0.3):
        text = scene.texts[0]
        word = ("number", "数字") if text.is_number else ("word", "文字")
        subject, cell = (word[1] if zh else f"the {word[0]}"), _clear_cell(text.x, text.y)
    elif scene.shapes:
        shape = rng.choice(scene.shapes)
        subject, cell = _unique(scene, rng, lang, shape), _clear_cell(shape.x, shape.y)
    else:
        return None
    if subject is None or cell is None:
        return None
    answer = f"{CELLS[cell][2]}。" if zh else _sentence(CELLS[cell][0])
    return _phrase(rng, "position", lang, held_out, x=subject), answer


def _relation(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    if len(scene.shapes) < 2:
        return None
    zh = lang == "zh"
    a, b = rng.sample(scene.shapes, 2)
    x, y = _unique(scene, rng, lang, a), _unique(scene, rng, lang, b)
    if not x or not y:
        return None
    name = rng.choice(list(RELATIONS))
    axis, sign, en, zh_word = RELATIONS[name]
    distance = sign * ((b.x - a.x, b.y - a.y)[axis])  # negative: a is `name` of b
    style = rng.choice(("whether", "either", "what"))
    if style == "what":
        return None if scene.texts else _what_is_beside(scene, rng, lang, b, y, name, held_out)
    if abs(distance) < 0.1:
        return None
    holds = distance < 0
    if style == "whether":
        if zh:
            forms = (
                f"{x}在{y}的{zh_word}吗?",
                f"{x}是不是在{y}的{zh_word}?",
                f"{x}在{y}{zh_word}吗?",
            )
            forms += (f"{x}在{y}的{zh_word},对吗?", f"我觉得{x}在{y}的{zh_word},是不是?")
            held = (f"请问{x}在{y}{zh_word}吗?",)
            return rng.choice(held if held_out else forms), "是的。" if holds else "不是。"
        forms = (f"Is {x} {en} {y}?", f"Is {x} located {en} {y}?", f"Do you think {x} is {en} {y}?")
        forms += (f"Is it true that {x} is {en} {y}?", f"Can you tell me if {x} is {en} {y}?")
        forms += (f"{x[0].upper()}{x[1:]} is {en} {y}, right?",)
        held = (f"Would you say that {x} is {en} {y}?",)
        return rng.choice(held if held_out else forms), "Yes." if holds else "No."
    first, second = (("left", "right"), ("above", "below"))[axis]
    actual = (first, second)[(b.x - a.x, b.y - a.y)[axis] < 0]
    if zh:
        one, two = RELATIONS[first][3], RELATIONS[second][3]
        forms = (
            f"{x}在{y}的{one}还是{two}?",
            f"{x}在{y}的{two}还是{one}?",
            f"{x}在{y}的哪边,{one}还是{two}?",
        )
        forms += (f"相对于{y},{x}在{one}还是{two}?", f"{x}是在{y}的{one}还是{two}?")
        held = (f"和{y}相比,{x}在{one}还是{two}?",)
        return rng.choice(held if held_out else forms), f"{RELATIONS[actual][3]}。"
    if axis == 0:
        forms = (f"Is {x} to the left or to the right of {y}?", f"Is {x} left or right of {y}?")
        forms += (
            f"Is {x} to the right or to the left of {y}?",
            f"On which side of {y} is {x}, left or right?",
        )
        forms += (f"Which side of {y} is {x} on?",)
        held = (f"Is {x} on the left or on the right side of {y}?",)
        return rng.choice(held if held_out else forms), f"To the {actual}."
    forms = (f"Is {x} above or below {y}?", f"Is {x} below or above {y}?")
    forms += (
        f"{x[0].upper()}{x[1:]}: above or below {y}?",
        f"Looking at {y}, is {x} above or below?",
    )
    held = (f"Compared with {y}, is {x} above or below it?",)
    return rng.choice(held if held_out else forms), f"{actual.capitalize()}."


def _what_is_beside(
    scene: Scene, rng: random.Random, lang: str, b: Shape, y: str, name: str, held_out: bool
) -> Asked:
    axis, sign, en, zh_word = RELATIONS[name]
    found = []
    for other in scene.shapes:
        if other is b:
            continue
        away = sign * ((other.x - b.x, other.y - b.y)[axis])
        if away > 0.1:
            found.append(other)
        elif away > 0.0:
            return None
    if len(found) != 1:
        return None
    if lang == "zh":
        forms = (f"{y}的{zh_word}是什么?", f"{y}的{zh_word}有什么?", f"{y}{zh_word}是什么图形?")
        forms += (f"在{y}的{zh_word}的是什么?", f"哪个图形在{y}的{zh_word}?")
        held = (f"什么东西在{y}的{zh_word}?",)
        return rng.choice(held if held_out else forms), f"{noun(found[0], 'zh')}。"
    short = {"to the left of": "left of", "to the right of": "right of"}.get(en, en)
    forms = (f"What is {en} {y}?", f"What is {short} {y}?", f"Which shape is {en} {y}?")
    forms += (
        f"What can you see {en} {y}?",
        f"Name the shape {en} {y}.",
        f"Which object lies {short} {y}?",
    )
    held = (f"What do you see {en} {y}?",)
    return rng.choice(held if held_out else forms), _sentence(noun(found[0], "en"))


def _digit(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    numbers = [t for t in scene.texts if t.is_number]
    if not numbers:
        return None
    return _phrase(rng, "digit", lang, held_out), numbers[0].text + ("。" if lang == "zh" else ".")


def _word(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    if not scene.texts:
        return None
    text = scene.texts[0].text
    if lang == "zh":
        forms = (
            "写的是什么?",
            "读出图中的文字。",
            "图上写了什么?",
            "图里的单词是什么?",
            "图片上的文字是什么?",
        )
        return rng.choice(forms), f"写的是“{text}”。"
    forms = ("Read the text.", "What does it say?", "What is written?", "What word is written?")
    forms += (
        "What is the word?",
        "Read the word.",
        "What does the text say?",
        "What text is in the image?",
    )
    return rng.choice(forms), f'It says "{text}".'


def _exists(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    if scene.place:
        return None
    name, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if scene.shapes and rng.random() < 0.6:
        like = rng.choice(scene.shapes)
        name, colour = like.name, like.colour
        name = name if rng.random() < 0.7 else rng.choice(scene.shapes).name
    with_colour = rng.random() < 0.6
    here = any(s.name == name and (s.colour == colour or not with_colour) for s in scene.shapes)
    if lang == "zh":
        what = f"{ZH_COLOURS[colour]}的{ZH_SHAPES[name]}" if with_colour else ZH_SHAPES[name]
        forms = (f"有{what}吗?", f"图中有{what}吗?", f"图里有没有{what}?", f"你看到{what}了吗?")
        return rng.choice(forms), "有。" if here else "没有。"
    what = _article(f"{colour} {name}" if with_colour else name)
    forms = (
        f"Is there {what}?",
        f"Is there {what} in the picture?",
        f"Do you see {what}?",
        f"Can you see {what}?",
    )
    return rng.choice(forms), "Yes." if here else "No."


def _absent(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """A question about a thing that is not there."""
    if scene.place:
        return None
    zh = lang == "zh"
    if not scene.texts and rng.random() < 0.25:
        if rng.random() < 0.6:
            return _phrase(
                rng, "digit", lang, False
            ), "图中没有数字。" if zh else "There is no number."
        question = rng.choice(("Read the text.", "What is written?", "What word is written?"))
        return ("图里的单词是什么?", "图中没有文字。") if zh else (question, "There is no text.")
    name = rng.choice(SHAPES)
    if any(s.name == name for s in scene.shapes):
        return None
    category = rng.choice(("colour", "position"))
    subject = ZH_SHAPES[name] if zh else f"the {name}"
    answer = f"图中没有{ZH_SHAPES[name]}。" if zh else f"There is no {name}."
    return _phrase(rng, category, lang, False, x=subject), answer


def _size(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    zh = lang == "zh"
    if len(scene.shapes) < 2 or scene.texts:
        return None
    order = ("small", "medium", "large")
    ranked = sorted(scene.shapes, key=lambda s: order.index(s.size))
    if rng.random() < 0.5:
        if ranked[-1].size == ranked[-2].size:
            return None
        question = (
            rng.choice(("哪个图形最大?", "最大的图形是什么?"))
            if zh
            else rng.choice(
                (
                    "Which shape is the largest?",
                    "What is the biggest shape?",
                    "Which shape is the biggest?",
                )
            )
        )
        best = ranked[-1]
    else:
        if ranked[0].size == ranked[1].size:
            return None
        question = (
            rng.choice(("哪个图形最小?", "最小的图形是什么?"))
            if zh
            else rng.choice(("Which shape is the smallest?", "What is the smallest shape?"))
        )
        best = ranked[0]
    return question, f"{noun(best, 'zh')}。" if zh else _sentence(noun(best, "en"))


def _background(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    if not scene.background or scene.place:
        return None
    if lang == "zh":
        return rng.choice(
            ("背景是什么颜色?", "背景的颜色是什么?")
        ), f"{ZH_COLOURS[scene.background]}。"
    forms = (
        "What color is the background?",
        "What is the background color?",
        "Which colour is the background?",
    )
    return rng.choice(forms), _sentence(scene.background)


def _list(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    zh = lang == "zh"
    question = rng.choice(LIST[lang])
    if scene.place:
        kind = PLACES_ZH[scene.kind] if zh else _article(scene.kind)
        return question, f"{kind}。" if zh else _sentence(kind)
    if not scene.shapes and not scene.texts:
        return question, description(scene, lang)
    items = [noun(s, lang) for s in in_reading_order(scene)]
    for text in scene.texts:
        if text.is_number:
            items.append(f"数字{text.text}" if zh else f"the number {text.text}")
        else:
            items.append(f"单词“{text.text}”" if zh else f'the word "{text.text}"')
    return question, f"{'、'.join(items)}。" if zh else _sentence(_join(items))


def _describe(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    return describe(scene, rng, lang)


def _verify(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'Is the star red?'"""
    if not scene.shapes:
        return None
    shape = rng.choice(scene.shapes)
    if not _only([s for s in scene.shapes if s.name == shape.name]):
        return None
    colour = shape.colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
    yes = colour == shape.colour
    if lang == "zh":
        return (
            f"{_named(rng, lang, shape)}是{ZH_COLOURS[colour]}的吗?",
            "是的。" if yes else "不是。",
        )
    return f"Is {_named(rng, lang, shape)} {colour}?", "Yes." if yes else "No."


def _either_colour(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'Is the circle red or blue?'"""
    if not scene.shapes:
        return None
    shape = rng.choice(scene.shapes)
    if not _only([s for s in scene.shapes if s.name == shape.name]):
        return None
    pair = [shape.colour, rng.choice([c for c in COLOURS if c != shape.colour])]
    rng.shuffle(pair)
    if lang == "zh":
        one, two = (ZH_COLOURS[c] for c in pair)
        return f"{_named(rng, lang, shape)}是{one}还是{two}?", f"{ZH_COLOURS[shape.colour]}。"
    return f"Is {_named(rng, lang, shape)} {pair[0]} or {pair[1]}?", _sentence(shape.colour)


def _any_of_colour(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'Is there anything green?'"""
    if not scene.shapes or scene.texts:
        return None
    colour = rng.choice([c for c in COLOURS if c != scene.background])
    if rng.random() < 0.5:
        colour = rng.choice(scene.shapes).colour
    here = any(s.colour == colour for s in scene.shapes)
    if lang == "zh":
        word = ZH_COLOURS[colour]
        forms = (f"有{word}的东西吗?", f"图里有{word}的图形吗?")
        return rng.choice(forms), "有。" if here else "没有。"
    forms = (
        f"Is there anything {colour}?",
        f"Are there any {colour} things?",
        f"Do you see something {colour}?",
    )
    forms += (f"Are there any {colour} shapes?", f"Are any of the shapes {colour}?")
    return rng.choice(forms), "Yes." if here else "No."


def _on_side(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'What is on the right?', where one shape alone is there."""
    if not scene.shapes or scene.texts:
        return None
    found = _in_cell(scene, rng)
    if not found:
        return None
    shape, cell = found
    beside = {1: (1, 0), 3: (0, 0), 5: (0, 2), 7: (1, 2)}.get(cell)  # (axis, third) of a side
    if beside and any(
        o is not shape and int((o.x, o.y)[beside[0]] * 3) == beside[1] for o in scene.shapes
    ):
        return None
    where = CELLS[cell]
    if lang == "zh":
        return rng.choice((f"{where[2]}是什么?", f"{where[2]}有什么?")), f"{noun(shape, 'zh')}。"
    side = (
        f" {rng.choice(('side', 'side of the picture', 'half'))}"
        if cell in (3, 5) and rng.random() < 0.4
        else ""
    )
    forms = (
        f"What is {where[1]}{side}?",
        f"What do you see {where[1]}{side}?",
        f"What's {where[1]}{side}?",
    )
    return rng.choice(forms), _sentence(noun(shape, "en"))


def _colours(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'How many colors are there?' and 'Which colors do you see?', of the shapes."""
    if not scene.shapes or scene.texts:
        return None
    seen = list(dict.fromkeys(s.colour for s in in_reading_order(scene)))
    if lang == "zh":
        if rng.random() < 0.5:
            return "图形有几种颜色?", f"{len(seen)}种。"
        return rng.choice(
            ("图形有哪些颜色?", "有哪些颜色?")
        ), f"{'、'.join(ZH_COLOURS[c] for c in seen)}。"
    if rng.random() < 0.5:
        return rng.choice(
            ("How many colors do the shapes have?", "How many colors are there?")
        ), f"{len(seen)}."
    return rng.choice(("Which colors do you see?", "What colors are the shapes?")), _sentence(
        _join(seen)
    )


def _describe_across(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """A description wished for in the other language."""
    if lang == "zh":
        return rng.choice(("用英文描述这张图片。", "请用英语描述图片。")), description(scene, "en")
    forms = (
        "Describe the picture in Chinese.",
        "Describe this image in Chinese.",
        "describe the picture in chinese",
        "In Chinese: what is in this picture?",
        "Tell me in Chinese what you see.",
        "What do you see? Answer in Chinese.",
    )
    return rng.choice(forms), description(scene, "zh")


def _outermost(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """'Which shape is farthest to the left?'"""
    if len(scene.shapes) < 2 or scene.texts:
        return None
    name = rng.choice(list(RELATIONS))
    axis, sign, _, _ = RELATIONS[name]
    ranked = sorted(scene.shapes, key=lambda s: sign * (s.x, s.y)[axis], reverse=True)
    if abs((ranked[0].x, ranked[0].y)[axis] - (ranked[1].x, ranked[1].y)[axis]) < 0.07:
        return None
    if lang == "zh":
        side = {"left": "最左边", "right": "最右边", "above": "最上面", "below": "最下面"}[name]
        return rng.choice((f"{side}是什么?", f"{side}的图形是什么?")), f"{noun(ranked[0], 'zh')}。"
    side = {"left": "leftmost", "right": "rightmost", "above": "topmost", "below": "lowest"}[name]
    forms = (
        f"What is the {side} shape?",
        f"Which shape is the {side}?",
        f"What is the {side} object?",
    )
    return rng.choice(forms), _sentence(noun(ranked[0], "en"))


def _story(scene: Scene, rng: random.Random, lang: str, held_out: bool) -> Asked:
    """A very short story about what is drawn."""
    zh = lang == "zh"
    if zh:
        request = rng.choice(
            ("看图讲一个故事。", "根据这张图片讲个故事。", "讲一个关于这张图的故事。")
        )
    else:
        forms = ("Tell me a story about this picture.", "Make up a story about this image.")
        forms += ("Write a story for this picture.", "Tell a story about what you see.")
        request = rng.choice(forms)
    heroes = _heroes(scene, lang)
    if not heroes:
        nothing = (
            "图里没有我认识的东西,讲不出故事。"
            if zh
            else "I see nothing here that I could tell a story about."
        )
        return request, nothing
    if len(heroes) == 1:
        x = heroes[0]
        if zh:
            return (
                request,
                f"从前有{x[0]}。{x[1]}想看看外面的世界,可是又有点害怕。有一天,{x[1]}勇敢地出发了,交到了很多朋友。",
            )
        tale = f"Once there was {x[0]}. {x[1][0].upper()}{x[1][1:]} wanted to see the world but was a little afraid."
        return request, tale + f" One day {x[1]} set out all the same and found many friends."
    x, y = heroes[:2]
    if zh:
        tale = (
            f"从前有{x[0]}和{y[0]}。{x[1]}觉得很孤单,就去找{y[1]}玩。他们一起玩到天黑,成了好朋友。"
        )
        return request, tale
    tale = f"Once there was {x[0]} and {y[0]}. One day {x[1]} felt lonely and went to see {y[1]}."
    return request, tale + " They played together until it grew dark, and they became good friends."


def _heroes(scene: Scene, lang: str) -> list[tuple[str, str]]:
    """Up to two different things of the picture: how a story introduces them and calls them then."""
    zh = lang == "zh"
    found = []
    if scene.place:
        name = PLACES_ZH[scene.kind] if zh else scene.kind
        one = {
            "house": "一座",
            "car": "一辆",
            "tree": "一棵",
            "face": "一张",
            "flower": "一朵",
            "boat": "一条",
        }
        found.append((one[scene.kind] + name, name) if zh else (_article(name), f"the {name}"))
        if "sun" in scene.place:
            found.append(("太阳", "太阳") if zh else ("the sun", "the sun"))
    for s in in_reading_order(scene):
        word = noun(s, "zh") if zh else f"{s.colour} {s.name}"
        found.append((f"一个{word}", word) if zh else (_article(word), f"the {word}"))
    for text in scene.texts:
        kind = ("数字" if zh else "number ") if text.is_number else ("单词" if zh else "word ")
        shown = text.text if text.is_number else (f"“{text.text}”" if zh else f'"{text.text}"')
        found.append((f"{kind}{shown}",) * 2 if zh else (f"the {kind}{shown}",) * 2)
    return list(dict.fromkeys(found))[:2]


_MAKERS: dict[str, Callable[[Scene, random.Random, str, bool], Asked]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "digit": _digit,
    "word": _word,
    "exists": _exists,
    "absent": _absent,
    "size": _size,
    "background": _background,
    "list": _list,
    "describe": _describe,
    "verify": _verify,
    "either_colour": _either_colour,
    "any_of_colour": _any_of_colour,
    "on_side": _on_side,
    "colours": _colours,
    "describe_across": _describe_across,
    "outermost": _outermost,
    "story": _story,
}
_WEIGHTS = {
    "colour": 11,
    "shape": 16,
    "count": 17,
    "position": 18,
    "relation": 80,
    "digit": 20,
    "word": 10,
    "exists": 5,
    "absent": 4,
    "size": 15,
    "background": 3,
    "list": 6,
    "describe": 4,
    "verify": 8,
    "either_colour": 7,
    "any_of_colour": 4,
    "on_side": 8,
    "colours": 3,
    "describe_across": 3,
    "outermost": 12,
    "story": 4,
}
