"""`resgrid doctor` on this machine, with one thing changed at a time."""

from __future__ import annotations

import json
import platform
import socket

import pytest

from resgrid import doctor
from resgrid.cli import main


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    for name in (*proxies, "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def findings() -> dict[str, doctor.Finding]:
    return {each.what: each for each in doctor.examine()}


def test_a_machine_that_runs_the_tests_has_no_problem(capsys):
    assert main(["doctor", "--json"]) == 0
    table = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert table["Python"]["value"].startswith(platform.python_version())
    assert {"torch", "dvc", "prefect", "mlflow", "git", "Disk", "ResGrid"} <= set(table)
    assert table["mlflow"]["level"] == "good"  # the version that was tested


def test_an_unsupported_python_is_a_problem_and_the_exit_status_tells(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PYTHON", ((3, 98), (3, 99)))
    assert main(["doctor"]) == 1
    assert "→ 3.11 to 3.14 are supported" in capsys.readouterr().out


def test_a_taken_port_and_a_server_that_does_not_answer_are_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {"MLflow": port})
        assert findings()[f"Port {port}"].value == "MLflow's: taken"
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    assert findings()["PREFECT_API_URL answers"].level == "problem"


def test_passwords_are_not_shown_and_a_proxy_needs_an_exception_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@proxy.example.org:3128")
    table = findings()
    assert table["HTTP_PROXY"].value == "http://…@proxy.example.org:3128"
    assert "NO_PROXY=127.0.0.1" in table["NO_PROXY"].advice
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert findings()["NO_PROXY"].advice == ""


def test_a_card_that_torch_cannot_use_points_to_its_driver(monkeypatch, tmp_path):
    if doctor._output("nvidia-smi"):
        pytest.skip("there is a card")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960 MiB, 470.57.02'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    card = findings()["GPU"]
    assert (card.level, card.advice) == ("problem", "torch cannot use it: update its driver")


def test_a_pipeline_outside_of_a_repository_is_told_how_to_begin(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "resgrid init" in findings()["DVC repository"].advice
