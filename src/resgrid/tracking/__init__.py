"""MLflow: every cell as one run in the pipeline's experiment, to be compared on its pages.

The only package that imports mlflow, and only when something is to be logged or read: that takes 3 seconds,
and opening a store 2 more.

MLflow is a mirror of the run folders: `sync` fills it from them, and anew where it was deleted. One function,
`mirror`, logs a training; while it trains from a thread of its own, so that no server holds it up (`live`).

Tags say what a run is: `key` names the training, `weights_sha256` its result; `synced`, set last, says that
the run is complete; `grid` is `current` on one run a cell, `stale` on that of a cell that is another by now,
`superseded` on all other trainings of it, and `experiment` on those that DVC's experiments have made, until
`dvc exp apply` and `sync` make them current.
"""

from resgrid.tracking.from_files import sync as sync
from resgrid.tracking.live import LiveRun as LiveRun
from resgrid.tracking.store import Store as Store
from resgrid.tracking.store import fetch_weights as fetch_weights
from resgrid.tracking.store import find_weights as find_weights
from resgrid.tracking.store import open_store as open_store
from resgrid.tracking.store import shown as shown
from resgrid.tracking.store import store_uri as store_uri
from resgrid.tracking.view import WORK as WORK
from resgrid.tracking.view import serve as serve
