"""`resgrid up` and `prefect deployment run`, with real servers, a real worker and real signals."""

from __future__ import annotations

import http.server
import importlib
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ports import free_port
from ruamel.yaml import YAML
from sleeping import ROOT, Checkout, ask, clean_env, wait_until

from resgrid import tracking
from resgrid.errors import ResgridError
from tasks import services
from tasks.prefect_plugin import DEPLOYMENTS, _complete, setup_environment
from tasks.server import prefect_client

START_SECONDS = 240  # 15 on two idle cores

UP = """
import sys
from pathlib import Path
from resgrid.errors import ResgridError
from resgrid.progress import show_messages
from tasks.services import up
show_messages()
try:
    sys.exit(up(Path.cwd(), prefect_port=int(sys.argv[1]), mlflow_port=int(sys.argv[2])))
except ResgridError as error:
    sys.exit(f"resgrid: {error}")
"""

# Writes down what it was given; with `force` it has a child that sleeps, which it ends when it is ended itself.
FLOW = """
import json, os, subprocess, sys
from pathlib import Path
from prefect import flow, task

@task(task_run_name="{name}")
def sleep(name: str):
    Path("child.txt").write_text("")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path("child.txt").write_text(str(child.pid))
    try:
        child.wait()
    finally:
        child.terminate()
        child.wait()

@flow(name="NAME")
def FUNCTION(pipeline: str = "", cells: list[str] | None = None, slots: int = 1, force: bool = False):
    Path("ran.json").write_text(json.dumps({"folder": os.getcwd(), "cells": cells, "pipeline": pipeline}))
    if slots < 1:
        raise ValueError("no slots")
    if force:
        sleep("resnet20-sgd-0")
"""


class Project(Checkout):
    """Its flows only sleep."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.home = root.parent / "home"
        self.home.mkdir()
        (root / "flows").mkdir(parents=True)
        for name in ("pyproject.toml", "prefect.yaml", "params.yaml"):
            shutil.copy(ROOT / name, root / name)
        for name in DEPLOYMENTS:
            function = name.replace("-", "_")
            text = FLOW.replace("NAME", name).replace("FUNCTION", function)
            (root / "flows" / f"{function}.py").write_text(text)
        self.initialize()

    @property
    def env(self) -> dict[str, str]:
        return clean_env(HOME=str(self.home))

    def up(self, ports: tuple[int, int], **more: str) -> None:
        """Begin `resgrid up`, as a shell starts it with `&`: with SIGINT ignored."""
        with (self.root / "up.txt").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", UP, *map(str, ports)],
                cwd=self.root, env=self.env | more, stdout=out, stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )  # fmt: skip

    def start(self, ports: tuple[int, int], **more: str) -> None:
        """The same, and wait until everything is up; `services` is then what services.json says."""
        self.up(ports, **more)
        wait_until(lambda: "Ctrl-C here" in self.output or self.process.poll() is not None, START_SECONDS)
        assert self.process.poll() is None, self.output
        self.services: dict[str, Any] = json.loads((self.root / ".resgrid/services.json").read_text())

    def children(self) -> dict[str, str]:
        """What services.json says of them while they start."""
        file = self.root / ".resgrid/services.json"
        return json.loads(file.read_text())["children"] if file.exists() else {}

    @property
    def output(self) -> str:
        return (self.root / "up.txt").read_text()

    def start_sleeping(self) -> psutil.Process:
        """The child of a flow run that would sleep for 10 minutes."""
        child, deployments = self.root / "child.txt", f"{self.services['prefect']}/api/deployments"
        child.unlink(missing_ok=True)
        deployment = ask(f"{deployments}/name/train-all/train-all")["id"]
        ask(f"{deployments}/{deployment}/create_flow_run", {"parameters": {"force": True}})
        wait_until(lambda: child.exists() and bool(child.read_text()), 60)
        return psutil.Process(int(child.read_text()))

    def left(self) -> list[psutil.Process]:
        """Every process that works in this folder."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self.root) and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    def states(self) -> set[tuple[str, str]]:
        """(state, message) of every flow run, read from the server's database."""
        with closing(sqlite3.connect(self.root / ".resgrid/prefect/prefect.db")) as database:
            return set(
                database.execute(
                    "SELECT type, message FROM flow_run_state JOIN flow_run ON flow_run.state_id = flow_run_state.id"
                )
            )

    def close(self) -> None:
        """End all of it, also where a test has failed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(60)
        for left in self.left():
            with suppress(psutil.Error):
                left.kill()
        self.process.wait()


# --- one start, with both ports taken -----------------------------------------------------------------


@pytest.fixture(scope="module")
def taken():
    with ExitStack() as stack:
        ports = free_port(), free_port()
        for port in ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield ports


@pytest.fixture(scope="module")
def project(tmp_path_factory, taken):
    project = Project(tmp_path_factory.mktemp("services") / "a project")  # with a space in its path
    try:
        project.start(taken)
        yield project
    finally:
        project.close()


def test_a_taken_port_gives_way_to_a_free_one_and_this_is_said(project, taken):
    pages = ("", f"/#/experiments?{tracking.WORK}")
    for name, port, page in zip(("Prefect", "MLflow"), taken, pages, strict=True):
        address = project.services[name.lower()]
        assert address.startswith("http://127.0.0.1:")
        assert port < int(address.rpartition(":")[2]) < port + 50
        assert f"Port {port} is taken: {name} takes {address.rpartition(':')[2]}" in project.output
        assert f"{name:12} {address}{page}\n" in project.output


def test_nothing_listens_on_any_address_but_loopback(project):
    listening = {
        connection.laddr.ip
        for process in project.left()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_the_three_deployments_and_the_next_command_are_printed(project):
    assert "prepare-data, train-all, train-cell" in project.output
    assert "prefect deployment run train-all -p pipeline=examples/digits --watch" in project.output


def test_a_second_start_says_where_the_first_one_answers(project):
    second = project.run(sys.executable, "-P", "-c", UP, "4200", "5000")
    assert second.returncode == 1
    assert second.stderr.startswith(
        "resgrid: the services of this project run already: Prefect http://127.0.0.1:"
    )
    assert project.services["mlflow"] in second.stderr
    assert project.process.poll() is None


def test_the_bare_name_runs_the_deployment_in_the_projects_folder_and_the_exit_status_says_that_it_failed(
    project,
):
    parameters = ("-p", 'cells=["resnet20-*"]', "-p", "slots=0")
    done = project.run("prefect", "deployment", "run", "train-all", *parameters, "--watch")
    assert done.returncode == 1
    assert "Flow run finished in state 'Failed'" in done.stdout + done.stderr
    ran = json.loads((project.root / "ran.json").read_text())
    assert ran == {"folder": str(project.root), "cells": ["resnet20-*"], "pipeline": "."}


def test_only_prefects_command_line_is_led_to_the_server(project):
    asked = "from prefect.settings import get_current_settings as s; print(s().api.url)"
    assert project.run(sys.executable, "-c", asked).stdout == "None\n"
    shown = project.run("prefect", "config", "view").stdout
    assert f"PREFECT_API_URL='{project.services['prefect']}/api' (from env)" in shown


# --- killed hard, and started again -------------------------------------------------------------------


@pytest.fixture(scope="module")
def restarted(project):
    """Services that were started again, after `up` was killed in the middle of a flow run."""
    project.child = project.start_sleeping()
    project.process.kill()
    project.process.wait()
    assert len(project.left()) >= 5  # Prefect, MLflow, the worker, the flow, its child
    # Now with a server elsewhere, so that none of ours is needed.
    project.start((free_port(), free_port()), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    return project


def test_the_next_start_ends_what_a_killed_one_left_and_records_its_runs_as_crashed(restarted):
    assert "Ending what an earlier start left running: prefect, mlflow, worker\n" in restarted.output
    assert "Flow runs of an earlier time that had no end, now recorded as crashed: 1" in restarted.output
    assert not restarted.child.is_running()
    assert ("CRASHED", "The services ended while it ran.") in restarted.states()


def test_a_server_that_the_environment_names_is_used_instead_of_one_of_ours(restarted):
    assert restarted.services["mlflow"] == "http://127.0.0.1:9"
    assert set(restarted.services["children"]) == {"prefect", "worker"}


def test_an_interrupt_cancels_runs_and_ends_everything_though_a_shell_had_it_ignored(restarted):
    child = restarted.start_sleeping()
    began = time.monotonic()
    restarted.process.send_signal(signal.SIGINT)
    wait_until(lambda: not child.is_running(), 10)
    assert restarted.process.wait(60) == 0
    assert time.monotonic() - began < 30
    assert restarted.left() == []
    assert ("CANCELLED", "Flow run was cancelled successfully.") in restarted.states()
    assert not (restarted.root / ".resgrid/services.json").exists()
    assert "All ended." in restarted.output


# --- starts that come to nothing ----------------------------------------------------------------------


@pytest.fixture
def starting(project):
    """One whose servers were just begun."""
    project.close()
    project.up((free_port(), free_port()))
    wait_until(lambda: {"prefect", "mlflow"} <= set(project.children()), 60)
    yield project
    project.close()


def test_a_service_that_dies_is_named_with_the_end_of_its_log_and_the_others_end(starting):
    log = starting.root / ".resgrid/logs/prefect.log"
    wait_until(lambda: "Configure Prefect" in log.read_text(), 60)
    psutil.Process(int(starting.children()["prefect"].partition(":")[0])).kill()
    assert starting.process.wait(60) == 1
    assert "resgrid: prefect ended by itself (killed by SIGKILL). The end of its log:" in starting.output
    assert log.read_text().splitlines()[-1] in starting.output
    assert starting.left() == []


@pytest.mark.long
def test_stopped_while_it_starts_it_ends_what_it_has_begun(starting):
    starting.process.send_signal(signal.SIGTERM)
    assert starting.process.wait(60) == 0
    assert starting.left() == []
    assert "Ctrl-C here" not in starting.output
    assert "All ended." in starting.output


def test_the_users_home_stays_as_it_was(project):
    assert [path for path in project.home.rglob("*") if path.is_file()] == []


# --- without any service ------------------------------------------------------------------------------


def test_a_server_that_wants_a_password_says_so_at_once():
    """The 401 is a real one, of a server that knows nothing but to refuse."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        began = time.monotonic()
        with (
            pytest.raises(ResgridError, match=r"401.* set PREFECT_API_AUTH_STRING"),
            prefect_client(f"{address}/api"),
        ):
            pass
        assert time.monotonic() - began < 5
        server.shutdown()


def test_no_proxy_keeps_what_it_has_in_either_spelling(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "one.example, both.example")
    monkeypatch.setenv("no_proxy", "two.example,both.example")
    environment = services.no_proxy()
    expected = "one.example,both.example,two.example,127.0.0.1,localhost"
    assert environment["NO_PROXY"] == environment["no_proxy"] == expected


def test_without_a_server_the_message_says_to_start_one(tmp_path, monkeypatch):
    project = Project(tmp_path / "project")
    done = project.run("prefect", "deployment", "run", "train-all", "--watch")
    assert done.returncode == 1
    assert done.stderr.startswith("prefect: no server of this project is running. Start it with `make up`")
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.chdir(project.root)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["prefect", "config", "view"])
    assert setup_environment(ctx=SimpleNamespace(api_url=None)) is None  # which needs none


def test_each_deployment_is_called_like_its_flow():
    deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    flows = {}
    for deployment in deployments:
        path, _, function = deployment["entrypoint"].partition(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        flows[deployment["name"]] = getattr(module, function).name
    assert flows == {name: name for name in DEPLOYMENTS}


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("deployment run train-all", "deployment run train-all/train-all"),
        ("deployment run train-all -p slots=2 --watch", "deployment run train-all/train-all -p slots=2 --watch"),
        ("deployment run --watch -p force=true train-cell", "deployment run --watch -p force=true train-cell/train-cell"),
        ("--profile mine deployment run prepare-data", "--profile mine deployment run prepare-data/prepare-data"),
        ("deployment run train-all/train-all", "deployment run train-all/train-all"),
        ("deployment run --tag train-all train-all", "deployment run --tag train-all train-all/train-all"),
        ("deployment run other/other", "deployment run other/other"),
        ("deployment inspect train-all", "deployment inspect train-all"),
    ],
)  # fmt: skip
def test_only_the_name_of_a_deployment_to_run_is_completed(typed, completed):
    arguments = ["prefect", *typed.split()]
    assert _complete(arguments) == ("run" in typed)
    assert arguments == ["prefect", *completed.split()]


def test_a_mistyped_name_is_told_with_the_nearest_one_and_no_traceback():
    with pytest.raises(SystemExit) as left:
        _complete(["prefect", "deployment", "run", "train-al", "--watch"])
    assert left.value.code == (
        "prefect: there is no deployment 'train-al'; did you mean train-all or train-cell? "
        "This project has train-all, train-cell, prepare-data."
    )
