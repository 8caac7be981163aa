"""Prefect's command line in this project: `prefect deployment run train-all`, at the server of `make up`.

Prefect asks for `train-all/train-all`, flow and deployment, and for an address in PREFECT_API_URL. The hook
in this module, an entry point of the group `prefect.plugins`, runs whenever `prefect` is imported, before
the command line reads its arguments, and so may complete both.

Plugins are off unless the `pyproject.toml` of the current folder turns them on. In a sub-folder, such as
examples/digits, `prefect` is therefore as it came; name the pipeline instead, from the project's folder
(`-p pipeline=examples/digits`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefect.plugins import HookContext, SetupResult, register_hook

from resgrid.errors import suggest

DEPLOYMENTS = ("train-all", "train-cell", "prepare-data")  # those of prefect.yaml, each called like its flow


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Called by Prefect, by keyword: pluggy finds no plain `ctx` in the hook that Prefect declares.

    Ends the program for `deployment run` with no server to ask, and in no other case.
    """
    if Path(sys.argv[0]).name not in ("prefect", "-m"):  # a script or a test chooses its own server
        return None
    asked = _complete(sys.argv)
    if "PREFECT_API_URL" in os.environ:
        return None
    from tasks.services import no_proxy, running

    if addresses := running(Path()):
        return SetupResult(env={"PREFECT_API_URL": f"{addresses[0]}/api", **no_proxy()})
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
    begin = next((i for i in range(len(arguments)) if arguments[i - 2 : i] == ["deployment", "run"]), None)
    if begin is None:
        return False
    for i in range(begin, len(arguments)):
        name, before = arguments[i], arguments[i - 1]
        is_value = before.startswith("-") and before != "--watch"
        if is_value or name.startswith("-") or "/" in name:
            continue
        if name not in DEPLOYMENTS:
            near = suggest(name, DEPLOYMENTS)
            sys.exit(
                f"prefect: there is no deployment {name!r}{near} This project has {', '.join(DEPLOYMENTS)}."
            )
        arguments[i] = f"{name}/{name}"
    return not {"--help", "-h"} & set(arguments)
