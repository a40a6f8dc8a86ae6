"""Text for people who look on."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """A line as it is: labels hold brackets, which are no markup, and whoever copies a command wants it whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
