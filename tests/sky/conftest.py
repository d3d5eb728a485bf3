"""A local S3 server (moto) with rclone as its client."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.processes import CEILING_S

REPOSITORY = Path(__file__).resolve().parents[2]
KEY, SECRET = "AKIATESTKEY", "not-a-real-secret-0123456789"


class Bucket:
    """An empty bucket on the local server; ``env`` is what rclone needs to reach it."""

    def __init__(self, name: str, env: dict[str, str]):
        self.name, self.env = name, env


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory):
    """Start the server once; skip with the reason if it or rclone is not installed."""
    if shutil.which("rclone") is None:
        pytest.skip("needs rclone: tests/sky/install.sh")
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask_cors") is None:
        pytest.skip("needs moto: pip install 'moto[s3]' flask flask-cors")
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with open(log, "w") as file:
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for_server(port, server, log)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
        yield {
            **inherited,
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_S3_PROVIDER": "Other",
            "RCLONE_S3_ENV_AUTH": "true",
            "RCLONE_S3_ENDPOINT": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
    finally:
        server.terminate()
        server.wait(timeout=600)


@pytest.fixture
def bucket(s3_environment, request):
    name = "b" + "".join(c for c in request.node.name.lower() if c.isalnum())[:50]
    subprocess.run(["rclone", "mkdir", f":s3:{name}"], env=s3_environment, check=True, timeout=600)
    return Bucket(name, s3_environment)


def wait_for_server(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + CEILING_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"the S3 server did not start: {log.read_text()[-2000:]}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
