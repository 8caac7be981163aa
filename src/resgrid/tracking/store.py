"""Where runs are: one SQLite store in the project's root, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import subprocess
import tempfile
import urllib.request
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlparse
from urllib.request import url2pathname

from filelock import FileLock

from resgrid.config import InitialWeights, MlflowWeights
from resgrid.errors import ConnectionLost, ResgridError
from resgrid.project import denied
from resgrid.project import project_root as project_root
from resgrid.provenance import experiment
from resgrid.run_status import WEIGHTS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

SETTINGS = {  # environment variables that MLflow reads; whoever has set one keeps it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away is noticed in 10 s, not in 5 minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where `--json` prints JSON and nothing else
    "GIT_PYTHON_REFRESH": "quiet",  # no warning on a machine without git
}

QUIET_SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 9 processes and 10 s that serve nothing here
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}

OURS = "3"  # of MLflow, as pyproject.toml has it
PIPELINE = "pipeline"  # the experiment's tag: whose it is
# `sqlite:///` alone has MLflow make the folder of the path as it is quoted, beside that of the database.
QUOTED = "sqlite+pysqlite:///"


class StoreAway(ConnectionLost):
    """The store does not answer, or not as it should: asked again, it may."""


@dataclass(frozen=True)
class Store:
    """An experiment in a tracking store, ready to take runs."""

    uri: str
    name: str
    experiment_id: str
    client: MlflowClient


def store_uri(folder: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI, or else the SQLite file in the project's root, whichever pipeline asks.

    An experiment of DVC's takes the project's too, for the copy that it runs in is deleted.
    """
    made = experiment()
    root = made.project if made else project_root(folder)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    database = _database(uri) if uri else root / "mlflow.db"
    if uri and not database:
        return uri
    # Absolute: relative, it would be another file in each folder.
    path = str((folder or Path.cwd()).resolve() / str(database))
    quoted = quote(path, safe="".join(chr(i) for i in range(33, 127) if chr(i) not in "%?") + " ")
    return f"sqlite:///{path}" if quoted == path else f"{QUOTED}{quoted}"


def open_store(name: str, folder: Path | None = None, rebuild: bool = False) -> Store:
    """The experiment `name` in the store; both are made if need be, by any number of processes at once.

    With `rebuild` an experiment of that name is renamed, and a new one takes its place.

    Raises StoreAway if the store is damaged or away, and ResgridError if the experiment is another
    pipeline's, was deleted, or keeps its files in another folder: of the checkout that this one is a copy of,
    or of another machine.
    """
    uri, ours = store_uri(folder), pipeline_identity(folder)
    # Frozen when the experiment is made, so it must be absolute. A server has a place of its own.
    place = None if is_remote(uri) else (_artifact_root(uri) / name).as_uri()
    try:
        client, lock = _connect(uri)
        with lock:
            found = client.get_experiment_by_name(name)
            if found is not None:
                _check_experiment(uri, found, ours)
            if found is not None and rebuild:
                now = datetime.now().isoformat(" ", "seconds")
                client.rename_experiment(found.experiment_id, f"{name} (before {now})")
            if found is None or rebuild:
                found = client.get_experiment(client.create_experiment(name, place, {PIPELINE: ours}))
            elif is_local(uri) and _path(found.artifact_location).resolve() != _path(str(place)).resolve():
                raise ResgridError(
                    f"{shown(uri)}: the experiment {name!r} keeps its files in {found.artifact_location}: "
                    "this checkout was moved or copied, and nothing is recorded here until "
                    "`resgrid sync --rebuild` has filled a new experiment from the run folders."
                )
            elif PIPELINE not in found.tags:
                client.set_experiment_tag(found.experiment_id, PIPELINE, ours)
    except ResgridError:
        raise
    except Exception as error:  # SQLAlchemy's, sqlite3's, MLflow's, requests', the system's
        raise unusable(uri, error) from None
    if is_remote(uri) and not _is_within_reach(found.artifact_location):
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} keeps its artifacts in {found.artifact_location}, a "
            "folder that is not on this machine. Start that server with --artifacts-destination, on a store "
            "of its own, so that it takes them itself."
        )
    return Store(uri, name, found.experiment_id, client)


def pipeline_identity(folder: Path | None = None) -> str:
    """`<first commit>:<path>` of a pipeline's folder: the same in a clone, in a moved checkout, on a worker.

    The path is below the root of git's repository. Where git knows no first commit (there is none, a shallow
    clone) that part is empty.
    """
    folder = (folder or Path.cwd()).resolve()

    def git(*arguments: str) -> list[str]:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        return done.stdout.splitlines()

    known = git("rev-parse", "--is-shallow-repository", "--show-prefix")
    if not known:
        return f":{folder.relative_to(project_root(folder))}"
    first = git("rev-list", "--max-parents=0", "HEAD")[-1:] if known[0] == "false" else []
    return f"{''.join(first)}:{''.join(known[1:]).rstrip('/') or '.'}"


def _check_experiment(uri: str, found: Experiment, ours: str) -> None:
    """Raises ResgridError for an experiment that was deleted, or is another pipeline's."""
    name, number = found.name, found.experiment_id
    if found.lifecycle_stage == "deleted":
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} was deleted there. "
            f"`mlflow experiments restore --experiment-id {number}` brings it back, "
            "`mlflow gc` removes it for good; or give the pipeline another name in params.yaml."
        )
    theirs = found.tags.get(PIPELINE, ours)
    (commit, _, path), (our_commit, _, our_path) = theirs.partition(":"), ours.partition(":")
    if path != our_path or (commit and our_commit and commit != our_commit):
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} belongs to another pipeline, in the folder {path} of the "
            f"repository that begins with commit {commit[:10] or 'unknown'}. Give this one another `name` in "
            "params.yaml. If that pipeline is this one, moved, free the name by `mlflow experiments rename "
            f"--experiment-id {number} --new-name '{name} (old)'`, then `resgrid sync`."
        )


def fetch_weights(initial: InitialWeights) -> Path | None:
    """The weights file of `initial_weights: {name: mlflow}`, kept in `.resgrid/weights`; None of other kinds.

    Raises ResgridError as `fetch` does.
    """
    if not isinstance(initial, MlflowWeights):
        return None
    return fetch(initial.uri, f"initial_weights: {initial.uri}")


def fetch(
    model: str,
    what: str,
    advice: str = "Name a run, or the model of a run, that ResGrid has made; `resgrid ui` shows them.",
) -> Path:
    """The weights file of a run (`runs:/ID`), of a version or an alias of a registered model
    (`models:/NAME/3`, `models:/NAME@best`), or of a logged model (`models:/m-ID`), in `.resgrid/weights`.

    Of a model it is the weights of its source run. Raises ResgridError, which begins with `what`, if there is
    no such thing, or it has no weights file.
    """
    uri = store_uri()
    asked = registry_uri(uri) if model.startswith("models:/") else uri
    kept = project_root() / ".resgrid" / "weights"
    try:
        client, _ = _connect(uri)
        run_id = _source_run(client, model)
        asked, run = uri, client.get_run(run_id)
        place = _path(run.info.artifact_uri).resolve()
        if is_local(uri) and _artifact_root(uri).resolve() not in place.parents:
            raise ResgridError(f"its run {run_id} has its files elsewhere, in {run.info.artifact_uri}")
        cell = run.data.tags.get("cell", "run")
        path = kept / f"{cell}-{run_id}.safetensors"
        if not path.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept) as part:
                Path(client.download_artifacts(run_id, WEIGHTS, part)).replace(path)
    except Exception as error:
        raise ResgridError(
            f"{what} gives no {WEIGHTS} in MLflow at {shown(asked)} ({reason(error)}). {advice}"
        ) from None
    return path


def fetched_cell(path: Path) -> str:
    """The cell of a weights file from `fetch`."""
    return path.stem.rpartition("-")[0]


def _source_run(client: MlflowClient, uri: str) -> str:
    kind, _, name = uri.partition(":/")
    if kind == "runs":
        return name.split("/")[0]
    model, _, version = name.partition("/")
    registered, _, alias = name.partition("@")
    if alias:
        run_id = client.get_model_version_by_alias(registered, alias).run_id
    elif version:
        run_id = client.get_model_version(model, version).run_id
    else:
        run_id = client.get_logged_model(model).source_run_id
    if not run_id:
        raise ResgridError("the model has no source run")
    return run_id


def server(uri: str, port: int) -> list[str]:
    """The command `mlflow server …` for a local store, on loopback alone."""
    _artifact_root(uri).mkdir(parents=True, exist_ok=True)
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*command, "--backend-store-uri", uri, "--default-artifact-root", _artifact_root(uri).as_uri()]


def _connect(uri: str) -> tuple[MlflowClient, FileLock | nullcontext[None]]:
    """A client, and the lock under which something may be made in its store."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for logger in ("mlflow", "alembic", "urllib3"):  # a failure is said here, once
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    database = _database(uri)
    if database is None:
        return MlflowClient(uri), nullcontext()

    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # 2 s that are better not spent under the lock

    state = database.parent / ".resgrid"
    state.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / "mlflow.lock", timeout=120)
    with lock:  # several that make the tables at once break the migration
        with closing(sqlite3.connect(database, timeout=20)) as connection:  # fails at once on a damaged file
            connection.execute("PRAGMA journal_mode=WAL")  # reads beside a write; the file remembers it
        return MlflowClient(uri), lock


def _is_within_reach(artifacts: str) -> bool:
    """Whether a client has the folder that a server names, into which clients write artifacts themselves."""
    folder = _path(artifacts)
    return not folder.is_absolute() or folder.parent.is_dir()


def _path(location: str) -> Path:
    """Of a file: URI, or of a plain path."""
    return Path(url2pathname(urlparse(location).path) if location.startswith("file:") else location)


def _database(uri: str) -> Path | None:
    match = re.match(r"sqlite(?:\+pysqlite)?:///([^?]+)", uri)
    return Path(unquote(match[1])) if match else None


def is_local(uri: str) -> bool:
    """Whether it is a file of this machine."""
    return _database(uri) is not None


def is_remote(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def sync_lock(uri: str) -> FileLock:
    """One `sync` at a time on this machine, for a store."""
    database = _database(uri)
    state = (database.parent if database else project_root()) / ".resgrid"
    state.mkdir(parents=True, exist_ok=True)
    return FileLock(state / "sync.lock")


def _artifact_root(uri: str) -> Path:
    database = _database(uri)
    return (database.parent if database else project_root()) / "mlruns"


def unusable(uri: str, error: Exception) -> ResgridError:
    """What to raise for an error of the store, or the registry, at `uri`."""
    if "out-of-date database schema" in str(error):
        return StoreAway(
            f"{shown(uri)}: another version of MLflow than this {version('mlflow')} made the database, which "
            f"stays as it is. An older one: copy it, then run `mlflow db upgrade {shown(uri)}`. A newer one: "
            f"install that version again, or have MLFLOW_TRACKING_URI name another store."
        )
    if is_remote(uri) and (theirs := _server_version(uri)).partition(".")[0] not in ("", OURS):
        return ResgridError(
            f"{shown(uri)}: the server runs MLflow {theirs}, and ResGrid needs one of version {OURS} "
            f"({reason(error)})."
        )
    if (database := _database(uri)) and (path := denied(database, database.parent / "mlruns")):
        return StoreAway(f"Permission denied: {path}. It belongs to another user, or its mode is wrong.")
    return StoreAway(f"{shown(uri)}: MLflow does not answer as it should: {reason(error)}")


def _server_version(uri: str) -> str:
    """Empty where it says none."""
    try:
        with urllib.request.urlopen(f"{shown(uri).rstrip('/')}/version", timeout=3) as answer:
            return str(answer.read(40).decode().strip())
    except (OSError, ValueError, HTTPException):
        return ""


def registry_uri(uri: str) -> str:
    """Where the models of the store at `uri` are registered."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or uri


def reason(error: Exception) -> str:
    """One line of what went wrong: of the network what the system says, of all else the whole text, since a
    remedy often stands at its end."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError | socket.gaierror):
            return f"{type(cause).__name__}: {cause}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {' '.join(shown(str(error)).split())}"


def shown(text: str) -> str:
    """`text` with its URLs less user, password and query."""
    return re.sub(r"(\w://)(?:[^/\s]*@)?([^\s?]*)(\?\S*)?", r"\1\2", text)
