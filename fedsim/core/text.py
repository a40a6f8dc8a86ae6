"""Texts that may hold anybody's names and errors, fit to travel and to be shown: short, and obeyed by no terminal."""

import traceback
import unicodedata
from collections.abc import Callable


PIECE, PIECES = 4_000, 60  # characters of a piece (a frame, a message), and pieces of a text, that are kept


def printable(text: str) -> str:
    """The same, with an escape in place of what would move the cursor, colour, or turn the direction of text."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) == "Zs" or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def cut(text: str, most: int = PIECE) -> str:
    """Of what is too long, the begin and the end."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [{len(text) - most:,} more characters] {text[-half:]}"


def text_of(error: BaseException) -> str:
    """An error's traceback. Of what is too long, the begin and the end."""
    pieces = _formatted(error, traceback.format_exception)
    if len(pieces) > PIECES:
        left_out = f"[{len(pieces) - PIECES:,} more frames]\n"
        pieces = [*pieces[: PIECES // 2], left_out, *pieces[-PIECES // 2 :]]
    return "".join(printable(cut(piece)) for piece in pieces)


def last_line(error: BaseException) -> str:
    """What an error's traceback ends in."""
    return printable(cut(_formatted(error, traceback.format_exception_only)[-1])).strip()


def _formatted(error: BaseException, form: Callable[[BaseException], list[str]]) -> list[str]:
    try:
        return form(error)
    except Exception as unprintable:  # of any kind: the error's own code runs
        return [f"{type(error).__name__}, whose text cannot be made: {type(unprintable).__name__}"]
