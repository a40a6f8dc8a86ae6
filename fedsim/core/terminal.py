"""Text for people who look on. It may hold names and errors of anybody's: what it says is shown, not obeyed."""

import unicodedata

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str) -> None:
    """A line as it is: labels hold brackets, which are no markup, and whoever copies a command wants it whole."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def shown(text: str) -> Text:
    """A text as a cell, or a title, of a table: without markup."""
    return Text(printable(text))


def printable(text: str) -> str:
    """The same, with an escape in place of what would move the cursor, colour, or turn the direction of text."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) == "Zs" or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
