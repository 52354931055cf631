"""A tracking server of a few lines that can be switched off; also a process: `stub_server.py PORT FILE [DELAY]`."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class StubServer:
    """Knows one experiment and one run; keeps every row it is sent, also one that it has.

    Args:
        artifacts: artifact location.
        port: 0 takes any.
        file: rows are also appended to it, before they are acknowledged, and read from it at the start.
        delay: seconds before the answer to a batch.
    """

    def __init__(self, artifacts: str, port: int = 0, file: Path | None = None, delay: float = 0.0) -> None:
        self.rows: list[dict[str, Any]] = [] if file is None else rows_in(file)
        self.swallow = self.refuse = 0
        lock = threading.Lock()
        self.status = "RUNNING"
        self.broken = False
        stub = self
        info = {"run_id": "f" * 32, "run_uuid": "f" * 32, "experiment_id": "7", "lifecycle_stage": "active"}
        info["artifact_uri"] = artifacts
        experiment = {"experiment_id": "7", "name": "x", "lifecycle_stage": "active", "artifact_location": artifacts}

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: dict[str, Any]) -> None:
                path = self.path.split("?")[0]
                result: dict[str, Any] = {}
                broken = stub.broken
                if path.endswith("experiments/get-by-name"):
                    result = {"experiment": experiment}
                elif path.endswith(("runs/create", "runs/get")):
                    result = {"run": {"info": {**info, "status": stub.status}, "data": {}}}
                elif path.endswith("metrics/get-history"):
                    key = parse_qs(urlsplit(self.path).query).get("metric_key", [body.get("metric_key")])[0]
                    result = {"metrics": [row for row in stub.rows if row["key"] == key]}
                elif path.endswith("runs/log-batch") and stub.refuse:
                    stub.refuse, broken = stub.refuse - 1, True
                elif path.endswith("runs/log-batch") and not broken:
                    with lock:
                        stub.rows.extend(body.get("metrics", []))
                        if file is not None and body.get("metrics"):
                            with file.open("a") as out:
                                out.write(json.dumps(body["metrics"]) + "\n")
                    time.sleep(delay)
                    if stub.swallow:
                        stub.swallow -= 1
                        self.close_connection = True
                        return
                elif path.endswith("runs/update"):
                    stub.status = body["status"]
                    result = {"run_info": {**info, "status": stub.status}}
                content = json.dumps(result).encode()
                self.send_response(503 if broken else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self.answer(json.loads(self.rfile.read(length) or b"{}"))

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def die(self) -> None:
        """Close the port: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Read the rows that a server process has kept; a batch is one line, which counts once it is whole."""
    if not file.exists():
        return []
    *whole, _ = file.read_text().split("\n")  # the last is empty, or being written
    return [row for line in whole for row in json.loads(line)]


if __name__ == "__main__":
    StubServer("/nonexistent", int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if sys.argv[3:] else 0.0)
    print("ready", flush=True)
    threading.Event().wait()
