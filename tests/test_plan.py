"""What would run, and why: against DVC's own answer, and against changes made on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sleeping import Sleeping, sleeping
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


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    """Everything has run but `resnet110-adam-0` and what comes after it."""
    repository = sleeping(tmp_path_factory.mktemp("a repository"), "resnet20, resnet110", "sgd, adam")
    repository.behave("resnet110-adam-0", "exit 1")
    assert repository.run("dvc", "repro", "-k").returncode != 0
    return repository


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
        ("runs/resnet20-sgd-0/weights", "resnet20", "resnet32",
         {"resnet20-sgd-0": ("runs/resnet20-sgd-0/weights has changed",)}),
        ("dvc.yaml", "sh work.sh preprocess data", "sh  work.sh preprocess data",
         {"preprocess": ("its command has changed",)}),
        ("params.yaml", "name: cifar10 #", "name: cifar10 # a comment", {}),
    ],
)  # fmt: skip
def test_a_change_is_given_as_the_reason_and_dvc_agrees(repository, path, old, new, reasons):
    file = repository.root / path
    before = file.read_text()
    file.unlink()  # it may be a link into the cache
    file.write_text(before)
    if old is None:
        repository.set(*new.split())
    else:
        repository.edit(path, old, new)
    try:
        stale = [step for step in plan_of(repository).steps if step.state == "stale"]
        assert {step.title: step.why for step in stale} == reasons | NEVER
        public = json.loads(repository.run("dvc", "status", "--json", "dvc.yaml").stdout)
        assert {step.stage for step in stale} == set(public)
    finally:
        file.write_text(before)


def test_a_missing_output_is_named(repository):
    file = repository.root / "runs/resnet20-sgd-0/weights"
    content = file.read_bytes()
    file.unlink()
    try:
        assert why(repository)["resnet20-sgd-0"] == ("runs/resnet20-sgd-0/weights is missing",)
    finally:
        file.write_bytes(content)


def test_what_comes_after_a_stale_stage_is_looked_at_again(repository):
    repository.set("preprocess.seed=1")
    try:
        plan = plan_of(repository)
        assert plan.by_title["preprocess"].why == ("preprocess has changed",)
        cell = plan.by_title["resnet20-sgd-0"]
        assert (cell.state, cell.why) == ("after", ("after preprocess",))
        assert plan.by_title["download"].state == "up to date"
    finally:
        repository.set("preprocess.seed=0")


def test_while_a_stage_runs_the_plan_says_that_dvc_is_busy_and_with_what(repository):
    """`dvc status` ends as busy meanwhile."""
    repository.behave("resnet110-adam-0", "touch begun; while [ ! -f behave/go ]; do sleep 0.1; done; exit 1")
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "train@resnet110-adam-0"]
    by_hand = subprocess.Popen(
        command, cwd=repository.root, env=repository.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (repository.root / "begun").exists():
            assert by_hand.poll() is None
            time.sleep(0.05)
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
    run = repository.root / "runs/resnet20-sgd-0/timing.json"
    run.write_text('{"images_per_second": 1000.0, "device": "cpu", "threads": 1}')
    pipeline = Pipeline.find(repository.root)
    for record in pipeline.state("").parent.glob("*.json"):
        record.unlink()
    state = pipeline.state("evaluate")
    write_state(state, vars(Record("evaluate", "1:1", 1000.0, 1077.0, State.DONE)))
    try:
        plan = plan_of(repository, slots=slots.num_cores())  # one thread each
        assert plan.by_title["resnet20-sgd-0"].seconds == 12_500.0
        assert plan.by_title["resnet110-sgd-0"].seconds == pytest.approx(12_500.0 * 1.52 / 0.24)
        assert plan.by_title["evaluate"].seconds == 77.0  # as long as last time
        assert plan.by_title["download"].seconds is None
    finally:
        run.unlink()
        state.unlink()
    assert plan_of(repository).seconds is None
    assert (
        "Expected: unknown until each architecture has been trained or timed (`resgrid plan --measure`)"
        in str(plan_of(repository))
    )


def test_expected_times_on_a_card_go_by_how_many_cells_share_it(repository):
    """One graphed ResNet-20 alone on an H100: 57,759 images/s, so 216 s for 250 epochs; eight together 2.06 as many."""
    run = repository.root / "runs/resnet20-sgd-0/timing.json"
    run.write_text(
        '{"images_per_second": 57759.0, "device": "cuda", "threads": 2, "sharing": 1, "peak_memory_bytes": 9}'
    )
    pipeline, params = Pipeline.find(repository.root), load_params(repository.root / "params.yaml")
    for record in pipeline.state("").parent.glob("*.json"):
        record.unlink()
    try:
        alone = expect(params, pipeline.folder, pipeline.root, 8, sharing=1)
        eighth = expect(params, pipeline.folder, pipeline.root, 2, sharing=8)
        on_cpu = expect(params, pipeline.folder, pipeline.root, 1, sharing=None)
    finally:
        run.unlink()
    assert alone["train@resnet20-adam-0"] == pytest.approx(216.4, abs=0.1)
    assert eighth["train@resnet20-adam-0"] == pytest.approx(216.4 * 8 / 2.06, rel=1e-3)
    assert "train@resnet20-adam-0" not in on_cpu  # a card says nothing of a CPU


def test_a_grid_that_dvc_yaml_does_not_have_is_refused(repository):
    repository.edit("params.yaml", "studies: {}", "studies: {}\n# none")
    repository.edit("dvc.yaml", "  train:", "  practise:")
    try:
        with pytest.raises(ResgridError, match=r"has no stage for resnet20-sgd-0"):
            plan_of(repository)
    finally:
        repository.edit("dvc.yaml", "  practise:", "  train:")


def test_a_dvc_yaml_that_cannot_be_read_is_told_with_dvcs_words(repository):
    repository.edit("dvc.yaml", "grid.seeds", "grid.sedes")
    try:
        with pytest.raises(ResgridError, match=r"grid\.sedes"):
            plan_of(repository)
    finally:
        repository.edit("dvc.yaml", "grid.sedes", "grid.seeds")


def git_repository(folder: Path) -> Path:
    """A git and DVC repository, as `git clone` leaves one, with a pipeline in the folder `ignored/own`."""
    for command in ("git init -q", "dvc init -q"):
        subprocess.run(
            command.split(),
            cwd=folder,
            check=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
    own = folder / "ignored/own"
    own.mkdir(parents=True)
    (own / "dvc.yaml").write_text("stages:\n  evaluate: {cmd: ls}\n")
    (own / "params.yaml").write_text(DIGITS)
    return own


def test_a_pipeline_in_a_folder_that_git_ignores_is_explained(tmp_path):
    own = git_repository(tmp_path)
    (tmp_path / ".gitignore").write_text("ignored\n")
    with pytest.raises(ResgridError, match=r"git-ignored\. .*take the rule out of \.gitignore, or move it"):
        make_plan(Pipeline.find(own))


def test_a_checkout_without_git_is_explained_and_the_way_that_it_names_works(tmp_path):
    own = git_repository(tmp_path)
    shutil.rmtree(tmp_path / ".git")  # as in a ZIP of the project
    with pytest.raises(ResgridError, match=r"not a git repository\. .*`git init` .*core\.no_scm true`"):
        make_plan(Pipeline.find(own))
    (tmp_path / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    with pytest.raises(ResgridError, match="has no stage for resnet20-sgd-0"):  # as it should: DVC was asked
        make_plan(Pipeline.find(own))


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("dvc.lock", "schema: '9.0'\nstages: {}\n", r"validation failed\.[^`]*Another version of DVC may have"),
        ("dvc.yaml", "stages:\n  evaluate: {cmd: ls, dep: [x]}\n", r"validation failed\.[^`]*`dvc stage list`"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_dvcs_says_who_may_have_written_it_or_who_shows_the_line(
    tmp_path, name, content, hint
):
    own = git_repository(tmp_path)
    (own / name).write_text(content)
    with pytest.raises(ResgridError, match=rf"{name}' {hint}"):
        make_plan(Pipeline.find(own))


def test_a_cache_that_is_elsewhere_is_what_gc_looks_at(repository, tmp_path):
    cache = tmp_path / "shared cache"
    (cache / "files/md5/ab").mkdir(parents=True)
    (cache / "files/md5/ab" / ("0" * 30)).write_bytes(b"not what its name says")
    assert repository.run("dvc", "config", "--local", "cache.dir", str(cache)).returncode == 0
    try:
        assert cache_folder(repository.root) == cache
        leftovers = find_leftovers(repository.root, repository.root, cache_folder(repository.root))
        assert [each.path for each in leftovers] == [cache / "files/md5/ab" / ("0" * 30)]
        assert str(cache) in usage(repository.root, repository.root, cache_folder(repository.root))
    finally:
        (repository.root / ".dvc/config.local").unlink()
    assert cache_folder(repository.root) == repository.root / ".dvc/cache"


@pytest.mark.parametrize("name", ["tasks", "flows"])
def test_a_module_of_a_persons_own_may_be_called_as_ours_is(name, repository, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    (repository.root / f"{name}.py").write_text("raise SystemExit('not ours')")
    try:
        program = "import sys; from resgrid.cli import main; sys.exit(main())"
        done = repository.run(sys.executable, "-c", program, "plan", PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
        assert done.returncode == 0, done.stderr
        assert "resnet20-sgd-0" in done.stdout
    finally:
        (repository.root / f"{name}.py").unlink()


# --- order and slots --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(repository) -> dict[str, Step]:
    cells = expand(load_params(repository.root / "params.yaml"))
    return {cell.id: Step(cell.stage, cell, "stale", ()) for cell in cells}


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


def test_cells_are_spread_over_the_cards_and_share_them_as_memory_allows():
    gib = 2**30
    cards = [mps.Card("0", 9 * gib), mps.Card("1", 4 * gib)]
    spread = slots._on_cards(cards, 2 * gib, num_cells=36, cores=16, slots=None)
    assert [slot.name for slot in spread] == [
        "cuda:0 1/4", "cuda:1 1/2", "cuda:0 2/4", "cuda:1 2/2", "cuda:0 3/4", "cuda:0 4/4",
    ]  # fmt: skip
    assert spread[1].env == {
        "RESGRID_THREADS": "2", "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "RESGRID_DEVICE": "cuda", "RESGRID_SHARING": "2",  # whatever was asked for: the trainer sees no second card
    }  # fmt: skip
    three = slots._on_cards(cards, 2 * gib, num_cells=36, cores=16, slots=3)
    assert [slot.card for slot in three] == ["0", "1", "0"]
    assert len(slots._on_cards(cards, 2 * gib, num_cells=1, cores=16, slots=None)) == 1
    assert (
        len(slots._on_cards(cards, 100 * gib, num_cells=36, cores=16, slots=None)) == 2
    )  # one each at least
    assert len(slots._on_cards([mps.Card("0", 900 * gib)], 2 * gib, num_cells=36, cores=64, slots=None)) == 8


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

    def handle(index: int) -> int:
        if index != 0:
            raise pynvml.NVMLError_InvalidArgument
        return index

    def handle_by_name(name: str) -> int:
        raise pynvml.NVMLError_NotFound

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle_by_name)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: mps.Card("0", 1))
    monkeypatch.setattr(mps.Card, "free", 1, raising=False)
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
