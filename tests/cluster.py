"""The services of a small cluster as real processes on loopback: PostgreSQL, an S3 server, Prefect, MLflow."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports import free_port
from sleeping import answers, ask, clean_env, wait_until

BUCKET = "resgrid"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian has them outside of the PATH


FLOW = """
import json, sys
from flows.train_all import train_all
state = train_all(**json.loads(sys.argv[1]), return_state=True)
print(json.dumps([state.name, state.message]))
"""


def begin_flow(root: Path, env: dict[str, str], **parameters: Any) -> subprocess.Popen[str]:
    """A train-all in a process of its own; the last line that it prints is its state's name and message."""
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, json.dumps(parameters)], cwd=root, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end_tree(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all that it has started."""
    try:
        parent = psutil.Process(process.pid)
        for each in [*parent.children(recursive=True), parent]:
            each.send_signal(number)
    except psutil.NoSuchProcess:
        pass


class Postgres:
    """A PostgreSQL server with a data folder of its own, as an ordinary user: it refuses to run as root."""

    def __init__(self) -> None:
        program = shutil.which("pg_ctl") or next((str(path / "pg_ctl") for path in BINARIES[-1:]), None)
        if program is None:
            pytest.skip("there is no PostgreSQL (Debian's package postgresql)")
        self.bin = Path(program).resolve().parent
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.root = Path(tempfile.mkdtemp(prefix="resgrid-postgres-"))  # whose parents that user may enter
        if os.geteuid() == 0:
            shutil.chown(self.root, self.user)
        self.port = free_port()
        self._run("initdb", "-D", "data", "-U", "resgrid", "--auth=trust", "--no-sync")
        self.start()
        for name in ("prefect", "mlflow"):
            self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "resgrid", name)

    def url(self, name: str, driver: str = "") -> str:
        return f"postgresql{driver}://resgrid@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.root}"
        options += " -c max_connections=200"
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "stop")

    def end(self) -> None:
        self.stop()
        shutil.rmtree(self.root)

    def _run(self, program: str, *arguments: str) -> None:
        other = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        command = [*(other if os.geteuid() == 0 else []), str(self.bin / program), *arguments]
        # Into a file: a server that goes on would hold a pipe open.
        with (self.root / "output").open("wb") as out:
            done = subprocess.run(command, cwd=self.root, stdout=out, stderr=out, check=False)
        assert done.returncode == 0, (self.root / "output").read_text()


class Cluster:
    """All services up; `env` leads a process to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.postgres = Postgres()
        self.ports = {name: free_port() for name in ("s3", "prefect", "mlflow")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = clean_env(
            PREFECT_HOME=str(root / "prefect"),
            PREFECT_API_URL=f"{self.url('prefect')}/api",
            PREFECT_WORKER_QUERY_SECONDS="1",
            PREFECT_LOGGING_EXTRA_LOGGERS="resgrid,tasks",  # as prefect.yaml sets it
            MLFLOW_TRACKING_URI=self.url("mlflow"),
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=self.url("s3"),
        )
        try:
            for name in self.ports:
                self.start(name, wait=False)
            for name in self.ports:
                self.wait(name)
            self._make_bucket()
        except BaseException:
            self.end()
            raise

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """Prefect's server, by its REST interface."""
        return ask(f"{self.url('prefect')}/api/{path}", content)

    def start(self, name: str, wait: bool = True) -> None:
        port = str(self.ports[name])
        python = [sys.executable, "-m"]
        command, extra = {
            "s3": ([str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", port], {}),
            "prefect": (
                [*python, "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
                {"PREFECT_API_DATABASE_CONNECTION_URL": self.postgres.url("prefect", "+asyncpg")},
            ),
            "mlflow": (
                [*python, "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
                 "--backend-store-uri", self.postgres.url("mlflow"),
                 "--artifacts-destination", f"s3://{BUCKET}/mlflow"],
                {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            ),
        }[name]  # fmt: skip
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.root, env=self.env | extra, stdout=log, stderr=log
            )
        if wait:
            self.wait(name)

    def wait(self, name: str) -> None:
        page = {"s3": "/moto-api/", "prefect": "/api/health", "mlflow": "/health"}[name]
        process, log = self.processes[name], self.root / f"{name}.log"

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            return answers(self.url(name) + page)

        wait_until(is_up, 120, f"{name} does not answer: see {log}")

    def kill(self, name: str) -> None:
        end_tree(self.processes[name])
        self.processes[name].wait()

    def end(self) -> None:
        for name in self.processes:
            self.kill(name)
        self.postgres.end()

    def _make_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3", endpoint_url=self.url("s3"), region_name="us-east-1",
            aws_access_key_id="key", aws_secret_access_key="secret",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
