"""What each command of the command line does. A command imports what it needs when it runs."""

from pathlib import Path

# The folders of a pipeline, beside its params.yaml.
RAW = Path("data/raw")
PROCESSED = Path("data/processed")
RUNS = Path("runs")
REPORTS = Path("reports")
LOCK = Path("dvc.lock")
