"""The text of an error, fit to travel: whatever it says, it is short, and nothing in it acts on a terminal."""

import traceback
from collections.abc import Callable


PIECE, PIECES = 4_000, 60  # characters of a piece (a frame, a message), and pieces of a text, that are kept


def text_of(error: BaseException) -> str:
    """Its traceback. Of what is too long, the begin and the end."""
    pieces = _formatted(error, traceback.format_exception)
    if len(pieces) > PIECES:
        left_out = f"[{len(pieces) - PIECES:,} more frames]\n"
        pieces = [*pieces[: PIECES // 2], left_out, *pieces[-PIECES // 2 :]]
    return "".join(_visible(_cut(piece)) for piece in pieces)


def last_line(error: BaseException) -> str:
    """What its traceback ends in."""
    return _visible(_cut(_formatted(error, traceback.format_exception_only)[-1])).strip()


def _formatted(error: BaseException, form: Callable[[BaseException], list[str]]) -> list[str]:
    try:
        return form(error)
    except Exception as unprintable:  # of any kind: the error's own code runs
        return [f"{type(error).__name__}, whose text cannot be made: {type(unprintable).__name__}"]


def _cut(text: str) -> str:
    if len(text) <= PIECE:
        return text
    half = PIECE // 2
    return f"{text[:half]} [{len(text) - PIECE:,} more characters] {text[-half:]}"


def _visible(text: str) -> str:
    """Without what moves a cursor, changes colours or the direction of writing, or cannot be encoded."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
