"""How soon MLflow's pages show a grid: the table of its runs, their charts, the comparison of all.

    cd examples/digits && python ../../benchmarks/mlflow_pages.py --shots /tmp/shots

Starts MLflow on the pipeline's store and a headless Chromium, and opens each page in a fresh tab: seconds
from the address to what a person came for, the median of the rounds. With `--shots`, a picture of each.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from websockets.sync.client import ClientConnection, connect

from resgrid.config import load_params
from resgrid.tracking.store import SETTINGS, open_store, server
from resgrid.tracking.view import VIEW_QUERY

DEADLINE = 120.0
ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
SIZE = (1500, 900)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], ready: Callable[[], Any], env: dict[str, str]) -> Iterator[None]:
    """`command` in a process group of its own, until the end of the block; entered when it is `ready`."""
    process = subprocess.Popen(
        command, env=os.environ | env, process_group=0, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(ready)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def until(holds: Callable[[], Any]) -> Any:
    """The first true value of `holds`, asked twenty times a second."""
    began = time.monotonic()
    while True:
        try:
            if found := holds():
                return found
        except OSError:
            pass
        if time.monotonic() - began > DEADLINE:
            sys.exit(f"nothing came within {DEADLINE:.0f} s")
        time.sleep(0.05)


class Tab:
    """A fresh tab of Chromium, through its debugging protocol."""

    def __init__(self, port: int) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new", method="PUT")
        with urllib.request.urlopen(request) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        self.socket: ClientConnection = connect(address, max_size=2**26, proxy=None)
        self.count = 0
        self.ask("Page.enable")
        size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def ask(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while (said := json.loads(self.socket.recv())).get("id") != self.count:
            pass
        return said.get("result", {})

    def value(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return found.get("result", {}).get("value")

    def close(self) -> None:
        self.ask("Page.close")
        self.socket.close()


def seconds(port: int, address: str, shown: str, shot: Path | None) -> float:
    """From asking for `address` until the expression `shown` is true there."""
    tab = Tab(port)
    began = time.monotonic()
    tab.ask("Page.navigate", url=address)
    until(lambda: tab.value(shown))
    took = time.monotonic() - began
    if shot is not None:
        tab.value(f"document.querySelector({json.dumps(ASSISTANT)})?.click()")  # it takes a third of the page
        time.sleep(3.0)  # for what moves
        shot.write_bytes(base64.b64decode(tab.ask("Page.captureScreenshot", format="png")["data"]))
    tab.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=Path)
    options = parser.parse_args()
    browser = shutil.which("chromium") or sys.exit("chromium is not on the PATH")
    store = open_store(load_params().name)
    began = time.monotonic()
    runs = store.client.search_runs([store.experiment_id], "tags.grid = 'current'", max_results=1000)
    print(f"{len(runs)} current runs; the client lists them in {time.monotonic() - began:.2f} s")
    names = sorted(run.info.run_name for run in runs)
    port, debugging = free_port(), free_port()
    home = f"http://127.0.0.1:{port}/#"
    ids = quote(json.dumps([run.info.run_id for run in runs]))
    experiments = quote(json.dumps([store.experiment_id]))
    table = f"{home}/experiments/{store.experiment_id}/runs?{VIEW_QUERY}"
    listed = f"{json.dumps(names)}.filter(name => document.body.innerText.includes(name)).length"
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg, .parcoords canvas, svg.parcoords').length"
    pages = {
        "table": (table, f"{listed} >= {min(15, len(names))}"),
        "charts": (f"{table}&compareRunsMode=CHART", f"{drawn} >= 3"),
        "comparison": (f"{home}/compare-runs?runs={ids}&experiments={experiments}", f"{drawn} >= 1"),
    }

    def answers(address: str) -> Callable[[], bool]:
        return lambda: urllib.request.urlopen(address, timeout=2).status == 200

    with tempfile.TemporaryDirectory() as profile:
        chromium = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-allow-origins=*",
            f"--remote-debugging-port={debugging}", f"--user-data-dir={profile}", "--no-first-run",
            "about:blank",
        ]  # fmt: skip
        mlflow = [sys.executable, "-m", *server(store.uri, port)]
        with (
            running(mlflow, answers(f"http://127.0.0.1:{port}/health"), SETTINGS),
            running(chromium, answers(f"http://127.0.0.1:{debugging}/json/version"), {}),
        ):
            for name, (address, shown) in pages.items():
                took = [seconds(debugging, address, shown, None) for _ in range(options.rounds)]
                rounds = ", ".join(f"{each:.1f}" for each in took)
                print(f"{name}: {median(took):.1f} s ({rounds}; the first with an empty cache)", flush=True)
                if options.shots:
                    options.shots.mkdir(parents=True, exist_ok=True)
                    seconds(debugging, address, shown, options.shots / f"{name}.png")


if __name__ == "__main__":
    main()
