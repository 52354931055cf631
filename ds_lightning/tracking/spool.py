"""What could not be sent is kept on disk."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def spool(folder: Path, calls: Iterable[dict[str, Any]]) -> list[Path]:
    """Append calls that MLflow did not take to files in `folder`.

    Args:
        folder: the store's spool folder; made when needed.
        calls: calls as they go to the writer. Metrics go to `<run>.jsonl`, one JSON object a metric with
            key, value, timestamp (ms) and step; everything else to `<run>.calls.jsonl` as it is.

    Returns:
        The files that were written to.
    """
    written: dict[Path, list[str]] = {}
    for call in calls:
        if call["kind"] == "metrics":
            lines = [
                json.dumps({"key": key, "value": value, "timestamp": timestamp, "step": step})
                for key, value, timestamp, step in call["rows"]
            ]
            written.setdefault(folder / f"{call['run']}.jsonl", []).extend(lines)
        else:
            written.setdefault(folder / f"{call['run']}.calls.jsonl", []).append(json.dumps(call))
    if written:
        folder.mkdir(parents=True, exist_ok=True)
    for path, lines in written.items():
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
    return list(written)
