"""The token that keeps other users out of a Ray: a file that nobody else may read, from the moment it exists."""

import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedsim.core import environment


def keep_token(say: Callable[[str], None]) -> None:
    """See to this user's token before a Ray starts, which by itself would write one that everybody may read.

    Made if there is none; one that others may read is mended, and `say` is told.

    **Raises:** `ValueError` for one that is another user's, or that cannot be mended.
    """
    named = environment.ray_token_file()
    if named is None or not environment.ray_asks_for_token():
        return
    file = Path(named)
    try:
        _make(file)
        for path in (file.parent, file):
            _mend(path, say)
    except OSError as error:
        raise ValueError(f"{file}: Ray's token cannot be kept from other users: {error}") from error


def _make(file: Path) -> None:
    """Make a token, unless there is one: complete and closed to others before it has its name."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file.exists():
        return
    descriptor, name = tempfile.mkstemp(dir=file.parent)  # 0600, whatever the umask is
    try:
        with os.fdopen(descriptor, "w") as new:
            new.write(secrets.token_hex(32))
        os.link(name, file)
    except FileExistsError:  # another process was faster
        return
    finally:
        os.unlink(name)


def _mend(path: Path, say: Callable[[str], None]) -> None:
    """Close a file to others, and its folder to their changes."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):  # what is root's, root alone can have put there
        raise ValueError(
            f"{path}: belongs to another user (uid {found.st_uid}), who could run code as you through Ray's token; "
            "remove it, or name another file in RAY_AUTH_TOKEN_PATH"
        )
    mode = stat.S_IMODE(found.st_mode)
    kept = mode & (0o755 if path.is_dir() else 0o700)
    if kept != mode:
        path.chmod(kept)
        say(f"{path}: other users could {'change' if path.is_dir() else 'read'} it ({mode:04o}); now {kept:04o}")
