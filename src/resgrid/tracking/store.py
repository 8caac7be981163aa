"""Where runs are: one SQLite store in the project's root, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import subprocess
import tempfile
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from filelock import FileLock

from resgrid.config import InitialWeights, MlflowWeights, load_params
from resgrid.errors import ConnectionLost, ResgridError
from resgrid.grid import find_cell
from resgrid.project import nearest, project_root
from resgrid.provenance import experiment
from resgrid.run_status import WEIGHTS, refuse_diverged, trained_run

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
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 9 processes and 10 s that serve nothing here
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # of a server's
}
REGISTRY = "MLFLOW_REGISTRY_URI"  # where models are registered, unless in the store
PIPELINE = "pipeline"  # the experiment's tag: whose it is
CHAMPION = "champion"  # the alias of the best of a registered model

log = logging.getLogger(__name__)


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
    made, uri = experiment(), os.environ.get("MLFLOW_TRACKING_URI")
    database = _database(uri) if uri else (made.project if made else project_root(folder)) / "mlflow.db"
    if database is None:
        return str(uri)
    # Absolute: relative, it would be another file in each folder.
    path = str((folder or Path.cwd()).resolve() / database)
    quoted = quote(path, safe="".join(chr(i) for i in range(33, 127) if chr(i) not in "%?") + " ")
    # `sqlite:///` alone has MLflow make the folder of the path as it is quoted, beside that of the database.
    return f"sqlite:///{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def open_store(name: str, folder: Path | None = None, rebuild: bool = False) -> Store:
    """The experiment `name` in the store; both are made if need be, by any number of processes at once.

    With `rebuild` an experiment of that name is renamed, and a new one takes its place.

    Raises ConnectionLost if the store is damaged or away, and ResgridError if the experiment is another
    pipeline's, was deleted, or keeps its files in another folder: of the checkout that this one is a copy of,
    or of another machine.
    """
    uri, ours = store_uri(folder), pipeline_identity(folder)
    # Frozen when the experiment is made, so it must be absolute. A server has a place of its own.
    place = (_artifact_root(uri) / name).as_uri() if is_local(uri) else None
    try:
        client, lock = _connect(uri)
        with lock:
            present = client.get_experiment_by_name(name)
            if present is not None:
                _check_owner(uri, present, ours)
                if rebuild:
                    now = datetime.now().isoformat(" ", "seconds")
                    client.rename_experiment(present.experiment_id, f"{name} (before {now})")
            if present is None or rebuild:
                present = client.get_experiment(client.create_experiment(name, place, {PIPELINE: ours}))
    except (ResgridError, ImportError):  # a machine with torch alone has no MLflow
        raise
    except Exception as error:  # SQLAlchemy's, sqlite3's, MLflow's, requests', the system's
        raise unusable(uri, error) from None
    where = str(present.artifact_location)
    if place not in (None, where):
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} keeps its files in {where}: this checkout was moved or "
            "copied, and nothing is recorded here until `resgrid sync --rebuild` has filled a new experiment "
            "from the run folders."
        )
    path = unquote(where.removeprefix("file://"))
    if place is None and path.startswith("/") and not Path(path).parent.is_dir():
        raise ResgridError(
            f"{shown(uri)}: the server keeps the files of {name!r} in {where}, and this machine has no such "
            "folder. A server with `--artifacts-destination` takes them, in an experiment of another `name`."
        )
    return Store(uri, name, present.experiment_id, client)


def pipeline_identity(folder: Path | None = None) -> str:
    """`<first commit>:<path>` of a pipeline's folder: the same in a clone, in a moved checkout, on a worker.

    The path is below the root of git's repository. Where git knows no first commit (there is none, a shallow
    clone) that part is empty.
    """
    folder = (folder or Path.cwd()).resolve()

    def git(*arguments: str) -> list[str]:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
            )
        except OSError:
            return []
        return done.stdout.split()

    is_whole = git("rev-parse", "--is-shallow-repository") == ["false"]
    first = git("rev-list", "--max-parents=0", "HEAD")[-1:] if is_whole else []
    return f"{''.join(first)}:{folder.relative_to(nearest(folder, '.git') or project_root(folder))}"


def _check_owner(uri: str, present: Experiment, ours: str) -> None:
    """Raises ResgridError for an experiment that was deleted, or is another pipeline's."""
    name, number = present.name, present.experiment_id
    if present.lifecycle_stage == "deleted":
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} was deleted there. "
            f"`mlflow experiments restore --experiment-id {number}` brings it back."
        )
    theirs = present.tags.get(PIPELINE, ours)
    (commit, _, path), (our_commit, _, our_path) = theirs.partition(":"), ours.partition(":")
    if path != our_path or (commit and our_commit and commit != our_commit):
        raise ResgridError(
            f"{shown(uri)}: the experiment {name!r} belongs to another pipeline, in the folder {path} of the "
            f"repository that begins with commit {commit[:10] or 'unknown'}. Give this one another `name` in "
            "params.yaml. If that pipeline is this one, moved, free the name by `mlflow experiments rename "
            f"--experiment-id {number} --new-name '{name} (old)'`, then `resgrid sync`."
        )


def fetch_weights(initial: InitialWeights) -> Path | None:
    """The weights file of `initial_weights: {name: mlflow}`, as `fetch` gets it; None of other kinds."""
    if not isinstance(initial, MlflowWeights):
        return None
    return fetch(initial.uri, f"initial_weights: {initial.uri}")


def fetch(model: str, what: str) -> Path:
    """The weights file of a run (`runs:/ID`), of a version or an alias of a registered model
    (`models:/NAME/3`, `models:/NAME@best`), or of a logged model (`models:/m-ID`), in `.resgrid/weights`.

    Of a model it is the weights of its source run. Raises ResgridError, which begins with `what`, if there is
    no such thing, or it has no weights file.
    """
    uri, folder = store_uri(), project_root() / ".resgrid/weights"
    asked = (os.environ.get(REGISTRY) or uri) if model.startswith("models:/") else uri
    try:
        client, _ = _connect(uri)
        run_id = _source_run(client, model)
        asked, run = uri, client.get_run(run_id)
        place = str(run.info.artifact_uri)
        if is_local(uri) and not place.startswith(f"{_artifact_root(uri).as_uri()}/"):
            raise ResgridError(f"its run {run_id} has its files elsewhere, in {place}")
        path = folder / f"{run.data.tags.get('cell', 'run')}-{run_id}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as part:
                Path(client.download_artifacts(run_id, WEIGHTS, part)).replace(path)
    except Exception as error:
        raise ResgridError(
            f"{what} gives no {WEIGHTS} in MLflow at {shown(asked)} ({reason(error)}). After `dvc repro`, "
            "`resgrid sync` brings there what is trained here and names the champion; `resgrid ui` shows it."
        ) from None
    return path


def _source_run(client: MlflowClient, uri: str) -> str:
    kind, _, name = uri.partition(":/")
    model, _, version = name.partition("/")
    registered, _, alias = name.partition("@")
    if kind == "runs":
        return model
    if alias:
        return str(client.get_model_version_by_alias(registered, alias).run_id)
    if version:
        return str(client.get_model_version(model, version).run_id)
    return str(client.get_logged_model(model).source_run_id)


def find_weights(model: str, runs: Path) -> tuple[Path, str]:
    """The weights file meant by `champion`, a file's path, a `models:/` or `runs:/` URI, or a cell's id; and
    what to call it, which names the cell.

    Of a cell it is the one in the folder `runs`, checked against its record; one that is not the cell's as it
    is now is used all the same, with a warning. Raises ResgridError if there is no such thing.
    """
    uri = model
    if model == CHAMPION:
        name = load_params().name
        open_store(name)  # raises where the name is another pipeline's
        uri = f"models:/{name}@{CHAMPION}"
    if uri.startswith(("models:/", "runs:/")):
        path = fetch(uri, f"--model {model}")
        return path, f"{model} ({path.stem.rpartition('-')[0]})"
    if Path(model).is_file() or model.endswith(".safetensors"):
        return Path(model), model
    run = trained_run(find_cell(load_params(), model), runs.parent)
    refuse_diverged(run)
    if not run.is_current:
        log.warning("%s is %s: %s", model, run.status, run.reason)
    return run.folder / WEIGHTS, model


def server(uri: str, port: int) -> list[str]:
    """The command `mlflow server …` for a local store, on loopback alone."""
    _artifact_root(uri).mkdir(parents=True, exist_ok=True)
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [*command, "--backend-store-uri", uri, "--default-artifact-root", _artifact_root(uri).as_uri()]


def _connect(uri: str) -> tuple[MlflowClient, FileLock | nullcontext[None]]:
    """A client, and the lock under which something may be made in its store."""
    os.environ |= SETTINGS | os.environ
    from mlflow import MlflowClient

    for logger in ("mlflow", "alembic", "urllib3"):  # an error is reported here, once
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    database = _database(uri)
    if database is None:
        return MlflowClient(uri), nullcontext()

    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # 2 s that are better not spent under the lock

    lock = FileLock(store_folder(uri) / ".resgrid/mlflow.lock", timeout=120)
    with lock:  # several that make the tables at once break the migration
        with closing(sqlite3.connect(database, timeout=20)) as connection:  # fails at once on a damaged file
            connection.execute("PRAGMA journal_mode=WAL")  # reads beside a write; the file remembers it
        return MlflowClient(uri), lock


def _database(uri: str) -> Path | None:
    match = re.match(r"sqlite(?:\+pysqlite)?:///([^?]+)", uri)
    return Path(unquote(match[1])) if match else None


def is_local(uri: str) -> bool:
    """Whether it is a file of this machine."""
    return _database(uri) is not None


def store_folder(uri: str) -> Path:
    """Where the database lies, with artifacts and locks beside it."""
    return (_database(uri) or project_root() / "mlflow.db").parent


def _artifact_root(uri: str) -> Path:
    return store_folder(uri) / "mlruns"


def unusable(uri: str, error: Exception) -> ConnectionLost:
    """What to raise for an error of the store, or the registry, at `uri`."""
    return ConnectionLost(f"{shown(uri)}: MLflow does not answer as it should: {reason(error)}")


def reason(error: Exception) -> str:
    """One line of what went wrong: of the network what the system says, where the library names the address
    with its secrets; of all else the whole text, since a remedy often stands at its end."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionError | TimeoutError | socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return f"{type(cause or error).__name__}: {' '.join(shown(str(cause or error)).split())}"


def shown(text: str) -> str:
    """`text` with its URLs less user, password and query."""
    return re.sub(r"(\w://)(?:[^/\s]*@)?([^\s?]*)(\?\S*)?", r"\1\2", text)
