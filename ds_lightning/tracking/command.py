"""`ds-lightning tracking`."""

import argparse
from collections.abc import Sequence


def run_tracking_command(argv: Sequence[str]) -> int:
    """Run `ds-lightning tracking replay` and print a line a run.

    Args:
        argv: the words after `tracking`.

    Returns:
        0 when everything was sent, 1 when something is left.

    Raises:
        ConfigError: when the store can't be one.
    """
    parser = argparse.ArgumentParser(
        prog="ds-lightning tracking",
        description="Send to MLflow what an outage of its server left on disk, once, with its steps and times.",
        epilog="Example:\n  ds-lightning tracking replay",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["replay"], help="send what lies in the store's folder spool/")
    parser.add_argument("--store", metavar="URI", help="folder or URI (default: MLFLOW_TRACKING_URI, else ./mlruns)")
    parser.add_argument("--run", metavar="RUN", help="id of a run (default: all that wait)")
    options = parser.parse_args(argv)

    from ds_lightning.tracking.replaying import replay, say_replayed

    results = replay(options.store, options.run)
    for line in say_replayed(results) or ["nothing waits to be sent"]:
        print(line)
    return int(not all(result.complete for result in results))
