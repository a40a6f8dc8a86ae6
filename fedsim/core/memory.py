"""What fits into this machine's memory."""

import psutil

from fedsim.core.fields import refuse


def check_memory(field: str, value: object, size: int) -> None:
    """**Raises:** `ValueError` naming a field if what its value asks for takes more bytes than this machine has."""
    memory = psutil.virtual_memory().total
    if size > memory:
        refuse(field, value, f"smaller: this takes {size / 1e9:.1f} GB of memory, and there are {memory / 1e9:.1f}")
