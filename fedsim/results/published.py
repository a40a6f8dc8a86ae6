"""Results folders whose tables may be given away: nothing in them tells of participants' data.

Which columns are left out: `private` in `fedsim.results.columns`. Whether they were is told by the tables themselves.
"""

from fedsim.results.columns import PRIVATE, SCHEMAS
from fedsim.results.tables import read_table
from fedsim.storage.place import Place


def check_published(directory: Place, keep_updates: bool = False) -> None:
    """Refuse (`ValueError`) to publish in a folder whose tables hold what is private, naming run and column, or to keep
    updates, which are participants' data, beside."""
    if keep_updates:
        raise ValueError("publish=True, keep_updates=True: must be one of them: updates are participants' data")
    if found := private_value(directory):
        run_id, column = found
        raise ValueError(
            f"publish=True: the tables of {directory} hold {column} of run {run_id}, which was computed without; give "
            "another folder"
        )


def private_value(directory: Place) -> tuple[str, str] | None:
    """Run id and `table.column` of something private that the tables of a folder hold; None if there is nothing."""
    for table in SCHEMAS:
        if not any((directory / table).glob("*.parquet")):
            continue
        frame = read_table(directory, table)
        for column in sorted(PRIVATE[table]):
            for run_id in frame.loc[frame[column].notna(), "run_id"].head(1):
                return run_id, f"{table}.{column}"
    return None
