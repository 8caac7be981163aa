"""A grid: its cells and numbers, what runs, what came out, and the services."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resgrid.commands import LOCK, REPORTS
from resgrid.config import load_params, read_params_file
from resgrid.grid import compared_factors, expand
from resgrid.progress import Progress, amount
from resgrid.project import project_root

if TYPE_CHECKING:
    import pandas as pd


def cells(options: argparse.Namespace) -> None:
    cells = expand(load_params())
    if options.json:
        fields = ("study", "rate_factor", "changes")
        rows = [
            {"cell": each.id} | {key: getattr(each, key) for key in fields} | each.numbers for each in cells
        ]
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(cell.id for cell in cells))


def set_numbers(options: argparse.Namespace) -> None:
    from resgrid import edit

    path = Path("params.yaml")
    read_params_file(path)  # refuses what is missing or no YAML
    old = path.read_text(encoding="utf-8")
    new = edit.assign(old, options.assignments)
    if not options.dry_run:
        path.write_text(new, encoding="utf-8")
    print("\n".join(edit.changed_lines(old, new)) or "Nothing changes: these are the values already.")


def compare(options: argparse.Namespace) -> None:
    from resgrid.report.leaderboard import read_findings, read_leaderboard
    from resgrid.results import load

    read_leaderboard(REPORTS)  # without one there is no comparison
    frame = load().results
    if options.json:
        print(frame.to_json(orient="records", indent=2))
    else:
        show(frame, read_findings(REPORTS))


def show(frame: pd.DataFrame, findings: dict[str, Any]) -> None:
    """The comparison on the terminal, and what is missing from it.

    Sentences are those of `findings`, which are left out once other weights are current than it scored.
    """
    from resgrid.report.leaderboard import by_optimizer, missing, readable, text_table

    current = frame[frame["status"].isin(["completed", "diverged"])]
    weights = dict(zip(current["cell"], current["weights_sha256"], strict=True))
    print("\nTest accuracy in %, with the weights of the last epoch:\n")
    print(text_table(by_optimizer(frame, compared_factors(findings, weights)).reset_index()))
    print(f"\n{findings['baseline']}")
    if weights == findings["weights_sha256"]:
        print("\n".join([*findings["answer"], *findings.get("rate_sentences", ())]))
    else:
        print("Results have changed since they were compared: `dvc repro -s evaluate` compares them.")
    print(f"\n{text_table(readable(frame))}")
    if lines := missing(frame):
        print("\n" + "\n  ".join(lines))


def sync(options: argparse.Namespace) -> int:
    from resgrid import tracking
    from resgrid.dvc.lock import refuse_conflict

    params = load_params()
    refuse_conflict(LOCK)
    with Progress("sync", None, "cells") as progress:
        report = tracking.sync(params, Path.cwd(), progress.update, options.rebuild)
    print(json.dumps(asdict(report), indent=2) if options.json else report)
    return 1 if "damaged" in report.cells.values() else 0


def ui(options: argparse.Namespace) -> None:
    from resgrid import tracking

    sync(argparse.Namespace(json=False, rebuild=False))
    tracking.serve(options.port, load_params().name)


def gc(options: argparse.Namespace) -> None:
    from resgrid.dvc.ask import cache_folder
    from resgrid.gc import delete, find_leftovers, path_in, usage

    root, pipeline = project_root(), Path.cwd().resolve()
    cache = cache_folder(root)
    leftovers = find_leftovers(root, pipeline, cache)
    if not options.dry_run:
        delete(each.path for each in leftovers)
    taken = usage(root, pipeline, cache)
    if options.json:
        rows = [
            {"path": path_in(root, each.path), "bytes": each.num_bytes, "why": each.why} for each in leftovers
        ]
        print(json.dumps({"deleted": not options.dry_run, "leftovers": rows, "bytes": taken}, indent=2))
        return
    for each in leftovers:
        print(f"{amount(each.num_bytes, 'B'):>9}  {path_in(root, each.path)}: {each.why}")
    total = amount(sum(each.num_bytes for each in leftovers), "B")
    done = f"{total} {'can be' if options.dry_run else 'were'} deleted"
    print(f"{done if leftovers else 'Nothing is left over'}\n")
    for place, num_bytes in taken.items():
        print(f"{amount(num_bytes, 'B'):>9}  {place}")
    print("`dvc gc --workspace` empties DVC's cache of what no current result is made of.")


def plan(options: argparse.Namespace) -> None:
    from resgrid.dvc.pipeline import Pipeline
    from tasks.plan import make_plan

    plan = make_plan(Pipeline.find(options.pipeline), options.slots, measure=options.measure)
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan)


def status(options: argparse.Namespace) -> None:
    from resgrid.dvc.pipeline import Pipeline
    from tasks.status import status, watch

    pipeline = Pipeline.find(options.pipeline)
    if options.watch:
        watch(pipeline)
    else:
        now = status(pipeline)
        print(json.dumps(now.as_dict(), indent=2) if options.json else now)


def up(options: argparse.Namespace) -> int:
    from tasks.services import up

    return up(Path.cwd(), prefect_port=options.prefect_port, mlflow_port=options.mlflow_port)


def worker(options: argparse.Namespace) -> int:
    from tasks.worker import work

    return work(Path.cwd(), options.pool, options.slots, options.name)


def doctor(options: argparse.Namespace) -> int:
    from resgrid.doctor import examine

    findings = []
    for each in examine():
        findings.append(each)
        if not options.json:
            print(each)
    if options.json:
        print(json.dumps([asdict(each) for each in findings], indent=2))
    return 1 if any(each.level == "problem" for each in findings) else 0
