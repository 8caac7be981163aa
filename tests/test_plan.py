"""What would run, and why: against DVC's own answer, and against changes made on purpose."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sleeping import Sleeping, sleeping, wait_until
from small import DIGITS, ROOT

from resgrid import mps
from resgrid.config import load_params
from resgrid.cost import expect, makespan
from resgrid.dvc.ask import Busy, cache_folder
from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError
from resgrid.gc import find_leftovers, usage
from resgrid.grid import expand
from resgrid.stage_record import Record, State, write_state
from tasks import slots
from tasks.plan import Step, longest_first, make_plan
from tasks.slots import Slot
from tasks.status import status

GRID = ["resnet20-sgd-0", "resnet20-adam-0", "resnet110-sgd-0", "resnet110-adam-0"]
WEIGHTS = "runs/resnet20-sgd-0/weights"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    """Everything has run but `resnet110-adam-0` and what comes after it."""
    repository = sleeping(tmp_path_factory.mktemp("a repository"), "resnet20, resnet110", "sgd, adam")
    repository.behave("resnet110-adam-0", "exit 1")
    assert repository.run("dvc", "repro", "-k").returncode != 0
    return repository


@pytest.fixture(autouse=True)
def undone(repository: Sleeping) -> Iterator[None]:
    """What a test has changed, or added to a run, is as before when it has ended."""
    files = [repository.root / name for name in ("params.yaml", "dvc.yaml", "code/net.py", WEIGHTS)]
    before = {file: file.read_bytes() for file in files}
    (repository.root / WEIGHTS).unlink()  # it may be a link into the cache
    (repository.root / WEIGHTS).write_bytes(before[repository.root / WEIGHTS])
    yield
    for file, content in before.items():
        file.write_bytes(content)
    (repository.root / "runs/resnet20-sgd-0/timing.json").unlink(missing_ok=True)


def plan_of(repository: Sleeping, **more):
    return make_plan(Pipeline.find(repository.root), **more)


def why(repository: Sleeping) -> dict[str, tuple[str, ...]]:
    return {step.title: step.why for step in plan_of(repository).steps if step.state == "stale"}


NEVER = {"resnet110-adam-0": ("has never run here",), "evaluate": ("has never run here",)}


def test_every_stage_is_in_the_plan_in_the_order_of_dvc_yaml(repository):
    plan = plan_of(repository)
    assert [step.stage for step in plan.steps] == [
        "download", "preprocess", *(f"train@{cell}" for cell in GRID), "evaluate",
    ]  # fmt: skip
    assert {step.title: step.state for step in plan.steps} == dict.fromkeys(
        ["download", "preprocess", *GRID[:3]], "up to date"
    ) | dict.fromkeys(NEVER, "stale")
    assert why(repository) == NEVER
    assert json.loads(json.dumps(plan.as_dict()))["stages"][2]["cell"] == "resnet20-sgd-0"


@pytest.mark.parametrize(
    ("path", "old", "new", "reasons"),
    [
        ("params.yaml", None, "tuning.resnet20.adam.lr=0.002 optimizers.sgd.momentum=0.8 recipes.resnet110.warmup.steps=0 tuning.resnet20.rmsprop.lr=0.005", {
            "resnet20-adam-0": ("tuning.resnet20.adam has changed",),
            "resnet20-sgd-0": ("optimizers.sgd has changed",),
            "resnet110-sgd-0": ("recipes.resnet110 has changed", "optimizers.sgd has changed"),
        }),
        ("params.yaml", None, "recipes.resnet*.augmentation.crop_padding=8", {
            "resnet20-sgd-0": ("recipes.resnet20 has changed",),
            "resnet20-adam-0": ("recipes.resnet20 has changed",),
            "resnet110-sgd-0": ("recipes.resnet110 has changed",),
        }),
        ("code/net.py", "depth = 20", "depth = 32", dict.fromkeys(GRID[:3], ("code has changed",))),
        (WEIGHTS, "resnet20", "resnet32", {"resnet20-sgd-0": (f"{WEIGHTS} has changed",)}),
        ("dvc.yaml", "sh work.sh preprocess data", "sh  work.sh preprocess data",
         {"preprocess": ("its command has changed",)}),
        ("params.yaml", "name: cifar10 #", "name: cifar10 # a comment", {}),
    ],
)  # fmt: skip
def test_a_change_is_given_as_the_reason_and_dvc_agrees(repository, path, old, new, reasons):
    if old is None:
        repository.set(*new.split())
    else:
        repository.edit(path, old, new)
    stale = [step for step in plan_of(repository).steps if step.state == "stale"]
    assert {step.title: step.why for step in stale} == reasons | NEVER
    public = json.loads(repository.run("dvc", "status", "--json", "dvc.yaml").stdout)
    assert {step.stage for step in stale} == set(public)


def test_a_missing_output_is_named(repository):
    (repository.root / WEIGHTS).unlink()
    assert why(repository)["resnet20-sgd-0"] == (f"{WEIGHTS} is missing",)


def test_what_comes_after_a_stale_stage_is_looked_at_again(repository):
    repository.set("preprocess.seed=1")
    plan = plan_of(repository)
    assert plan.by_title["preprocess"].why == ("preprocess has changed",)
    cell = plan.by_title["resnet20-sgd-0"]
    assert (cell.state, cell.why) == ("after", ("after preprocess",))
    assert plan.by_title["download"].state == "up to date"


def test_while_a_stage_runs_the_plan_says_that_dvc_is_busy_and_with_what(repository):
    """`dvc status` ends as busy meanwhile."""
    repository.behave("resnet110-adam-0", "touch begun; while [ ! -f behave/go ]; do sleep 0.1; done; exit 1")
    command = [sys.executable, "-m", "dvc", "repro", "-q", "--single-item", "train@resnet110-adam-0"]
    by_hand = subprocess.Popen(command, cwd=repository.root, env=repository.env, stderr=subprocess.DEVNULL)
    try:
        wait_until((repository.root / "begun").exists)
        with pytest.raises(Busy, match=f"DVC is busy with process {by_hand.pid} "):
            plan_of(repository)
        done = repository.run("resgrid", "plan")
        assert done.returncode == 1
        assert f"DVC is busy with process {by_hand.pid} " in done.stderr
        now = status(Pipeline.find(repository.root))
        states = {each.cell.id: each.word for each in now.cells}
        assert states["resnet110-adam-0"] == "running"
    finally:
        (repository.root / "behave/go").touch()
        by_hand.wait(60)
        repository.behave("resnet110-adam-0", "exit 1")
    plan_of(repository)


def test_a_number_that_a_trained_cell_no_longer_has_is_the_reason_with_both_values(small, tmp_path):
    """The reason is `find_runs`', as the report and MLflow have it."""
    project = small.copy(tmp_path / "a project")
    project.set("tuning.resnet20.sgd.lr=0.07")
    steps = make_plan(Pipeline.find(project.root)).by_title
    assert "learning_rate 0.05 → 0.07" in steps["resnet20-sgd-0"].why[0]
    assert steps["resnet20-adam-0"].state == "up to date"


def test_expected_times_come_from_earlier_runs_and_carry_over_by_flops(repository):
    """50,000 images, 250 epochs: at 1,000 images/s 12,500 s; ResNet-110 takes 1.52 / 0.24 as long."""
    pipeline = Pipeline.find(repository.root)
    for record in pipeline.state("").parent.glob("*.json"):
        record.unlink()
    plan = plan_of(repository)
    assert plan.seconds is None
    assert "Expected: unknown until each architecture has been trained or timed (`resgrid plan" in str(plan)
    timing = repository.root / "runs/resnet20-sgd-0/timing.json"
    timing.write_text('{"images_per_second": 1000.0, "device": "cpu", "threads": 1}')
    write_state(pipeline.state("evaluate"), vars(Record("evaluate", "1:1", 1000.0, 1077.0, State.DONE)))
    plan = plan_of(repository, slots=slots.num_cores())  # one thread each
    pipeline.state("evaluate").unlink()
    assert plan.by_title["resnet20-sgd-0"].seconds == 12_500.0
    assert plan.by_title["resnet110-sgd-0"].seconds == pytest.approx(12_500.0 * 1.52 / 0.24)
    assert plan.by_title["evaluate"].seconds == 77.0  # as long as last time
    assert plan.by_title["download"].seconds is None


def test_expected_times_on_a_card_go_by_how_many_cells_share_it(repository):
    """One graphed ResNet-20 alone on an H100: 57,759 images/s, so 216 s for 250 epochs; eight together 2.06 as many."""
    (repository.root / "runs/resnet20-sgd-0/timing.json").write_text(
        '{"images_per_second": 57759.0, "device": "cuda", "threads": 2, "sharing": 1, "peak_memory_bytes": 9}'
    )
    root, stage = repository.root, "train@resnet20-adam-0"
    params = load_params(root / "params.yaml")
    (root / f".resgrid/state/{stage}.json").unlink(missing_ok=True)
    assert expect(params, root, root, 8, sharing=1)[stage] == pytest.approx(216.4, abs=0.1)
    assert expect(params, root, root, 2, sharing=8)[stage] == pytest.approx(216.4 * 8 / 2.06, rel=1e-3)
    assert stage not in expect(params, root, root, 1, sharing=None)  # a card says nothing of a CPU


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  train:", "  practise:", "has no stage for resnet20-sgd-0"),
        ("grid.seeds", "grid.sedes", r"grid\.sedes"),  # in DVC's words
    ],
)
def test_a_dvc_yaml_without_the_cells_and_one_that_dvc_cannot_read_are_refused(repository, old, new, message):
    repository.edit("dvc.yaml", old, new)
    with pytest.raises(ResgridError, match=message):
        plan_of(repository)


def test_a_checkout_without_git_is_explained_and_the_way_that_it_names_works(tmp_path):
    checkout = Sleeping(tmp_path)
    assert checkout.run("git", "init", "-q").returncode == checkout.run("dvc", "init", "-q").returncode == 0
    (tmp_path / "dvc.yaml").write_text("stages:\n  evaluate: {cmd: ls}\n")
    (tmp_path / "params.yaml").write_text(DIGITS)
    shutil.rmtree(tmp_path / ".git")  # as in a ZIP of the project
    with pytest.raises(ResgridError, match=r"not a git repository\. .*`git init` .*core\.no_scm true`"):
        plan_of(checkout)
    (tmp_path / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    with pytest.raises(ResgridError, match="has no stage for resnet20-sgd-0"):  # as it should: DVC was asked
        plan_of(checkout)


def test_a_cache_that_is_elsewhere_is_what_gc_looks_at(repository, tmp_path):
    root, cache = repository.root, tmp_path / "shared cache"
    damaged = cache / "files/md5/ab" / ("0" * 30)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not what its name says")
    assert cache_folder(root) == root / ".dvc/cache"
    assert repository.run("dvc", "config", "--local", "cache.dir", str(cache)).returncode == 0
    try:
        assert cache_folder(root) == cache
        assert [each.path for each in find_leftovers(root, root, cache)] == [damaged]
        assert str(cache) in usage(root, root, cache)
    finally:
        (root / ".dvc/config.local").unlink()


def test_modules_of_a_persons_own_may_be_called_as_ours_are(repository, tmp_path):
    for folder in (tmp_path, repository.root):
        for name in ("tasks", "flows"):
            (folder / f"{name}.py").write_text("raise SystemExit('not ours')")
    program = "import sys; from resgrid.cli import main; sys.exit(main())"
    done = repository.run(sys.executable, "-c", program, "plan", PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
    for name in ("tasks", "flows"):
        (repository.root / f"{name}.py").unlink()
    assert done.returncode == 0, done.stderr
    assert "resnet20-sgd-0" in done.stdout


# --- order and slots --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(repository) -> dict[str, Step]:
    cells = expand(load_params(repository.root / "params.yaml"))
    return {cell.id: Step(cell.stage, cell, "stale") for cell in cells}


def test_the_longest_come_first_by_time_or_by_arithmetic(steps):
    by_flops = longest_first(steps.values())
    assert [step.cell.architecture for step in by_flops] == ["resnet110", "resnet110", "resnet20", "resnet20"]
    timed = [replace(step, seconds=float(i)) for i, step in enumerate(steps.values())]
    assert [step.seconds for step in longest_first(timed)] == [3.0, 2.0, 1.0, 0.0]


def test_the_makespan_is_that_of_slots_that_take_the_next_when_free():
    assert makespan([5, 4, 3, 3, 3], 2) == 10.0  # 5+3 and 4+3, then 3 more on the second: 10
    assert makespan([5, 4, 3, 3, 3], 1) == 18.0
    assert makespan([1, 1], 8) == 1.0
    assert makespan([], 2) == 0.0


def test_cpu_slots_divide_the_cores(monkeypatch):
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    cores = slots.num_cores()
    assert slots.share(1) == [Slot("cpu 1/1", cores)]
    for num in (1, 2, cores, 5 * cores):
        shares = slots.share(64, slots=num)
        assert len(shares) == num
        assert sum(share.threads for share in shares) <= max(cores, num)
        assert {share.env["RESGRID_THREADS"] for share in shares} == {str(max(1, cores // num))}
    assert len(slots.share(64)) <= cores
    with pytest.raises(ResgridError, match="slots=0"):
        slots.share(64, slots=0)


def test_cells_are_spread_over_the_cards_and_share_them_as_memory_allows(monkeypatch):
    gib = 2**30

    def shares(*free: int, num: int | None = None, num_cells: int = 36, cores: int = 16, each: int = 2 * gib):
        cards = [mps.Card(str(i), free_bytes) for i, free_bytes in enumerate(free)]
        monkeypatch.setattr(mps, "cards", lambda: cards)
        monkeypatch.setattr(slots, "num_cores", lambda: cores)
        return slots.share(num_cells, {"vgg16": each - slots.CUDA_CONTEXT_BYTES}, ["vgg16"], num)

    monkeypatch.setattr(mps, "available", lambda: True)
    spread = shares(9 * gib, 4 * gib)
    assert [slot.name for slot in spread] == [
        "cuda:0 1/4", "cuda:1 1/2", "cuda:0 2/4", "cuda:1 2/2", "cuda:0 3/4", "cuda:0 4/4",
    ]  # fmt: skip
    assert spread[1].env == {
        "RESGRID_THREADS": "2", "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "RESGRID_DEVICE": "cuda", "RESGRID_SHARING": "2",  # whatever was asked for: the trainer sees no second card
    }  # fmt: skip
    assert [slot.card for slot in shares(9 * gib, 4 * gib, num=3)] == ["0", "1", "0"]
    assert len(shares(9 * gib, 4 * gib, num_cells=1)) == 1
    assert len(shares(9 * gib, 4 * gib, each=100 * gib)) == 2  # one each at least
    assert len(shares(900 * gib, cores=64)) == 8


def test_slots_go_by_the_memory_that_a_container_leaves(monkeypatch):
    """2 GiB hold one training of 1.5 GiB, whatever the machine has."""
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    monkeypatch.setattr(slots, "num_cores", lambda: 8)
    monkeypatch.setattr(slots, "available_memory", lambda: 2 * 2**30)
    assert slots.share(64) == [Slot("cpu 1/1", 8)]


@pytest.mark.parametrize("visible", ["foo", "GPU-00000000", "0,9"])
def test_gpus_that_the_driver_does_not_have_are_named_with_the_way_on(visible, monkeypatch):
    """A driver with one card, as NVML shows it; this machine may have none."""
    import pynvml

    def handle(name: int | str) -> object:
        if name != 0:
            raise pynvml.NVMLError_NotFound
        return name

    for name, stand_in in (
        ("nvmlInit", lambda: None), ("nvmlShutdown", lambda: None), ("nvmlDeviceGetHandleByIndex", handle),
        ("nvmlDeviceGetHandleByUUID", handle), ("nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(free=1)),
    ):  # fmt: skip
        monkeypatch.setattr(pynvml, name, stand_in)
    monkeypatch.delenv("RESGRID_DEVICE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ResgridError, match=f"CUDA_VISIBLE_DEVICES={visible}: .*`nvidia-smi -L`"):
        mps.cards()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert mps.cards() == []
    for name in ("cpu", "cuda:x", "gpu"):
        monkeypatch.setenv("RESGRID_DEVICE", name)
        assert mps.cards() == []


@pytest.mark.long
def test_240_cells_are_planned_within_10_seconds(tmp_path):
    grid = "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10"
    repository = sleeping(tmp_path / "r", grid, "sgd, adam, rmsprop, adagrad", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    began = time.monotonic()
    plan = plan_of(repository)
    assert len(plan.cells) == 240
    assert time.monotonic() - began < 10
