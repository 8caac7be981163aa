"""Where runs are: one SQLite store in the project's root, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import url2pathname

from filelock import FileLock

from resgrid.config import InitialWeights, MlflowWeights
from resgrid.errors import ConnectionLost, ResgridError
from resgrid.provenance import experiment
from resgrid.run_status import WEIGHTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {  # environment variables that MLflow reads; whoever has set one keeps it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away is noticed in 10 s, not in 5 minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "GIT_PYTHON_REFRESH": "quiet",  # no warning on a machine without git
}

QUIET_SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 9 processes and 10 s that serve nothing here
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PYTHONWARNINGS": "ignore",
}

ADDRESSES = (  # table and column, in MLflow's database
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class StoreAway(ConnectionLost):
    """The store does not answer, or not as it should: asked again, it may."""


@dataclass(frozen=True)
class Store:
    """An experiment in a tracking store, ready to take runs."""

    uri: str
    name: str
    experiment_id: str
    client: MlflowClient


def project_root(folder: Path | None = None) -> Path:
    """The nearest folder with a .dvc or .git, from `folder` (the current one) upwards, or itself."""
    folder = (folder or Path.cwd()).resolve()
    for each in (folder, *folder.parents):
        if (each / ".dvc").exists() or (each / ".git").exists():
            return each
    return folder


def store_uri(folder: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI, or else the SQLite file in the project's root, whichever pipeline asks.

    An experiment of DVC's takes the project's too, for the copy that it runs in is deleted.
    """
    made = experiment()
    root = made.project if made else project_root(folder)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    if database := _database(uri):  # absolute: relative, it would be another file in each folder
        return f"sqlite:///{(folder or Path.cwd()).resolve() / database}"
    return uri


def open_store(name: str, folder: Path | None = None) -> Store:
    """The experiment `name` in the store; both are made if need be, by any number of processes at once.

    Raises StoreAway if the store is damaged or away, and ResgridError if it has the experiment among its
    deleted ones, or keeps artifacts in a folder of another machine.
    """
    uri = store_uri(folder)
    try:
        client, lock = _connect(uri)
        with lock:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                # Frozen from now on, so it must be absolute. A server has a place of its own.
                place = None if is_remote(uri) else (_artifact_root(uri) / name).as_uri()
                experiment = client.get_experiment(client.create_experiment(name, place))
    except Exception as error:  # SQLAlchemy's, sqlite3's, MLflow's, requests', the system's
        raise unusable(uri, error) from None
    if experiment.lifecycle_stage == "deleted":
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} was deleted there. "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` brings it back, "
            "`mlflow gc` removes it for good; or give the pipeline another name in params.yaml."
        )
    if is_remote(uri) and not _is_within_reach(experiment.artifact_location):
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} keeps its artifacts in {experiment.artifact_location}, a "
            "folder that is not on this machine. Start that server with --artifacts-destination, on a store "
            "of its own, so that it takes them itself."
        )
    return Store(uri, name, experiment.experiment_id, client)


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
    kept = project_root() / ".resgrid" / "weights"
    try:
        client, _ = _connect(uri)
        run_id = _source_run(client, model)
        cell = client.get_run(run_id).data.tags.get("cell", "run")
        path = kept / f"{cell}-{run_id}.safetensors"
        if not path.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept) as part:
                Path(client.download_artifacts(run_id, WEIGHTS, part)).replace(path)
    except Exception as error:
        raise ResgridError(
            f"{what} gives no {WEIGHTS} in MLflow at {shown(uri)} ({reason(error)}). {advice}"
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
            _readdress(connection, _artifact_root(uri))
        return MlflowClient(uri), lock


def _readdress(connection: sqlite3.Connection, artifacts: Path) -> None:
    """Where the folder was moved or copied, let the store's absolute addresses be those of its files here."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return
    here = artifacts.as_uri()
    for name, address in connection.execute("SELECT name, artifact_location FROM experiments").fetchall():
        own = (artifacts / name).as_uri().removeprefix(here)
        former = str(address).removesuffix(own)
        is_ours = str(address).endswith(f"/{artifacts.name}{own}") and (artifacts / name).is_dir()
        if not is_ours or former == here:
            continue
        with connection:  # all of them or none
            for table, column in ADDRESSES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ?1 || substr({column}, ?2) "
                    f"WHERE substr({column}, 1, ?2) = ?3 || '/'",
                    (here, len(former) + 1, former),
                )


def _is_within_reach(artifacts: str) -> bool:
    """Whether a client has the folder that a server names, into which clients write artifacts themselves."""
    folder = url2pathname(urlparse(artifacts).path) if artifacts.startswith("file:") else artifacts
    return not folder.startswith("/") or Path(folder).parent.is_dir()


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def is_remote(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _artifact_root(uri: str) -> Path:
    database = _database(uri)
    return (database.parent if database else project_root()) / "mlruns"


def unusable(uri: str, error: Exception) -> StoreAway:
    if "out-of-date database schema" in str(error):
        return StoreAway(
            f"{shown(uri)}: another version of MLflow than this {version('mlflow')} made the database, which "
            f"stays as it is. An older one: copy it, then run `mlflow db upgrade {shown(uri)}`. A newer one: "
            f"install that version again, or have MLFLOW_TRACKING_URI name another store."
        )
    return StoreAway(
        f"{shown(uri)}: MLflow's store cannot be used ({reason(error)}). Check that it is there and whole; "
        "MLFLOW_TRACKING_URI names another one."
    )


def reason(error: Exception) -> str:
    """One line of what went wrong."""
    line = (shown(str(error)).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:157] + '...'}"


def shown(text: str) -> str:
    """`text` with its URLs less user, password and query."""
    return re.sub(r"(\w://)(?:[^/\s]*@)?([^\s?]*)(\?\S*)?", r"\1\2", text)
