"""The one place where environment variables are read."""

import os


def data_dir() -> str | None:
    """Where known data sets are looked up, as an absolute path: `FEDSIM_DATA_DIR`."""
    folder = os.environ.get("FEDSIM_DATA_DIR")
    return os.path.abspath(folder) if folder else None


def ray_address() -> str | None:
    """A cluster to join without being told on the command line: `RAY_ADDRESS`."""
    return os.environ.get("RAY_ADDRESS") or None
