"""Short stories with a beginning, a problem, a way out and a moral, in English and simplified Chinese.

A story is put together from sentence variants around two named characters. The request names some
of its parts (a character, an animal, a thing, a place); whatever it names, the story keeps.
"""

# ruff: noqa: SIM905 - word lists read better as one string

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from assets.demo_training.chinese import full_width

GIRLS = (
    "Mia Anna Lily Zoe Ella Emma Lucy Ruby Nora Ivy Clara Maya Rosa Alice Grace Julia Sara Nina Hana Lena Iris "
    "Eva Amy Kate Mei Ana Yuki Fatima Bella Daisy Luna Molly Sophie Emily Hannah Priya Elena Greta Frida Hazel "
    "Willow Rosie Poppy Nala Olivia Ava Chloe Leah Stella Violet Penny Wendy Tina Linda Mary"
).split()
BOYS = (
    "Leo Ben Tom Max Sam Noah Jack Oscar Finn Hugo Theo Owen Felix Milo Henry Peter Adam Luke Eric Omar Paul "
    "David Simon Jonas Ravi Carlos Ali Toby Charlie Oliver Daniel George Amir Marco Bruno Otto Teddy Jasper "
    "Archie Alfie Liam Lucas Ethan James John Mark Nick Will Harry Fred Kevin Jim Bob Ken"
).split()
PETS = "Bo Pip Coco Rex Buddy Simba Kiki Momo Sunny Biscuit Ling Kim Spot Fluffy Rusty Shadow Ginger Pepper".split()
EN_NAMES = (*GIRLS, *BOYS, *PETS)
ZH_NAMES = (
    "小明 小红 小华 小丽 小刚 小美 小雨 小雪 小龙 小虎 小芳 小军 小亮 小月 小星 小云 明明 乐乐 天天 "
    "安安 欢欢 豆豆 贝贝 圆圆 佳佳 丽丽 阿宝 阿花 阿福 可可 朵朵 多多 毛毛 妞妞 东东 晨晨 思思 晓峰 "
    "小兰 小杰 小米 小白 小黑 点点 米米 球球 笑笑 果果 糖糖 冬冬 琪琪 李雷 韩梅梅 王芳 张伟 刘洋 陈静"
).split()
ANIMALS = {
    "fox": "狐狸",
    "rabbit": "兔子",
    "bear": "小熊",
    "cat": "小猫",
    "dog": "小狗",
    "owl": "猫头鹰",
    "turtle": "乌龟",
    "mouse": "老鼠",
    "duck": "鸭子",
    "squirrel": "松鼠",
    "hedgehog": "刺猬",
    "bird": "小鸟",
    "frog": "青蛙",
    "lion": "狮子",
    "elephant": "大象",
    "panda": "熊猫",
    "penguin": "企鹅",
    "horse": "小马",
    "dragon": "小龙",
    "robot": "机器人",
    "monkey": "猴子",
    "tiger": "老虎",
    "sheep": "小羊",
    "whale": "鲸鱼",
    "bee": "蜜蜂",
    "wolf": "小狼",
    "pig": "小猪",
    "cow": "奶牛",
    "chicken": "小鸡",
    "goat": "山羊",
    "dolphin": "海豚",
    "snail": "蜗牛",
    "unicorn": "独角兽",
    "kitten": "小花猫",
    "puppy": "小狗狗",
}
PEOPLE = {  # kind -> Chinese, pronoun
    "girl": ("小女孩", "she"),
    "boy": ("小男孩", "he"),
    "princess": ("公主", "she"),
    "prince": ("王子", "he"),
    "queen": ("女王", "she"),
    "king": ("国王", "he"),
    "knight": ("骑士", "he"),
    "wizard": ("魔法师", "he"),
    "witch": ("女巫", "she"),
    "pirate": ("海盗", "he"),
    "farmer": ("农夫", "he"),
    "teacher": ("老师", "she"),
    "sailor": ("水手", "he"),
    "astronaut": ("宇航员", "she"),
    "grandmother": ("老奶奶", "she"),
    "grandfather": ("老爷爷", "he"),
}
PLACES = {
    "in the forest": "森林里",
    "in a small village": "小村庄里",
    "in the mountains": "山里",
    "in a house by the sea": "海边的小屋里",
    "in a quiet town": "安静的小镇上",
    "on a farm": "农场里",
    "in an old castle": "古老的城堡里",
    "in a green valley": "绿色的山谷里",
    "in a big city": "大城市里",
    "on an island": "小岛上",
    "in a garden": "花园里",
    "in the desert": "沙漠里",
    "on a boat": "一条船上",
    "at the school": "学校里",
    "on the moon": "月亮上",
}
THINGS = {
    "kite": "风筝",
    "ball": "皮球",
    "hat": "帽子",
    "key": "钥匙",
    "book": "书",
    "lamp": "灯",
    "bell": "铃铛",
    "boat": "小船",
    "map": "地图",
    "drum": "小鼓",
    "scarf": "围巾",
    "umbrella": "雨伞",
    "toy": "玩具",
    "flute": "笛子",
    "coin": "硬币",
    "bicycle": "自行车",
    "star": "星星",
    "flower": "花",
    "box": "盒子",
}
WEATHER = {"sunny": "晴朗", "windy": "有风", "rainy": "下雨", "cold": "寒冷", "warm": "温暖"}

# Each plot is a list of sentences, each sentence a tuple of variants.
# {h} hero, {f} friend, {hk}/{fk} what they are, {t} thing, {p} place, {he}/{his}/{him} of the hero.
EN_OPENINGS = (
    "Once upon a time, {hk} named {h} lived {p}.",
    "{P} there lived {hk} called {h}.",
    "{h} was {hk} who lived {p}.",
    "Long ago, {p}, there was {hk} named {h}.",
)
EN_FRIENDS = (
    "{His} best friend was {f}, {fk}.",
    "{h} had a good friend, {fk} named {f}.",
    "Every day {he} played with {f}, {fk}.",
    "Next door lived {f}, {fk}, and the two were always together.",
)
EN_PLOTS = (
    (
        (
            "One {w} morning {h} could not find {his} {t}.",
            "One {w} day {his} favorite {t} was gone.",
        ),
        (
            "{He} looked under the bed and behind the door, but it was not there.",
            "{He} searched everywhere and felt very sad.",
        ),
        (
            '"Do not worry," said {f}. "We will look together."',
            '"I will help you," said {f}, and they set out at once.',
        ),
        (
            "They followed small tracks down to the river.",
            "They asked every neighbor and walked along the old path.",
        ),
        (
            "At last {f} saw the {t} high up in a tree.",
            "At last {f} found the {t} behind a big stone.",
        ),
        ("{h} laughed and hugged {f}.", "{h} was so happy that {he} danced with {f}."),
        (
            "From then on they knew that a friend makes every search shorter.",
            "That day {h} learned that nobody has to search alone.",
        ),
    ),
    (
        (
            "One {w} afternoon dark clouds came over the hills.",
            "One evening a great storm came up.",
        ),
        (
            "The wind was so strong that the door flew open.",
            "Rain fell and thunder shook the windows.",
        ),
        ("{f} was afraid and hid in a corner.", "{f} trembled and did not want to come out."),
        (
            "{h} lit a lamp and sat down beside {f}.",
            "{h} took {f} a warm blanket and told a funny tale.",
        ),
        (
            "Together they counted the seconds between lightning and thunder.",
            "They sang every song they knew until the rain grew quiet.",
        ),
        (
            "In the morning a rainbow stood in the sky.",
            "When the sun came back, the air smelled of flowers.",
        ),
        (
            "{f} said that being brave is easier with someone at your side.",
            "Since then {f} has never been afraid of storms, because {h} is near.",
        ),
    ),
    (
        (
            "One day there was a big race, and everybody wanted to win a golden {t}.",
            "In spring everyone met for a race, and the prize was a {t}.",
        ),
        (
            "{h} ran as fast as {he} could and was soon far ahead.",
            "{h} had trained for weeks and took the lead.",
        ),
        (
            "Then {he} heard a cry: {f} had fallen into a ditch.",
            "Halfway {he} saw that {f} had hurt a leg.",
        ),
        (
            "{h} stopped at once and ran back to help.",
            "{h} did not think of the prize and turned around.",
        ),
        (
            "Side by side they walked slowly to the finish.",
            "{h} held {f} all the way to the finish line.",
        ),
        (
            "They came last, but everyone clapped and gave them the {t}.",
            "They were the last ones, yet the crowd cheered the loudest for them.",
        ),
        (
            "A kind heart is worth more than first place.",
            "{h} learned that helping is better than winning.",
        ),
    ),
    (
        (
            "One day {h} found an old {t} in the grass.",
            "While digging in the garden, {h} found a strange {t}.",
        ),
        ("It shone softly and began to hum.", "When {he} touched it, it started to glow."),
        (
            '"It is magic," whispered {f}. "Make a wish!"',
            '{f} said, "It will grant one wish. Think well!"',
        ),
        (
            "{h} thought about toys and sweets, but then {he} saw that the well was dry.",
            "{h} wanted many things, but {he} knew that the flowers had no water.",
        ),
        ("So {he} wished for rain.", '"I wish for rain for everyone," {he} said.'),
        (
            "Soon drops began to fall, and everything around turned green.",
            "It rained all night, and in the morning everything was in bloom.",
        ),
        (
            "{h} and {f} smiled, for a wish that is shared makes everyone happy.",
            "And {f} said it was the best wish of all.",
        ),
    ),
    (
        (
            "One {w} day {h} baked a big cake.",
            "One {w} morning {h} picked a basket full of apples.",
        ),
        (
            "{He} wanted to eat it all alone and hid behind the house.",
            "{He} did not want to share and closed the door.",
        ),
        ("But alone it did not taste so good.", "But after a while {he} felt lonely."),
        (
            "Outside {f} was sitting with an empty plate.",
            "Through the window {he} saw {f}, who was hungry.",
        ),
        (
            '{h} opened the door and called, "Come in, {f}! There is enough for two."',
            "{h} cut everything in half and gave {f} the bigger piece.",
        ),
        (
            "They ate, told jokes and laughed until evening.",
            "{f} brought a {t} as a present, and they played until dark.",
        ),
        ("Food tastes best when it is shared.", "{h} never ate alone again."),
    ),
    (
        (
            "One night {h} could not sleep because it was so dark.",
            "{h} was afraid of the dark and lay awake.",
        ),
        (
            "{He} heard a strange noise outside the window.",
            "Something went tap, tap, tap at the door.",
        ),
        (
            "{He} called {f}, and together they took a small lamp.",
            '{f} came with a {t} and said, "Let us go and see."',
        ),
        ("Step by step they went out into the night.", "Slowly they opened the door."),
        (
            "It was only a little branch that tapped in the wind.",
            "It was only a tiny bird that had lost its nest.",
        ),
        (
            "They laughed, and then {f} showed {h} the stars.",
            "Then they sat down and looked at the moon.",
        ),
        (
            "Since that night {h} has loved the dark, because that is when the stars come out.",
            "{h} learned that most fears get small when you look at them.",
        ),
    ),
    (
        ("One day the bridge over the river broke.", "After the long rain the bridge was gone."),
        (
            "On the other side was {f}, who could not get home.",
            "Now {f} could not come over to play.",
        ),
        (
            "{h} tried to jump, but the river was too wide.",
            "{h} threw a rope, but it was too short.",
        ),
        (
            "Then {he} had an idea and asked all the neighbors for wood.",
            "Then {he} remembered an old {t} and made a plan.",
        ),
        (
            "They worked all day, one on each side.",
            "Everybody helped, the big ones and the small ones.",
        ),
        (
            "When the sun went down, the new bridge was ready.",
            "In the evening {h} and {f} met in the middle of the new bridge.",
        ),
        ("Many hands make hard work light.", "What one cannot do alone, many can do together."),
    ),
    (
        (
            "{h} wanted to build a {t}, but it always fell apart.",
            "{h} wanted to draw a {t}, but it never looked right.",
        ),
        ("Some of the others laughed at {him}.", "{He} tried ten times and wanted to give up."),
        (
            '"Try once more," said {f}. "I will stay with you."',
            '{f} said, "Everyone starts small. Try again tomorrow."',
        ),
        (
            "So {h} practiced every day, even when it was {w}.",
            "Every morning {h} practiced a little, and {f} listened.",
        ),
        ("After a week it went a little better.", "Little by little it got better."),
        (
            "At the summer fair {h} showed what {he} could do, and all were amazed.",
            "At last it worked, and {f} cheered the loudest.",
        ),
        ("Those who keep trying get there in the end.", "{h} was proud, and {f} was proud too."),
    ),
    (
        ("One day a newcomer arrived: it was {f}.", "One {w} day {f} moved in next door."),
        (
            "{f} was shy and did not talk to anyone.",
            "Nobody knew {f}, and {f} sat alone under a tree.",
        ),
        (
            '{h} went over and said, "Hello! Do you want to play?"',
            "{h} took {his} {t}, walked over and smiled.",
        ),
        ("At first {f} only nodded.", "{f} looked up and was surprised."),
        (
            "Then they built a little house out of branches.",
            "Then they played with the {t} until the sun went down.",
        ),
        ("By evening they were the best of friends.", "When it grew dark, {f} was laughing."),
        ("Sometimes one friendly word is enough.", "A smile is the shortest way to a friend."),
    ),
)
ZH_OPENINGS = (
    "从前,{p}住着{hk},名字叫{h}。",
    "很久以前,{p}有{hk},叫{h}。",
    "{h}是{hk},住在{p}。",
)
ZH_FRIENDS = (
    "{h}最好的朋友是{fk},叫{f}。",
    "{h}有一个好朋友,是{fk},名字叫{f}。",
    "{h}每天都和{f}一起玩,{f}是{fk}。",
)
ZH_PLOTS = (
    (
        ("一个{w}的早上,{h}发现自己的{t}不见了。", "有一天,{h}的{t}丢了。"),
        ("{h}找遍了屋子,也没有找到。", "{h}到处找,心里很难过。"),
        ("{f}说:“别担心,我们一起找。”", "{f}说:“我来帮你。”"),
        ("他们沿着小路走到河边。", "他们问了每一位邻居。"),
        ("最后,{f}在一棵大树上看见了{t}。", "最后,{f}在石头后面找到了{t}。"),
        ("{h}高兴地抱住了{f}。", "{h}开心得跳了起来,谢谢{f}。"),
        ("有朋友帮忙,困难就会变小。", "从此{h}知道,有朋友真好。"),
    ),
    (
        ("一天晚上,忽然刮起了大风。", "有一天,天上来了很多黑云。"),
        ("雨下得很大,还打起了雷。", "雷声很响,窗户都在抖。"),
        ("{f}很害怕,躲在角落里。", "{f}吓得不敢出来。"),
        ("{h}点亮了一盏灯,坐在{f}身边。", "{h}给{f}讲了一个有趣的故事。"),
        ("他们一起唱歌,一直唱到雨停。", "他们一起数雷声,慢慢就不怕了。"),
        ("第二天早上,天上出现了一道彩虹。", "太阳出来了,空气里有花的香味。"),
        ("{f}说:“有你在,我就不怕了。”", "在一起,就会变得勇敢。"),
    ),
    (
        (
            "有一天,大家举行跑步比赛,奖品是一个{t}。",
            "春天来了,大家一起比赛跑步,赢的人可以得到{t}。",
        ),
        ("{h}跑得很快,跑在最前面。", "{h}练习了很久,一开始就领先。"),
        ("忽然,{h}听见{f}摔倒了。", "跑到一半,{h}看见{f}的脚受伤了。"),
        ("{h}马上停下来,跑回去帮忙。", "{h}没有想奖品,转身回去扶{f}。"),
        ("他们一起慢慢走到了终点。", "{h}扶着{f}走完了全程。"),
        ("虽然他们是最后到的,大家都为他们鼓掌。", "大家把{t}送给了他们两个。"),
        ("帮助别人比得第一更重要。", "善良的心最珍贵。"),
    ),
    (
        ("有一天,{h}在草地上捡到一个旧{t}。", "{h}在花园里发现了一个奇怪的{t}。"),
        ("它发出了柔和的光。", "{h}一碰它,它就亮了起来。"),
        ("{f}小声说:“这是魔法,快许一个愿望吧!”", "{f}说:“它可以实现一个愿望,好好想一想。”"),
        ("{h}想要很多东西,可是看见花都干了。", "{h}想了很久,想到大家都没有水喝。"),
        ("于是{h}许愿下一场雨。", "{h}说:“我希望下雨,让大家都有水。”"),
        ("不久,雨下了起来,到处都变绿了。", "第二天早上,花都开了。"),
        ("分享的愿望让大家都快乐。", "{f}说,这是最好的愿望。"),
    ),
    (
        ("一个{w}的日子,{h}做了一个大蛋糕。", "有一天,{h}摘了一篮子苹果。"),
        ("{h}想一个人吃,就躲到了屋子后面。", "{h}不想分给别人,关上了门。"),
        ("可是一个人吃,一点也不香。", "可是过了一会儿,{h}觉得很孤单。"),
        ("这时{h}看见{f}坐在外面,肚子很饿。", "{h}从窗户看见了{f}。"),
        ("{h}打开门说:“{f},快进来,我们一起吃吧!”", "{h}把大的一半分给了{f}。"),
        ("他们一边吃一边笑,一直到天黑。", "{f}送给{h}一个{t},他们玩得很开心。"),
        ("分享让食物更好吃。", "从此{h}再也不一个人吃东西了。"),
    ),
    (
        ("{h}很想做一个{t},可是总是做不好。", "{h}想学一样新本领,可是怎么也做不好。"),
        ("有人笑话{h}。", "{h}试了十次,想放弃了。"),
        ("{f}说:“再试一次,我陪你。”", "{f}说:“每个人都是从小步开始的。”"),
        ("于是{h}每天都练习。", "{h}每天早上都练一会儿,{f}在旁边看着。"),
        ("过了一个星期,好了一点。", "慢慢地,{h}越来越好。"),
        ("最后{h}成功了,大家都很惊讶。", "夏天的时候,{h}表演给大家看,{f}的掌声最响。"),
        ("坚持下去,就会成功。", "只要努力,就有收获。"),
    ),
    (
        ("有一天,{f}搬到了这里。", "一个{w}的日子,来了一位新朋友,就是{f}。"),
        ("{f}很害羞,不跟别人说话。", "没有人认识{f},{f}一个人坐在树下。"),
        ("{h}走过去说:“你好!一起玩吧?”", "{h}拿着{t}走过去,笑了笑。"),
        ("{f}一开始只是点点头。", "{f}抬起头,觉得很惊讶。"),
        ("后来他们一起盖了一座小房子。", "后来他们一起玩到太阳下山。"),
        ("到了晚上,他们成了最好的朋友。", "天黑的时候,{f}笑了。"),
        ("一句友好的话,就能带来一个朋友。", "微笑是通向朋友的路。"),
    ),
)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    hero: str
    hero_kind: str  # "girl", "boy" or an animal, in English
    friend: str
    friend_kind: str
    thing: str
    place: str


def story_request(rng: random.Random, lang: str) -> tuple[str, str, list[str]]:
    """A request, the story that answers it and the names that the request fixes."""
    request, fixed, cast = _asked_and_cast(rng, lang)
    return full_width(request), tell(rng, lang, cast), fixed


def tell(rng: random.Random, lang: str, cast: Cast, short: bool = False) -> str:
    """The story; `short` keeps the beginning, one turn and the end."""
    zh = lang == "zh"
    plot = list(rng.choice(ZH_PLOTS if zh else EN_PLOTS))
    if short:
        plot = [plot[0], plot[2], plot[5]]
    newcomer = plot[0][0].startswith(("有一天,{f}搬", "One day a newcomer"))
    opening = [rng.choice(ZH_OPENINGS if zh else EN_OPENINGS)]
    if not newcomer:
        opening.append(rng.choice(ZH_FRIENDS if zh else EN_FRIENDS))
    sentences = opening + [rng.choice(variants) for variants in plot]
    weather = rng.choice(list(WEATHER))
    if zh:
        words = {"p": PLACES[cast.place], "t": THINGS[cast.thing], "w": WEATHER[weather]}
        words |= {"hk": _zh_kind(cast.hero_kind), "fk": _zh_kind(cast.friend_kind)}
    else:
        he, his, him = _pronouns(cast.hero_kind)
        words = {
            "p": cast.place,
            "P": cast.place.capitalize(),
            "t": cast.thing,
            "w": weather,
            "he": he,
            "his": his,
            "him": him,
        }
        words |= {"He": he.capitalize(), "His": his.capitalize()}
        words |= {"hk": _en_kind(cast.hero_kind, rng), "fk": _en_kind(cast.friend_kind, rng)}
    sentences = [s.format(h=cast.hero, f=cast.friend, **words) for s in sentences]
    return full_width(("" if zh else " ").join(sentences))


def _cast(rng: random.Random, lang: str) -> Cast:
    hero, friend = name(rng, lang), name(rng, lang)
    while friend == hero:
        friend = name(rng, lang)
    hero_kind = _kind(rng, hero, people=0.6)
    friend_kind = _kind(rng, friend, people=0.3)
    return Cast(
        hero, hero_kind, friend, friend_kind, rng.choice(list(THINGS)), rng.choice(list(PLACES))
    )


def _unnamed(rng: random.Random, lang: str) -> Cast:
    return _with_own_names(rng, lang, _cast(rng, lang), [])


def _kind(rng: random.Random, who: str, people: float) -> str:
    """An animal, or a person that suits the name."""
    if rng.random() > people or who in PETS:
        return rng.choice(list(ANIMALS))
    pronoun = "she" if who in GIRLS else "he" if who in BOYS else rng.choice(("she", "he"))
    if rng.random() < 0.65:
        return "girl" if pronoun == "she" else "boy"
    return rng.choice([kind for kind, (_, word) in PEOPLE.items() if word == pronoun])


def _with_own_names(rng: random.Random, lang: str, cast: Cast, fixed: list[str]) -> Cast:
    """Names that the request leaves open come from two short lists, so they never meet."""
    if cast.friend in fixed:
        return cast
    friend = rng.choice(ZH_NAMES[34:] if lang == "zh" else PETS)
    hero = cast.hero
    if hero not in fixed:
        woman = _pronouns(cast.hero_kind)[0] == "she" or (
            cast.hero_kind in ANIMALS and rng.random() < 0.5
        )
        hero = rng.choice(ZH_NAMES[:34] if lang == "zh" else (GIRLS if woman else BOYS)[:20])
    if friend == hero:
        friend = "豆丁" if lang == "zh" else "Button"
    return replace(cast, hero=hero, friend=friend)


def name(rng: random.Random, lang: str) -> str:
    """A usual name, or as often a made-up one: names are to be copied, not guessed."""
    if rng.random() < 0.45:
        return rng.choice(ZH_NAMES if lang == "zh" else EN_NAMES)
    if lang == "zh":
        first = rng.choice(
            "小阿大老王李张刘陈林黄周吴徐孙马朱胡郭何高罗"
            if rng.random() < 0.6
            else _common_hanzi()
        )
        given = (
            "明丽华芳强军敏静伟洋勇艳杰娟涛超秀霞平刚桂英玉兰飞云雷宁"
            if rng.random() < 0.3
            else _common_hanzi()
        )
        return first + "".join(rng.choice(given) for _ in range(rng.randint(1, 2)))
    starts = (
        "B C D F G H J K L M N P R S T V W Z Ch Sh Th Br Cr Dr Fr Gr Kl Pl St Sw Tr Wh Qu".split()
    )
    middles = "a e i o u a e i o u ee oo ai ea ou ie".split()
    ends = [
        "",
        "",
        "n",
        "l",
        "s",
        "x",
        "r",
        "t",
        "k",
        "d",
        "m",
        "ck",
        "nd",
        "lf",
        "ng",
        "rt",
        "ny",
        "by",
        "ia",
        "o",
    ]
    made = "".join(
        rng.choice(starts) + rng.choice(middles) for _ in range(rng.randint(1, 3))
    ) + rng.choice(ends)
    if rng.random() < 0.25:
        made = rng.choice("AEIOU") + rng.choice("bdglmnrstvx") + made
    if rng.random() < 0.3:  # two halves of real names
        one, two = rng.choice(EN_NAMES), rng.choice(EN_NAMES)
        made = one[: rng.randint(2, len(one))] + two[rng.randint(0, len(two) - 1) :]
    return made.capitalize()


@lru_cache(maxsize=1)
def _common_hanzi() -> str:
    """The 3,755 usual characters of GB 2312's first level."""
    codes = (bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return "".join(code.decode("gb2312", "ignore") for code in codes)


def _pronouns(kind: str) -> tuple[str, str, str]:
    pronoun = PEOPLE[kind][1] if kind in PEOPLE else "it"
    return {"she": ("she", "her", "her"), "he": ("he", "his", "him"), "it": ("it", "its", "it")}[
        pronoun
    ]


def _en_kind(kind: str, rng: random.Random) -> str:
    word = rng.choice(("little ", "young ", "kind ", "clever ", "")) + kind
    return ("an " if word[0] in "aeiou" else "a ") + word


def _zh_kind(kind: str) -> str:
    if kind in PEOPLE:
        return f"一个{PEOPLE[kind][0]}"
    return {"robot": "一个机器人", "dragon": "一条小龙"}.get(kind) or f"一只{ANIMALS[kind]}"


def _en_request(rng: random.Random, c: Cast) -> tuple[str, list[str]]:
    sort = rng.choice(("", "", "", "short ", "little ", "bedtime ", "funny ", "nice ", "happy "))
    asks = (
        "Tell me a {}story",
        "Tell me a {}story",
        "Write a {}story",
        "Can you tell me a {}story",
        "I want a {}story",
    )
    asks += (
        "Please tell me a {}story",
        "A {}story",
        "Make up a {}story",
        "Could you write a {}story",
    )
    tell_me = rng.choice(asks).format(sort)
    a_hero, a_friend = (
        ("an " if k[0] in "aeiou" else "a ") + k for k in (c.hero_kind, c.friend_kind)
    )
    both, (_, his, _) = [c.hero, c.friend], _pronouns(c.hero_kind)
    forms: list[tuple[str, list[str]]] = [
        ("", []),
        (f" about {c.hero} and {a_friend} named {c.friend}", both),
        (f" about {c.hero} and {a_friend} named {c.friend}", both),
        (f" about {c.hero} and {a_friend} called {c.friend}", both),
        (f" about {a_hero} named {c.hero} and {a_friend} named {c.friend}", both),
        (f" about {a_hero} named {c.hero} and {his} friend {c.friend}", both),
        (f" about {a_hero} called {c.hero}", [c.hero]),
        (f" about {a_hero} named {c.hero}", [c.hero]),
        (f" about {a_hero}", []),
        (f" about {a_hero} and {a_friend}", []),
        (f" about {c.hero} {c.place}", [c.hero]),
        (f" about {a_hero} {c.place}", []),
        (f" with {c.hero} and {c.friend}", both),
    ]
    if c.hero_kind in ("girl", "boy"):
        forms += [(f" about {c.hero}", [c.hero]), (f" about {c.hero} and {c.friend}", both)]
        forms += [(f" about {c.hero} and {his} {c.friend_kind} {c.friend}", both)] * 2
    about, fixed = rng.choice(forms)
    end = "?" if tell_me.startswith("C") else "."
    request = tell_me + about + end
    if rng.random() < 0.15:
        request = request[0].lower() + request[1:].rstrip(".")
    return request, fixed


def _zh_request(rng: random.Random, c: Cast) -> tuple[str, list[str]]:
    hero, friend = (_zh_kind(k)[2:] for k in (c.hero_kind, c.friend_kind))
    both = [c.hero, c.friend]
    forms: list[tuple[str, list[str]]] = [
        ("讲一个故事。", []),
        ("给我讲个故事吧。", []),
        ("请写一个短故事。", []),
        ("讲个睡前故事。", []),
        (f"讲一个关于{c.hero}和{friend}{c.friend}的故事。", both),
        (f"讲一个{c.hero}和{friend}{c.friend}的故事。", both),
        (f"讲一个关于{c.hero}和{c.friend}的故事。", both),
        (f"写一个{hero}{c.hero}和{friend}{c.friend}的故事。", both),
        (f"讲一个关于{c.hero}和叫{c.friend}的{friend}的故事。", both),
        (f"请讲一个关于{hero}{c.hero}的故事。", [c.hero]),
        (f"讲一个关于{c.hero}的故事。", [c.hero]),
        (f"讲一个{c.hero}在{PLACES[c.place]}的故事。", [c.hero]),
        (f"写一个关于{hero}的故事。", []),
        (f"讲一个{hero}和{friend}的故事。", []),
    ]
    request, fixed = rng.choice(forms)
    return request.rstrip("。") if rng.random() < 0.15 else request, fixed


def _asked_and_cast(rng: random.Random, lang: str) -> tuple[str, list[str], Cast]:
    """A request, the names it fixes, and the cast with names of our own for the others."""
    cast = _cast(rng, lang)
    request, fixed = (_zh_request if lang == "zh" else _en_request)(rng, cast)
    return request, fixed, _with_own_names(rng, lang, cast, fixed)


def thing_story(rng: random.Random, lang: str) -> tuple[str, str]:
    """A request that names only a thing, with a story in which the thing matters."""
    while True:
        cast = _unnamed(rng, lang)
        story = tell(rng, lang, cast)
        thing = THINGS[cast.thing] if lang == "zh" else cast.thing
        if story.count(thing) >= 2:
            break
    if lang == "zh":
        return rng.choice((f"讲一个关于{thing}的故事。", f"写一个有{thing}的故事。")), story
    a = ("an " if thing[0] in "aeiou" else "a ") + thing
    if " gone" in story or "not find" in story:
        who = ("an " if cast.hero_kind[0] in "aeiou" else "a ") + cast.hero_kind
        his = _pronouns(cast.hero_kind)[1]
        a = rng.choice(
            (f"a lost {thing}", f"{who} who lost {his} {thing}", f"{who} who lost a {thing}")
        )
    return rng.choice((f"Tell me a story about {a}.", f"Write a short story about {a}.")), story


def story_in(rng: random.Random, asked_in: str, told_in: str) -> tuple[str, str]:
    """A request in one language, a story in the other."""
    request = rng.choice(
        ("讲一个故事。", "给我讲个故事吧。")
        if asked_in == "zh"
        else ("Tell me a story.", "Write a short story.")
    )
    return request, tell(rng, told_in, _unnamed(rng, told_in))


def story_chat(rng: random.Random, lang: str) -> list[tuple[str, str]]:
    """A request and, now and then, a wish that follows it: another one, shorter, the other language."""
    zh = lang == "zh"
    if rng.random() < 0.15:
        turns = [thing_story(rng, lang)]
    else:
        request, _, cast = _asked_and_cast(rng, lang)
        turns = [(request, tell(rng, lang, cast))]
        luck = rng.random()
        if luck < 0.12:
            wish = (
                rng.choice(("短一点。", "能短一些吗?"))
                if zh
                else rng.choice(("Shorter, please.", "Make it shorter.", "A shorter one."))
            )
            turns.append((wish, tell(rng, lang, cast, short=True)))
    luck = rng.random()
    if luck < 0.15:
        wish = (
            rng.choice(("再讲一个。", "还有吗?", "再来一个故事。"))
            if zh
            else rng.choice(("Another one.", "Another one, please!", "One more story."))
        )
        turns.append((wish, tell(rng, lang, _unnamed(rng, lang))))
    elif luck < 0.25:
        other = "en" if zh else "zh"
        wish = (
            rng.choice(("用英文讲一个。", "讲一个英文故事。"))
            if zh
            else rng.choice(("In Chinese, please.", "Tell one in Chinese.", "Now in Chinese."))
        )
        turns.append((wish, tell(rng, other, _unnamed(rng, other))))
    elif luck < 0.35:
        turns.append(
            ("谢谢!", "不客气!")
            if zh
            else (rng.choice(("Thank you!", "Thanks, I liked it.")), "You are welcome!")
        )
    return [(full_width(question), full_width(answer)) for question, answer in turns]
