"""A limit for what may hang, in this process."""

import contextlib
import signal
from collections.abc import Iterator


class TooLong(BaseException):
    """What was tried hangs. No Exception, so that nothing that is tried catches it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TooLong in the main thread after some seconds."""

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
