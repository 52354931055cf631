"""Places for the studies of a benchmark: a journal, SQLite, or a private PostgreSQL server."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DEBIAN = ":".join(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run a private server; yields the URL of its databases without their name."""
    found = {name: shutil.which(name, path=f"{os.environ['PATH']}:{DEBIAN}") for name in ("initdb", "pg_ctl")}
    if None in found.values():
        sys.exit("--storage postgresql needs `initdb` and `pg_ctl` on the PATH (Debian: apt-get install postgresql)")
    user = next((name for name in ("postgres", "nobody") if _exists(name)), None)
    if os.geteuid() == 0 and (user is None or shutil.which("setpriv") is None):
        sys.exit("--storage postgresql: the server refuses root; run this as another user, or install `setpriv`")
    switch = ["setpriv", f"--reuid={user}", "--clear-groups"] if os.geteuid() == 0 else []
    data = folder / "postgresql"
    data.mkdir()
    folder.chmod(0o755)
    if switch:
        shutil.chown(data, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*switch, found["initdb"], "-D", data, "-U", "sweep", "-A", "trust", "-N"], **quiet)
    control = [*switch, found["pg_ctl"], "-D", data, "-w"]
    subprocess.run([*control, "-l", data / "server.log", "-o", options, "start"], **quiet)
    try:
        yield f"postgresql://sweep@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


def storage_of(kind: str, server: str, store: Path) -> str | None:
    """Return a new place for a study; None is the journal in the store."""
    if kind == "journal":
        return None
    if kind == "sqlite":
        return f"sqlite:///{store / 'optuna' / 'study.db'}"
    import psycopg2

    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE sweep_{store.name}")
    connection.close()
    return f"{server}/sweep_{store.name}"
