"""Text from elsewhere in Markdown and in code: whatever is in it, it stays text."""

import re


def plain(value):
    """
    Returns a value from JSON in whose strings and keys a dash stands for every character that could be markup: for names
    of data sets, metrics and settings, which need none. Class names keep theirs ([`code_span`]).
    """
    if isinstance(value, str):
        return re.sub(r"[^\w .,()+/-]", "-", value)
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value


def code_span(text: str) -> str:
    """Returns any text as a code span on one line, in which Markdown reads no markup; not for tables, where a pipe is."""
    if not text.strip() or not text.isprintable():
        text = repr(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    # One space on either side is not part of the text.
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def python_literal(text: str) -> str:
    """Returns any text as a string in Python, in double quotes where `repr` has single ones for no reason."""
    literal = repr(text)
    return literal if '"' in literal else f'"{literal[1:-1]}"'
