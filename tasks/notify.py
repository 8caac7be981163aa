"""`resgrid notify`: Prefect's automations, set up to tell when a grid has ended or a cell has failed.

All of it is Prefect's and stands on its pages under Automations and Blocks, to be changed there: a
notification block called `resgrid`, and an automation for each row of EVENTS.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from resgrid.errors import ResgridError
from tasks.services import running

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock

NAME = "resgrid"
ENDS = ("Completed", "Failed", "Crashed", "Cancelled")
# An automation's name: of which kind of run, of which flow, the states, and what is said.
EVENTS = {
    "ResGrid: a grid has ended": (
        "flow-run", "train-all", ENDS,
        "{{ flow.name }}: {{ flow_run.state.name }}", "{{ flow_run.state.message }}\n{{ flow_run | ui_url }}",
    ),
    "ResGrid: a cell has failed": (
        "task-run", "train-all", ("Failed",),
        "{{ task_run.name }} failed", "{{ task_run.state.message }}\n{{ task_run | ui_url }}",
    ),
    "ResGrid: a cell in a work pool has failed": (
        "flow-run", "train-cell", ("Failed", "Crashed"),
        "{{ flow_run.name }} failed", "{{ flow_run.state.message }}\n{{ flow_run | ui_url }}",
    ),
}  # fmt: skip


def notify(root: Path, url: str) -> str:
    """Tell `url` from now on, in place of an earlier address; a message to try it goes there first.

    Raises ResgridError for an address that does not take the message, and where no Prefect server is up.
    """
    _find_server(root)
    import httpx
    from prefect.automations import Automation, EventTrigger, Posture, SendNotification
    from prefect.blocks.abstract import NotificationError

    place = urlsplit(url).hostname or url
    try:
        block: Any = _block(url)  # Prefect types what is called here as it is in asynchronous code
        with block.raise_on_failure():
            block.notify("Here you will be told when a grid ends or a cell fails.", subject="ResGrid")
    except (NotificationError, httpx.HTTPError, ValueError) as error:
        why = getattr(error, "log", str(error)).strip().replace(url, place)  # which may hold a password
        raise ResgridError(
            f"notify: {place} did not take the message: {why or 'the address cannot be used'}"
        ) from None
    remove(root)
    number = block.save(NAME)
    for name, (kind, flow, states, subject, body) in EVENTS.items():
        Automation(
            name=name,
            trigger=EventTrigger(
                expect={f"prefect.{kind}.{state}" for state in states},
                match={"prefect.resource.id": f"prefect.{kind}.*"},
                match_related={"prefect.resource.role": "flow", "prefect.resource.name": flow},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[SendNotification(block_document_id=number, subject=subject, body=body)],
        ).create()
    return f"{place} has got a message to try it. `resgrid notify --remove` ends it."


def remove(root: Path) -> str:
    """Take the block and the automations away, as far as they are there."""
    _find_server(root)
    from prefect.automations import Automation
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook

    for name in EVENTS:
        with suppress(ValueError):  # there is none of this name
            automation: Any = Automation.read(name=name)
            automation.delete()
    for kind in (CustomWebhookNotificationBlock, SlackWebhook):
        with suppress(ValueError):
            kind.delete(NAME)
    return "Nobody is told any more."


def _block(url: str) -> NotificationBlock:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook

    address = urlsplit(url)
    if address.scheme in ("http", "https") and not (address.hostname or "").startswith("hooks.slack"):
        key = "content" if address.hostname == "discord.com" else "text"
        return CustomWebhookNotificationBlock(name=NAME, url=url, json_data={key: "{{subject}}\n{{body}}"})
    # Prefect has no block for a mail server; this one hands whatever is not Slack's to Apprise, which knows
    # mail servers and a hundred services.
    return SlackWebhook(url=url)


def _find_server(root: Path) -> None:
    """Before Prefect is imported, which starts a server of its own where it is told of none."""
    found = running(root)
    if found:
        os.environ.setdefault("PREFECT_API_URL", f"{found.prefect}/api")
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    if "PREFECT_API_URL" not in os.environ:
        raise ResgridError(
            "notify: no Prefect server of this project is up. Start it: `make up`, in another terminal."
        )
