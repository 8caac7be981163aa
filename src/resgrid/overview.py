"""What `resgrid --help` says first: the commands in groups, and for each an example that can be typed."""

from __future__ import annotations

COMMANDS = {
    "Before it runs": {
        "cells": "resgrid cells --json",
        "set": "resgrid set tuning.resnet20.sgd.lr=0.05\nresgrid set 'recipes.*.epochs=10' --dry-run",
        "plan": "resgrid plan --pipeline examples/digits",
        "doctor": "resgrid doctor --json",
    },
    "While it runs": {
        "up": "resgrid up --prefect-port 4300 --mlflow-port 5100",
        "status": "resgrid status --watch --pipeline examples/digits",
        "worker": "resgrid worker --pool pool --slots 4",
    },
    "Results": {
        "compare": "resgrid compare --json",
        "sync": "resgrid sync",
        "ui": "resgrid ui --port 5100",
        "predict": "resgrid predict photo.jpg holiday/\nresgrid predict photo.jpg --model best.safetensors",
        "export": "resgrid export champion --format onnx",
        "gc": "resgrid gc --dry-run",
    },
    "Your own images and weights": {
        "init": "resgrid init pets --data ~/pictures/pets",
        "score": "resgrid score mine.safetensors --data ~/cifar-10-python.tar.gz",
        "summary": "resgrid summary vgg16",
        "import": "resgrid import checkpoint.pt --model resnet18 --out mine.safetensors",
    },
    "Stages, which `dvc repro` runs": {
        "download": "resgrid download",
        "preprocess": "resgrid preprocess",
        "train": "resgrid train resnet20-sgd-0 --afresh\nresgrid train 'resnet20-*' --slots 6 --hours 8",
        "evaluate": "resgrid evaluate",
    },
    "On a machine with torch alone": {
        "take-in": "resgrid take-in ~/from-the-cluster/resgrid",
    },
}
EXAMPLES = {name: example for group in COMMANDS.values() for name, example in group.items()}


def overview(texts: dict[str, str]) -> str:
    """What `resgrid --help` prints; `texts` gives each command's own line."""
    text = (
        "usage: resgrid COMMAND …\n\nArchitectures x optimizers, compared. In a folder with a params.yaml:\n"
    )
    text += "  resgrid plan; dvc repro; resgrid compare\n"
    for title, group in COMMANDS.items():
        text += "".join([f"\n{title}:\n", *(f"  {name:13} {texts[name]}\n" for name in group)])
    return f"{text}\n`resgrid COMMAND --help` has its options and examples.\n"
