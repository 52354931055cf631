"""A tracking server of a few lines that can be switched off."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubServer:
    """Knows one experiment and one run; keeps the metrics it is sent."""

    def __init__(self, artifacts: str) -> None:
        self.rows: list[dict[str, Any]] = []
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
                if path.endswith("experiments/get-by-name"):
                    result = {"experiment": experiment}
                elif path.endswith(("runs/create", "runs/get")):
                    result = {"run": {"info": {**info, "status": stub.status}, "data": {}}}
                elif path.endswith("runs/log-batch") and not stub.broken:
                    stub.rows.extend(body.get("metrics", []))
                elif path.endswith("runs/update"):
                    stub.status = body["status"]
                    result = {"run_info": {**info, "status": stub.status}}
                content = json.dumps(result).encode()
                self.send_response(503 if stub.broken else 200)
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def die(self) -> None:
        """Close the port: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
