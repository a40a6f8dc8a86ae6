"""Text for people who look on. It may hold names and errors of anybody's: what it says is shown, not obeyed."""

from rich.console import Console
from rich.text import Text

from fedsim.core.text import printable


def say(console: Console, text: str) -> None:
    """A line as it is: labels hold brackets, which are no markup, and whoever copies a command wants it whole."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def shown(text: str) -> Text:
    """A text as a cell, or a title, of a table: without markup."""
    return Text(printable(text))
