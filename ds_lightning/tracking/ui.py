"""The MLflow UI over our store, with a fifth of its usual processes and memory."""

import argparse
import os
import signal
import socket
import subprocess
import sys

from ds_lightning.errors import ConfigError


def run_ui_command(argv: list[str]) -> int:
    """Serve the MLflow UI until it is interrupted; returns its exit code.

    Raises:
        ConfigError: when the port is taken.
    """
    parser = argparse.ArgumentParser(
        prog="ds-lightning ui",
        description="Serve the MLflow UI on the runs of a store, on this machine only unless --host says more.",
        epilog="Example:\n  ds-lightning ui --port 5001",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", help="folder or tracking URI (default: MLFLOW_TRACKING_URI, else ./mlruns)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    args = parser.parse_args(argv)

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            raise ConfigError(
                f"port {args.port} on {args.host} is not free ({error.strerror}); choose another with --port"
            ) from error

    from ds_lightning.tracking.store import locate

    uri = locate(args.store).uri
    # Without workflowType the UI opens in its mode for language models, which has no run table.
    print(f"MLflow UI on {uri}\nopen http://{args.host}:{args.port}/#/experiments?workflowType=machine_learning")
    print("Ctrl-C stops it", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", args.host, "--port", str(args.port), "--workers", "1"]
    # The job runner is a dozen more processes, for evaluations that training does not use.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(*_: object) -> None:
        # The server's workers are its children: the whole group goes, or they would hold the port.
        os.killpg(server.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = server.wait()
    return 0 if code in (0, -signal.SIGTERM) else 1
