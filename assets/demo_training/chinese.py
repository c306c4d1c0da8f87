"""Chinese punctuation: the tables are typed with ASCII marks, the data carries full-width ones."""

_MARKS = str.maketrans({",": "\uff0c", "?": "\uff1f", "!": "\uff01", ":": "\uff1a", ";": "\uff1b"})


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def full_width(text: str) -> str:
    """The text with full-width marks where it is Chinese, else unchanged."""
    return text.translate(_MARKS) if is_chinese(text) else text
