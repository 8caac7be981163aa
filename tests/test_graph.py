"""The bookkeeping of a graphed step, with a stand-in for the graph; test_gpu.py asks the same of a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import stand_in
import torch
from test_engine import CPU, cell, data, differing, new_model, run
from test_run import cell as run_cell
from test_run import folder, train  # noqa: F401  # `folder` is a fixture
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from resgrid.checkpoint import Checkpoints
from resgrid.models import build_model
from resgrid.training import engine, graph
from resgrid.training.device import choose_execution
from resgrid.training.engine import fit
from resgrid.training.graph import GraphedStep


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # batches this small gain nothing from a second one
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[GraphedStep]:
    """Each training's step: trainings on the CPU are graphed, by the stand-in."""
    return stand_in.install(monkeypatch)


CELLS = {
    "sgd": cell("resnet20-sgd-0", epochs=5, batch_size=8),
    "adam": cell("resnet20-adam-0", epochs=5, batch_size=8),
    "rmsprop": cell("resnet20-rmsprop-0", epochs=5, batch_size=8),
    "adagrad": cell("resnet20-adagrad-0", epochs=5, batch_size=8),
    "dropout": cell("resnet10-adam-0", epochs=5, batch_size=2),
    "frozen base": cell("resnet20-sgd-0", epochs=5, batch_size=8, approach="frozen_base"),
}


@pytest.mark.parametrize("name", CELLS)
def test_over_20_steps_and_5_scorings_no_address_moves_and_every_loss_is_the_eager_one(
    name, steps, monkeypatch
):
    trained = CELLS[name]
    given = data(num_train=4 * trained.recipe.batch_size, num_test=8)
    model, eager = new_model(trained), new_model(trained)
    seen: list[dict[str, int]] = []

    def look(done: int, total: int) -> None:
        tensors = dict(model.state_dict())
        tensors |= {f"{key}.grad": p.grad for key, p in model.named_parameters() if p.grad is not None}
        tensors |= {"images": steps[0].images, "labels": steps[0].labels}
        seen.append({key: tensor.data_ptr() for key, tensor in tensors.items()})

    epochs, outcome = run(fit(trained, model, given, CPU, look))
    assert outcome.graphed
    assert len(seen) == 20
    assert all(addresses == seen[0] for addresses in seen)
    num_trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(key.endswith(".grad") for key in seen[0]) == num_trained > 0
    assert steps[0].images.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.undo()
    expected, outcome = run(fit(trained, eager, given, CPU))
    assert not outcome.graphed
    assert epochs == expected
    assert not differing(model.state_dict(), eager.state_dict())


def test_a_capture_that_fails_is_one_warning_and_training_is_the_eager_one(monkeypatch, caplog):
    trained = cell(epochs=2)
    model, eager = new_model(trained), new_model(trained)
    expected, _ = run(fit(trained, eager, data(16, 8), CPU))

    def fails(step: GraphedStep) -> Callable[[], None]:
        step.eager()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")

    monkeypatch.setattr(graph, "capture", fails)
    stand_in.graph_on_cpu(monkeypatch)
    epochs, outcome = run(fit(trained, model, data(16, 8), CPU))
    assert caplog.messages == [
        "no CUDA graph, so steps are slower: CUDA error: operation not permitted when stream is capturing"
    ]
    assert not outcome.graphed
    assert epochs == expected
    assert not differing(model.state_dict(), eager.state_dict())


def test_trainings_after_one_another_in_a_process_have_a_graph_each(steps):
    kinds = ["sgd", "frozen base", "sgd"]
    models = [new_model(CELLS[kind]) for kind in kinds]
    epochs = [
        run(fit(CELLS[kind], model, data(16, 8), CPU))[0] for kind, model in zip(kinds, models, strict=True)
    ]
    assert len(steps) == 3
    assert epochs[0] == epochs[2] != epochs[1]
    assert not differing(models[0].state_dict(), models[2].state_dict())


@pytest.mark.parametrize("first", ["graphed", "eager"])
def test_a_training_goes_on_under_the_other_kind_of_step(first, steps, tmp_path):
    trained = CELLS["adam"]
    whole = new_model(trained)
    expected, _ = run(fit(trained, whole, data(16, 8), CPU))

    def checkpoints() -> Checkpoints:
        return Checkpoints(tmp_path, trained, "data", CPU, str(choose_execution(trained, 48, CPU)))

    def start(kind: str) -> tuple[Any, torch.nn.Module]:
        execution = replace(choose_execution(trained, 48, CPU), graphed=kind == "graphed")
        model, kept = new_model(trained), checkpoints()
        training = fit(trained, model, data(16, 8), CPU, checkpoints=kept, execution=execution)
        epochs = [next(training)]
        return (training, epochs, kept), model

    (training, epochs, kept), _ = start(first)
    epochs.append(next(training))
    training.close()
    kept.flush()
    (training, rest, kept), model = start({"graphed": "eager", "eager": "graphed"}[first])
    more, outcome = run(training)
    kept.flush()
    assert outcome.graphed == (first == "eager")
    assert [*epochs, *rest, *more] == expected
    assert not differing(model.state_dict(), whole.state_dict())


def test_on_cuda_steps_are_graphed():
    graphed = choose_execution(cell(), 48, torch.device("cuda:0"))
    assert graphed.graphed
    assert not choose_execution(cell(), 48, CPU).graphed
    assert str(replace(graphed, graphed=False)) == str(graphed)  # it is part of a checkpoint's owner


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_on_a_card_forward_and_loss_read_nothing_back(architecture):
    """Without a card: fake tensors have CUDA's code paths and no values, and refuse to be read."""
    cuda = torch.device("cuda:0")
    with FakeTensorMode(), cuda:
        model = build_model(architecture, 10, 0.0 if architecture == "resnet20" else 0.3).train()
        totals = engine.Totals(cuda)
        logits, labels = model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))
        totals.add(torch.nn.functional.cross_entropy(logits, labels), logits, labels)
        with pytest.raises(DataDependentOutputException):
            totals.read(1, 4)


def test_the_timing_says_whether_steps_were_graphed(steps, folder, tmp_path):  # noqa: F811
    train(run_cell(), folder, tmp_path)
    assert json.loads((tmp_path / "timing.json").read_text())["graphed"] is True
