"""What goes wrong beside training is said, and does not end it."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn an exception into a warning that names what was not done.

    Args:
        what: what is tried, as in `checkpoint of run 1234`.
    """
    try:
        yield
    # Other people's code runs in here: datasets, models, servers, file systems.
    except Exception as error:
        warnings.warn(f"{what} not logged ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=4)
