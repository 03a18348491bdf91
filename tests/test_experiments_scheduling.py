"""The driver and its workers: what is run, in which order, and what is left when something is killed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.system
import psutil
import pytest
from dask.distributed import Client, LocalCluster
from filelock import FileLock
from helpers import eventually
from small_suites import digests, run_suite, snapshot, trainings, write_suite

from sb3_klip import progress
from sb3_klip.experiments import cell as cell_module
from sb3_klip.experiments import scheduling
from sb3_klip.experiments.__main__ import main

# -- the driver, with trainings that only pretend ----------------------------------------------------------------------


# It writes what RL Zoo does, and notes that it has begun; files of its folder say what else it is to do.
FAKE = """#!{python} -IS
import argparse, json, os, signal, sys, time, zipfile
from pathlib import Path

home = Path({home!r})
parser = argparse.ArgumentParser()
for option, kind in (("-m", str), ("--algo", str), ("--env", str), ("--seed", int), ("-n", int), ("-f", str)):
    parser.add_argument(option, type=kind)
args, _ = parser.parse_known_args()
cell = args.f.removeprefix("runs/")
with (home / "started").open("a") as file:
    file.write(cell + "\\n")
todo = home / cell
if (todo / "wait").exists():
    (todo / "waits").touch()
while (todo / "wait").exists():
    time.sleep(0.05)
steps = args.n // 2 if (todo / "interrupted").exists() else args.n
run = Path(args.f, args.algo, args.env + "_1")
run.mkdir(parents=True)
lengths = [args.seed + 10 * i for i in range(1, 6)]
rows = "".join(f"{{length}}.0,{{length}},0.1\\n" for length in lengths)
(run / "0.monitor.csv").write_text("#{{}}\\nr,l,t\\n" + rows)
Path(args.f, "progress.csv").write_text(f"time/total_timesteps,train/kill_fraction\\n{{steps}},0.25\\n")
if (todo / "fails").exists():
    sys.exit("it fails")
if (todo / "killed").exists():
    os.kill(os.getpid(), signal.SIGKILL)
with zipfile.ZipFile(run / (args.env + ".zip"), "w") as file:
    file.writestr("data", json.dumps({{"num_timesteps": steps}}))
"""


class Fake:
    """A cluster in this process, whose workers start something that is quicker than RL Zoo."""

    def __init__(self, home: Path, address: str):
        self.home, self.address = home, address
        self.folder = home / "out"
        self.suite = write_suite(home)

    @property
    def started(self) -> list[str]:
        """Each cell that a training was started for, in order."""
        path = self.home / "started"
        return path.read_text().splitlines() if path.exists() else []

    def tell(self, cell: str, what: str) -> Path:
        """What a cell's training is to do."""
        path = self.home / cell / what
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def run(self, *options: str) -> int:
        """The command."""
        return main(["run", "--suite", self.suite, "-f", str(self.folder), "--scheduler", self.address, *options])


@contextlib.contextmanager
def in_this_process(workers: int) -> Iterator[str]:
    """A scheduler whose workers are threads; without Dask's profiler, which may hang for ever (python/cpython#106883)."""
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    no_profiler = {"distributed.worker.profile.enabled": False}
    with dask.config.set(no_profiler), LocalCluster(n_workers=workers, **options) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers."""
    with in_this_process(2) as address:
        yield address


@pytest.fixture
def fake(tmp_path, address, monkeypatch) -> Fake:
    """Trainings that only pretend."""
    program = tmp_path / "fake"
    program.write_text(FAKE.format(python=sys.executable, home=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(cell_module.sys, "executable", str(program))
    monkeypatch.setattr(scheduling, "INTERVAL", 0.05)
    return Fake(tmp_path, address)


CELLS = [f"CartPole-v1/{method}/seed-{seed}" for seed in (0, 1) for method in ("ppo", "step")]


def test_finished_cells_are_never_run_again(fake, capsys, monkeypatch):
    assert fake.run() == 0
    assert sorted(fake.started) == sorted(CELLS)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"4 cells, 0 finished already; results go to {fake.folder}"
    assert out.splitlines()[-1] == f"  python -m sb3_klip.experiments report {fake.folder}"
    before = snapshot(fake.folder, "runs/**/*", "results/**/*")
    assert len(before) > 4 * 4

    with monkeypatch.context() as patched:
        patched.setattr(scheduling, "connect", None)  # no workers are started for nothing
        assert fake.run() == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"4 cells, 4 finished already; results go to {fake.folder}"
    assert rest == ["All finished. Tables and figures:", f"  python -m sb3_klip.experiments report {fake.folder}"]
    assert len(fake.started) == 4
    assert snapshot(fake.folder, "runs/**/*", "results/**/*") == before

    # More seeds go into the same folder.
    assert fake.run("--methods", "step", "--seeds", "0", "5") == 0
    assert fake.started[4:] == ["CartPole-v1/step/seed-5"]
    assert before.items() <= snapshot(fake.folder, "runs/**/*", "results/**/*").items()


def test_what_it_will_take_and_how_far_it_has_come(fake, capsys, monkeypatch):
    """In a pipe, as here; a terminal shows a bar."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert fake.run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"To train: \d+ steps of 4 cells", lines[1].replace(",", ""))
    assert "100%: 4 done, 0 running, 0 failed, 0 waiting" in lines


def test_a_half_written_run_is_made_again(fake):
    run_folder = fake.folder / "runs" / CELLS[1]
    (run_folder / "klip_ppo" / "CartPole-v1_1").mkdir(parents=True)
    (run_folder / "klip_ppo" / "CartPole-v1_1" / "0.monitor.csv").write_text("#{}\nr,l,t\n9.0,9,0.1\n")
    (run_folder / "progress.csv").write_text("time/total_timesteps\n256\n")
    (run_folder / "log.txt").write_text("half of it\n")
    assert fake.run() == 0
    assert digests(fake.folder)[f"{CELLS[1]}.csv"] == digests(fake.folder)[f"{CELLS[0]}.csv"]
    assert [path.name for path in (run_folder / "klip_ppo").iterdir()] == ["CartPole-v1_1"]


def test_a_finished_training_without_its_result(fake):
    """The worker was killed between the two."""
    assert fake.run() == 0
    path = fake.folder / "results" / f"{CELLS[0]}.csv"
    before = path.read_bytes()
    path.unlink()
    assert fake.run() == 0
    assert path.read_bytes() == before
    assert len(fake.started) == 4


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fails", "exited with status 1. The end of its log:\n    it fails\n"),
        ("killed", "exited with status -9. The end of its log:\n"),
        ("interrupted", "was interrupted before its last step. The end of its log:\n"),
    ],
)
def test_a_cell_that_failed_is_tried_again(fake, capsys, what, reason):
    told = fake.tell(CELLS[2], what)
    assert fake.run() == 1
    assert f"\n{CELLS[2]} {reason}" in capsys.readouterr().out
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS if cell != CELLS[2]}

    told.unlink()
    assert fake.run() == 0
    assert fake.started[4:] == [CELLS[2]]
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS}


def test_the_way_to_go_on(fake, capsys):
    """What was given to main, and not what pytest was started with."""
    fake.tell(CELLS[0], "fails")
    assert fake.run("--methods", "ppo") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    options = f"run --suite {fake.suite} -f {fake.folder} --scheduler {fake.address} --methods ppo"
    assert last == f"  python -m sb3_klip.experiments {options}"


def test_cells_start_in_the_order_of_the_suite(fake):
    seeds = [str(seed) for seed in range(6)]
    with in_this_process(1) as fake.address:
        assert fake.run("--seeds", *seeds) == 0
    assert fake.started == [f"CartPole-v1/{method}/seed-{seed}" for seed in seeds for method in ("ppo", "step")]


def test_interrupted_driver(fake, capsys, monkeypatch):
    """Ctrl-C, while cells of an external scheduler's workers run: their workers stay, and their trainings must not."""
    for cell in CELLS[:2]:
        fake.tell(cell, "wait")
    ended, reset = [], signal.getsignal(signal.SIGINT)
    original = scheduling.wait

    def wait(*args: Any, **kwargs: Any) -> Any:
        if all((fake.home / cell / "waits").exists() for cell in CELLS[:2]):
            ended.extend(trainings(fake.folder))
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scheduling, "wait", wait)
        assert fake.run() == 130
    signal.signal(signal.SIGINT, reset)
    assert len(ended) == 2
    eventually(lambda: not trainings(fake.folder), 10)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ended)
    out = capsys.readouterr().out
    assert f"Interrupted. What is finished is in {fake.folder}; to go on:\n  python -m sb3_klip.experiments run" in out
    assert digests(fake.folder) == {}

    for cell in CELLS[:2]:
        (fake.home / cell / "wait").unlink()
    assert fake.run() == 0
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS}
    assert sorted(fake.started[2:]) == sorted(CELLS)


def test_another_run_is_at_work(fake, capsys):
    fake.folder.mkdir()
    with FileLock(fake.folder / ".lock"):
        assert fake.run() == 2
    assert capsys.readouterr().err == f"another run is at work in {fake.folder}\n"
    assert fake.started == []
    assert fake.run() == 0


def test_workers_that_cannot_run_the_cells(fake, capsys, monkeypatch):
    monkeypatch.setattr(scheduling, "check_worker", lambda folder: f"{folder} is on the moon")
    assert fake.run() == 2
    first, *workers = capsys.readouterr().err.splitlines()
    assert first == "these workers cannot run the cells:"
    assert len(workers) == 2
    assert all(line.startswith("  - inproc://") and line.endswith(f": {fake.folder} is on the moon") for line in workers)
    assert fake.started == []


def test_a_worker_that_comes_later_and_cannot_run_a_cell(fake, capsys, monkeypatch):
    asked = fake.home / "asked"

    def check(folder: str) -> str | None:
        with asked.open("a") as file:
            file.write("asked\n")
        return None if asked.read_text().count("asked") <= 2 else "it has lost its disk"

    monkeypatch.setattr(scheduling, "check_worker", check)
    assert fake.run("--methods", "ppo", "--seeds", "0") == 1
    assert "CartPole-v1/ppo/seed-0 did not start on its worker: it has lost its disk" in capsys.readouterr().out
    assert fake.started == []


def test_default_folder(tmp_path, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--suite", fake.suite, "--scheduler", fake.address]) == 0
    assert set(digests(tmp_path / "logs" / "experiments" / "mine")) == {f"{cell}.csv" for cell in CELLS}


# -- workers and schedulers --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:Port 8787 is already in use")
def test_workers_of_this_machine(tmp_path):
    workers = 2 if dask.system.CPU_COUNT == 1 else 1
    with socket.socket() as dashboard:
        with contextlib.suppress(OSError):  # somebody else's is there
            dashboard.bind(("", 8787))
            dashboard.listen()
        with scheduling.connect(None, workers, tmp_path) as client:
            threads = client.nthreads()
            profilers = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
    assert list(threads.values()) == [1] * workers
    # Dask's profiler may hang a worker for ever (python/cpython#106883).
    assert list(profilers.values()) == [False] * workers


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "no such thing", "udp://127.0.0.1:9"])
def test_a_scheduler_that_does_not_answer(tmp_path, capsys, monkeypatch, address):
    # Dask tries for as long as it may.
    monkeypatch.setattr(scheduling, "Client", lambda address, timeout: Client(address, timeout="0.5s"))
    folder = tmp_path / "out"
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(folder), "--scheduler", address]) == 2
    assert capsys.readouterr().err.startswith(f"--scheduler={address!r} does not answer: ")


# -- kills and interrupts, for real ------------------------------------------------------------------------------------


# Some seconds each, so that they can be caught in the middle.
LONG: dict[str, Any] = {"timesteps": 20_480, "seeds": [0, 1, 2], "methods": {"step": {"beta": "step", "n_epochs": 2}}}


class Driver:
    """The command as a process, in a session of its own as in a terminal."""

    def __init__(self, folder: Path, *options: object):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        suite = write_suite(folder.parent, **LONG)
        words = [sys.executable, *run_suite("--suite", suite, "-f", folder, *options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=folder.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, status: int, seconds: float = 300) -> str:
        """Wait for its end."""
        assert self.process.wait(seconds) == status, self.log.read_text()
        return self.log.read_text()

    def is_in_the_middle(self) -> bool:
        """Whether one cell is finished, and another is being trained and has logged something."""
        assert self.process.poll() is None, self.log.read_text()
        return bool(digests(self.folder)) and any(
            len(path.read_text().splitlines()) > 5
            for process in trainings(self.folder)
            for path in [self.folder / run_of(process) / "progress.csv"]
            if path.exists()
        )

    def interrupt(self, number: int, group: bool) -> None:
        """A signal, to it alone or, as a terminal does, to all that it has started."""
        (os.killpg if group else os.kill)(self.process.pid, number)


def run_of(training: psutil.Process) -> str:
    """Folder of the run that a process is at work on."""
    return next(word for word in training.cmdline() if word.startswith("runs/"))


@pytest.fixture
def drive(tmp_path) -> Iterator[Callable[..., Driver]]:
    """Start drivers, of which nothing is left after the test."""
    drivers: list[Driver] = []

    def drive(*options: object) -> Driver:
        drivers.append(Driver(tmp_path / "out", *options))
        return drivers[-1]

    yield drive
    for driver in drivers:
        if driver.process.poll() is None:
            driver.interrupt(signal.SIGKILL, group=True)
        driver.process.wait()
    for process in trainings(tmp_path / "out"):
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    """What the cells are when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    Driver(folder, "--workers", 2).end(0)
    assert len(digests(folder)) == len(set(digests(folder).values())) == 3
    return digests(folder)


def kept(folder: Path) -> dict[Path, tuple[int, int]]:
    """All files of the finished cells."""
    names = [path.relative_to(folder / "results").with_suffix("") for path in folder.glob("results/*/*/*.csv")]
    return snapshot(folder, *(f"results/{name}.csv" for name in names), *(f"runs/{name}/**/*" for name in names))


def assert_goes_on(drive: Callable[..., Driver], folder: Path, undisturbed: dict[str, str]) -> None:
    """Start again: what is finished stays as it is, and the rest becomes what it would have been."""
    before, done = kept(folder), len(digests(folder))
    output = drive("--workers", 2).end(0)
    assert output.startswith(f"3 cells, {done} finished already")
    assert output.count("finished CartPole-v1/") == 3 - done
    assert snapshot(folder, *(str(path.relative_to(folder)) for path in before)) == before
    assert digests(folder) == undisturbed
    assert trainings(folder) == []


@pytest.mark.slow
def test_a_worker_is_killed(drive, undisturbed):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    before = kept(driver.folder)
    victim = trainings(driver.folder)[0]
    cell = run_of(victim)
    worker = victim.parent()
    assert worker is not None
    assert worker.pid != driver.process.pid
    worker.kill()
    # Its training must not go on beside the one that takes its place.
    eventually(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 60)
    eventually(
        lambda: (
            [process for process in trainings(driver.folder) if run_of(process) == cell]
            or digests(driver.folder) == undisturbed
        )
    )
    output = driver.end(0)
    assert digests(driver.folder) == undisturbed
    assert snapshot(driver.folder, *(str(path.relative_to(driver.folder)) for path in before)) == before
    assert output.count("\nfinished CartPole-v1/") == 3
    assert "failed CartPole-v1" not in output


@pytest.mark.slow
def test_the_driver_is_killed(drive, undisturbed):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    driver.process.kill()
    driver.process.wait()
    eventually(lambda: trainings(driver.folder) == [], 15)
    assert 1 <= len(digests(driver.folder)) < 3
    assert_goes_on(drive, driver.folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGINT, True, id="ctrl-c"),
        pytest.param(signal.SIGINT, False, id="SIGINT"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
    ],
)
def test_the_driver_is_interrupted(drive, undisturbed, number, group):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    driver.interrupt(number, group)
    output = driver.end(130, 30)
    eventually(lambda: trainings(driver.folder) == [], 10)
    assert "Traceback" not in output
    again = f"run --suite {driver.folder.parent / 'mine.yml'} -f {driver.folder} --workers 2"
    assert output.endswith(
        f"Interrupted. What is finished is in {driver.folder}; to go on:\n  python -m sb3_klip.experiments {again}\n"
    )
    assert 1 <= len(digests(driver.folder)) < 3
    assert_goes_on(drive, driver.folder, undisturbed)


@pytest.mark.slow
def test_interrupted_twice(drive):
    """Somebody is in a hurry."""
    driver = drive("--workers", 2)
    eventually(lambda: len(trainings(driver.folder)) == 2)
    driver.interrupt(signal.SIGINT, group=True)
    eventually(lambda: trainings(driver.folder) == [], 15)
    if driver.process.poll() is None:
        driver.interrupt(signal.SIGINT, group=True)
    assert "Traceback" not in driver.end(130, 30)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.5, 2])
def test_interrupted_as_the_workers_start(drive, seconds):
    """Dask's own processes are half made then, and have not been told yet that Ctrl-C is not for them."""
    driver = drive("--workers", 2)
    eventually(psutil.Process(driver.process.pid).children)
    time.sleep(seconds)
    driver.interrupt(signal.SIGINT, group=True)
    output = driver.end(130, 60)
    assert "Traceback" not in output
    assert "Fatal" not in output
    assert "\nInterrupted. What is finished is in " in output
    eventually(lambda: trainings(driver.folder) == [], 10)


@pytest.mark.slow
def test_interrupted_as_a_training_starts(drive):
    """The moment at which nobody knows the new process yet."""
    driver = drive("--workers", 2)
    eventually(lambda: trainings(driver.folder))
    driver.interrupt(signal.SIGINT, group=False)
    driver.end(130, 60)
    eventually(lambda: trainings(driver.folder) == [], 10)


@pytest.fixture
def dask_cluster(tmp_path) -> Iterator[SimpleNamespace]:
    """A scheduler and two workers as their own commands start them, and nothing of ours."""
    scheduler_file = tmp_path / "scheduler.json"
    processes: list[subprocess.Popen[bytes]] = []
    # Two workers of one machine; each with a nanny, as by default.
    commands = [
        ("dask_scheduler", "--scheduler-file", str(scheduler_file), "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
        *[("dask_worker", "--scheduler-file", str(scheduler_file), "--nthreads", "1", "--no-dashboard")] * 2,
    ]
    with (tmp_path / "dask.log").open("w") as log:
        for words in commands:
            program = [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:]]
            processes.append(subprocess.Popen(program, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
            eventually(scheduler_file.exists, 60)
    address = json.loads(scheduler_file.read_text())["address"]
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield SimpleNamespace(address=address, processes=processes)
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_an_external_scheduler(drive, undisturbed, dask_cluster):
    """Its workers outlive the driver; trainings that nobody waits for must not."""
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    driver.process.kill()
    driver.process.wait()
    eventually(lambda: trainings(driver.folder) == [], 30)
    before = kept(driver.folder)

    driver = drive("--scheduler", dask_cluster.address)
    eventually(lambda: trainings(driver.folder))
    driver.interrupt(signal.SIGTERM, group=False)
    assert "Interrupted." in driver.end(130, 30)
    eventually(lambda: trainings(driver.folder) == [], 10)
    assert all(process.poll() is None for process in dask_cluster.processes)

    drive("--scheduler", dask_cluster.address).end(0)
    assert digests(driver.folder) == undisturbed
    assert before.items() <= kept(driver.folder).items()


@pytest.mark.slow
def test_an_external_scheduler_goes_away(drive, undisturbed, dask_cluster):
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    os.killpg(dask_cluster.processes[0].pid, signal.SIGKILL)
    said = driver.end(1, 120)
    assert "The scheduler is gone." in said
    assert "to go on:\n  python -m sb3_klip.experiments run --suite" in said
    assert "Traceback" not in said
    eventually(lambda: trainings(driver.folder) == [], 60)
    drive().end(0)
    assert digests(driver.folder) == undisturbed


@pytest.mark.slow
def test_a_worker_of_an_external_scheduler_is_killed(drive, undisturbed, dask_cluster):
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    before = kept(driver.folder)
    victim = trainings(driver.folder)[0]
    # With its nanny, as when a machine is lost.
    lost = next(process for process in dask_cluster.processes[1:] if victim in psutil.Process(process.pid).children(True))
    os.killpg(lost.pid, signal.SIGKILL)
    for child in victim.parents()[:1]:
        child.kill()
    driver.end(0)
    assert digests(driver.folder) == undisturbed
    assert before.items() <= kept(driver.folder).items()
