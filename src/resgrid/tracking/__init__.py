"""MLflow: every cell as one run in the pipeline's experiment, to be compared on its pages.

The only package that imports mlflow, and only when something is to be logged or read: that takes 3 seconds,
and opening a store 2 more.

A cell's run comes about in two ways. Training logs live, from a thread of its own, so that neither these
seconds nor a server that hangs hold it up (`live`). And since DVC may restore a cell without running
anything, `sync` gives each current cell its run from the files in `runs/<cell>/` (`from_files`). Both end in
`complete` (`contents`), which adds what is missing and leaves alone what is there.

Three tags say what a run is: `weights_sha256` names the result that it records; `synced`, set last, says that
it is complete; `grid` is `current` on one run a cell, `stale` on that of a cell that is another by now,
`superseded` on those of replaced weights, and `experiment` on those that DVC's experiments have made, until
`dvc exp apply` and `sync` make them current.
"""

from resgrid.tracking.from_files import SyncReport, sync
from resgrid.tracking.live import LiveRun
from resgrid.tracking.registry import find_weights
from resgrid.tracking.shared import shared_checkpoints
from resgrid.tracking.store import Store, fetch_weights, open_store, project_root, shown, store_uri
from resgrid.tracking.view import WORK, serve

__all__ = [
    "WORK",
    "LiveRun",
    "Store",
    "SyncReport",
    "fetch_weights",
    "find_weights",
    "open_store",
    "project_root",
    "serve",
    "shared_checkpoints",
    "shown",
    "store_uri",
    "sync",
]
