"""Prefect's command line in this project: `prefect deployment run train-all`, at the server of `make up`.

Prefect asks for `train-all/train-all`, flow and deployment, and for an address in PREFECT_API_URL. An entry
point in the group `prefect.plugins` names this module; its hook runs whenever `prefect` is imported, before
the command line reads its arguments, and so may complete both.

Plugins are off unless the `pyproject.toml` of the current folder turns them on, as ours does. In a
sub-folder, such as examples/digits, `prefect` is therefore as it came: there `prefect deployment run
train-all` starts a server of its own for a moment and says "Invalid deployment name". Name the pipeline
instead (`-p pipeline=examples/digits`), from the project's folder.
"""

from __future__ import annotations

import difflib
import json
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from prefect.plugins import HookContext, SetupResult, register_hook

DEPLOYMENTS = ("train-all", "train-cell", "prepare-data")  # those of prefect.yaml, each called like its flow


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Called by Prefect, by keyword: pluggy finds no plain `ctx` in the hook that Prefect declares.

    Ends the program for `deployment run` with no server to ask, and in no other case.
    """
    if Path(sys.argv[0]).name not in ("prefect", "-m"):  # a script or a test goes where it is told to
        return None
    asked = _complete(sys.argv)
    if "PREFECT_API_URL" in os.environ:
        return None
    if address := _address():
        return SetupResult(env={"PREFECT_API_URL": f"{address}/api", **_direct()})
    if asked and not ctx.api_url:
        sys.exit(
            "prefect: no server of this project is running. Start it with `make up` in another terminal and "
            "wait for its addresses, or name a server in PREFECT_API_URL."
        )
    return None


def _complete(arguments: list[str]) -> bool:
    """Make `train-all` into `train-all/train-all`, in place, if this is `deployment run`; whether it is.

    Ends the program for a bare name that is none of ours, which Prefect answers with a traceback.
    """
    for i in range(1, len(arguments) - 1):
        if arguments[i : i + 2] == ["deployment", "run"]:
            for j in range(i + 2, len(arguments)):
                option = arguments[j - 1].startswith("-") and arguments[j - 1] != "--watch"
                if option or arguments[j].startswith("-") or "/" in arguments[j]:  # or an option's value
                    continue
                if arguments[j] not in DEPLOYMENTS:
                    near = difflib.get_close_matches(arguments[j], DEPLOYMENTS, n=1)
                    sys.exit(
                        f"prefect: there is no deployment {arguments[j]!r}"
                        + (f"; did you mean {near[0]}?" if near else ".")
                        + f" This project has {', '.join(DEPLOYMENTS)}."
                    )
                arguments[j] = f"{arguments[j]}/{arguments[j]}"
            return not {"--help", "-h"} & set(arguments)
    return False


def _address() -> str | None:
    """Of the server that `make up` keeps in this folder, if it answers: a millisecond."""
    try:
        address: str = json.loads(Path(".resgrid/services.json").read_text(encoding="utf-8"))["prefect"]
        url = urlsplit(address)
        socket.create_connection((url.hostname or "", url.port or 0), timeout=1.0).close()
    except (OSError, ValueError, KeyError):
        return None
    return address


def _direct() -> dict[str, str]:
    """No proxy on the way to this machine itself."""
    given = [os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")]
    names = ",".join(dict.fromkeys(name for name in (*given, "127.0.0.1") if name))
    return {"NO_PROXY": names, "no_proxy": names}
