"""Facts about the project and its machine: the root, git's state, a container's limits, files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import resgrid
from resgrid import project
from resgrid.config import Digits, Preprocess
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.project import GitState, available_memory, git_state, num_cores, project_root, write_whole
from resgrid.provenance import PACKAGE, code_digest

ROOT = Path(__file__).parents[1]
GIB = 2**30


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


# --- the root, and git ------------------------------------------------------------------------------


def test_the_root_is_the_nearest_dvc_repository_else_the_nearest_git_repository(tmp_path: Path) -> None:
    pipeline = tmp_path / "git/dvc/git again/pipeline"
    pipeline.mkdir(parents=True)
    assert project_root(pipeline) == pipeline
    (tmp_path / "git/.git").mkdir()
    assert project_root(pipeline) == tmp_path / "git"
    (tmp_path / "git/dvc/.dvc").mkdir()
    (tmp_path / "git/dvc/git again/.git").write_text("gitdir: …")  # a submodule's, or a worktree's
    assert project_root(pipeline) == tmp_path / "git/dvc"


def test_gits_state_is_the_commit_and_whether_anything_but_dvc_lock_differs(tmp_path: Path) -> None:
    assert git_state(tmp_path) == GitState()
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == GitState()  # no commit yet
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("a: 1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "start")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "dvc.lock").write_text("a: 2\n")
    assert git_state(tmp_path) == GitState(commit, dirty=False)
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert git_state(tmp_path) == GitState(commit, dirty=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user, which takes root")
def test_a_repository_of_another_owner_is_named_with_gits_own_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "start", "--allow-empty")
    os.chown(tmp_path, 12345, 12345)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no safe.directory of this machine's
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    state = git_state(tmp_path)
    assert state.commit is None
    assert f"safe.directory {tmp_path}" in (state.problem or "")


# --- the machine ------------------------------------------------------------------------------------

MEMINFO = "MemTotal:       65000000 kB\nMemFree:         1000000 kB\nMemAvailable:   22739424 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 cores and 21.7 GiB, with the kernel's files below this folder."""
    monkeypatch.setattr(project, "PROC", tmp_path / "proc")
    monkeypatch.setattr(project, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000, 1064)))
    write(tmp_path, {"proc/meminfo": MEMINFO})
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_without_a_cgroup_all_of_the_machine_may_be_used(machine: Path) -> None:
    assert num_cores() == 64
    assert available_memory() == 22739424 * 1024
    write(
        machine,
        {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n", "cgroup/memory.max": "max\n"},
    )
    assert num_cores() == 64
    assert available_memory() == 22739424 * 1024


def test_a_container_of_cgroup_2_has_its_limits_and_those_of_all_above_it(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "cgroup/pod/cpu.max": "250000 100000\n",  # two and a half: a third thread would wait
            "cgroup/pod/container/cpu.max": "max 100000\n",
            "cgroup/pod/container/memory.max": f"{2 * GIB}\n",
            "cgroup/pod/container/memory.current": f"{GIB}\n",
            "cgroup/pod/container/memory.stat": f"anon 5\nfile 9\ninactive_file {GIB // 4}\n",
        },
    )
    assert num_cores() == 2
    assert available_memory() == 2 * GIB - GIB + GIB // 4
    write(machine, {"cgroup/pod/container/cpu.max": "50000 100000\n"})
    assert num_cores() == 1  # never none


def test_a_container_of_cgroup_1_sees_its_own_as_the_root(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "9:memory:/docker/0af3\n4:cpu,cpuacct:/docker/0af3\n0::/\n",  # as named outside
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "cgroup/memory/memory.stat": "total_inactive_file 1000\n",
        },
    )
    assert num_cores() == 4
    assert available_memory() == GIB + 1000
    write(machine, {"cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert num_cores() == 64


def test_hardware_threads_of_one_core_count_once() -> None:
    shown = subprocess.run(["lscpu", "-p=CORE,SOCKET"], capture_output=True, text=True, check=True).stdout
    physical = {line for line in shown.splitlines() if not line.startswith("#")}
    assert 1 <= num_cores() <= len(physical)


def test_a_real_limit_of_memory_is_seen() -> None:
    limits = Path("/sys/fs/cgroup/memory")
    own = limits / f"resgrid-test-{os.getpid()}"
    if not (limits / "memory.limit_in_bytes").is_file() or not os.access(limits, os.W_OK):
        pytest.skip("needs root on a machine with cgroup 1")
    try:
        own.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        (own / "memory.limit_in_bytes").write_text(str(GIB))
        code = (
            f"from pathlib import Path; Path({str(own / 'cgroup.procs')!r}).write_text('0')\n"
            "from resgrid.project import available_memory; print(available_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert GIB / 2 < int(done.stdout) <= GIB
    finally:
        own.rmdir()


def test_a_program_that_computes_takes_a_core() -> None:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cores())]
    try:
        time.sleep(1.0)
        assert project.free_cores() < max(2, num_cores())
    finally:
        for process in spinning:
            process.kill()
            process.wait()


# --- files ------------------------------------------------------------------------------------------


def test_a_file_takes_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"a", b"b", synced=True)
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"ab"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_history_has_no_figures_of_what_was_not_scored(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("epoch,train_loss,test_loss\n1,2.5,\n2,0.25,1.5\n")
    assert project.read_history(tmp_path / "history.csv") == [
        {"epoch": 1.0, "train_loss": 2.5}, {"epoch": 2.0, "train_loss": 0.25, "test_loss": 1.5},
    ]  # fmt: skip
    (tmp_path / "history.csv").write_text("epoch\none\n")
    with pytest.raises(ResgridError, match="could not convert"):
        project.read_history(tmp_path / "history.csv")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which takes root")
def test_a_file_of_another_user_is_named_as_that(tmp_path: Path) -> None:
    """Where it may not be read; and where it may not be replaced, though one's own that is read-only may."""
    (tmp_path / "runs/cell").mkdir(parents=True)
    secret, run = tmp_path / "secret.json", tmp_path / "runs/cell/run.json"
    for path, mode in ((secret, 0o600), (run, 0o444)):
        path.write_text("{}")
        path.chmod(mode)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    for path in (tmp_path / "runs", tmp_path / "runs/cell"):
        os.chown(path, 65534, 65534)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom resgrid.project import denied, read_json\nos.setuid(65534)\n"
        "secret, runs = map(Path, sys.argv[1:])\nprint(denied(Path('gone'), runs))\nread_json(secret)"
    )
    for owner, expected in ((0, run), (65534, None)):
        os.chown(run, owner, owner)
        command = [sys.executable, "-c", code, str(secret), str(tmp_path / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == f"{expected}\n"
        why = (
            f"{secret}: cannot be read (Permission denied). It belongs to another user, or its mode is wrong."
        )
        assert done.stderr.endswith(f"{why}\n")


# --- what make and Python hand on --------------------------------------------------------------------


def test_a_persons_settings_of_pip_that_break_an_environment_do_not_reach_it() -> None:
    settings = {
        "PIP_USER": "1",
        "PIP_TARGET": "/elsewhere",
        "PIP_PREFIX": "/elsewhere",
        "PIP_INDEX_URL": "https://pypi.invalid/simple",
        "HTTPS_PROXY": "http://proxy.invalid",
    }
    command = ["make", "-s", "-C", str(ROOT), "--eval=probe: ; @env", "probe"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert found["PIP_USER"] == "0"
    assert not {"PIP_TARGET", "PIP_PREFIX"} & found.keys()
    assert found["PIP_INDEX_URL"] == "https://pypi.invalid/simple"
    assert found["HTTPS_PROXY"] == "http://proxy.invalid"


def test_a_pipeline_is_loaded_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples/digits", tmp_path / "x", ignore=lambda *_: ["data", "runs", "reports"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resgrid.load("~/x").folder == tmp_path / "x"


def test_a_clone_with_windows_line_ends_has_the_same_code(tmp_path: Path) -> None:
    """DVC's hashes of the code and our own digest are of the bytes on the disk."""
    package = tmp_path / "origin/src/resgrid"
    package.parent.mkdir(parents=True)
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    hashed = ("params.yaml", "dvc.yaml", ".dvcignore")
    for name in (".gitattributes", *hashed):
        shutil.copy(ROOT / name, tmp_path / "origin")
    git(tmp_path / "origin", "init", "-q")
    git(tmp_path / "origin", "add", "-A")
    git(tmp_path / "origin", "commit", "-qm", "start")
    git(tmp_path, "-c", "core.autocrlf=true", "clone", "-q", "origin", "clone")
    git(tmp_path / "clone", "config", "core.autocrlf", "true")
    assert code_digest(tmp_path / "clone/src/resgrid") == code_digest()
    assert not any(b"\r" in (tmp_path / "clone" / name).read_bytes() for name in hashed)
    assert git_state(tmp_path / "clone").dirty is False


def test_arrays_in_the_processed_data_take_the_umasks_mode(tmp_path: Path) -> None:
    data = Digits(source="digits", test_fraction=0.2, split_seed=0)
    before = os.umask(0o022)
    try:
        download(data, tmp_path / "raw")
        settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=0.1, seed=0)
        preprocess(data, settings, tmp_path / "raw", tmp_path / "processed")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
