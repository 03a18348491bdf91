"""Dask distributes the cells over workers, on this machine or on a cluster."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dask
from dask.distributed import Client, Future, LocalCluster, TimeoutError, get_worker, wait
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sb3_klip.experiments.cell import Cell, CellError, is_running, run_cell, steps_done
from sb3_klip.experiments.folder import check_worker
from sb3_klip.interruption import deferred_interrupt
from sb3_klip.progress import PipedProgress

#: What workers on this machine do first: Ctrl-C is for the driver alone, but a terminal sends it to all of them.
PRELOAD = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
#: Seconds between two looks at what the workers have done.
INTERVAL = 1.0


@contextmanager
def connect(scheduler: str | None, workers: int | None, folder: Path) -> Iterator[Client]:
    """
    Workers that can run the folder's cells.

    :param scheduler: address of a Dask scheduler; None to start workers of one thread each on this machine
    :param workers: how many, if here; None for one per core
    :param folder: the suite's folder
    :raises ValueError: if the scheduler does not answer, or a worker cannot run the cells
    """
    # Dask tells at length of each worker that comes and goes, and of what it still has to do when the scheduler has gone.
    for name in ("distributed", "distributed.client"):  # the latter has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # With Python 3.11.8 and older, Dask's profiler may hang its worker (python/cpython#106883); these only wait, anyway.
    dask.config.set({"distributed.worker.profile.enabled": False})
    if scheduler is None:
        with deferred_interrupt():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                preload=[PRELOAD],
            )
        with cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout="30s")
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler={scheduler!r} does not answer: {error}") from error
    with client:
        problems = client.run(check_worker, str(folder))
        if hindered := [f"  - {worker}: {problem}" for worker, problem in problems.items() if problem]:
            raise ValueError("these workers cannot run the cells:\n" + "\n".join(hindered))
        yield client


def run_cells(cells: Sequence[Cell], folder: Path, client: Client, console: Console) -> dict[str, str]:
    """
    Run cells until each has ended, and show how far they are.

    :param cells: those that are not finished, the most urgent first
    :param folder: the suite's folder
    :param client: the workers
    :param console: where progress is shown
    :return: what went wrong, by name of the cell that failed
    """
    futures: dict[Future, Cell] = {
        # A worker that dies takes its cell with it, and Dask gives it to another.
        client.submit(_run_on_worker, cell, str(folder), key=cell.name, pure=False, priority=-i): cell
        for i, cell in enumerate(cells)
    }
    failed: dict[str, str] = {}
    piped, total = PipedProgress(console), sum(cell.timesteps for cell in cells)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, speed_estimate_period=600) as progress:
            steps = progress.add_task("", total=total)
            open_futures = set(futures)
            while open_futures:
                ended = _wait(open_futures)
                for future in ended:
                    cell = futures[future]
                    if reason := future.result() if future.status == "finished" else _told(cell, future.exception()):
                        failed[cell.name] = reason
                    console.print(f"{'[red]failed[/]' if reason else 'finished'} {cell.name}", highlight=False)
                open_futures -= ended
                running = [futures[future] for future in open_futures if is_running(futures[future], folder)]
                taken = sum(cell.timesteps for future, cell in futures.items() if future not in open_futures)
                taken += sum(steps_done(cell, folder) for cell in running)
                counts = f"{len(futures) - len(open_futures) - len(failed)} done, {len(running)} running, {len(failed)} failed"
                waiting = len(open_futures) - len(running)
                progress.update(steps, completed=taken, description=f"{counts}, {waiting} waiting")
                piped.tell(f"{counts}, {waiting} waiting", taken / total)
    finally:
        client.cancel(list(futures))  # see _wanted
    return failed


def _told(cell: Cell, error: BaseException) -> str:
    """What went wrong, in the error's own words, which name the file if it is about one."""
    return f"{cell.name}: {type(error).__name__}: {error}"


def _run_on_worker(cell: Cell, folder: str) -> str | None:
    """One cell; what went wrong, if something did."""
    if problem := check_worker(folder):  # workers may have come since the others were asked
        return f"{cell.name} did not start on its worker: {problem}"
    try:
        run_cell(cell, Path(folder), lambda: _wanted(cell.name))
    except CellError as error:
        return str(error)
    return None


def _wanted(key: str) -> bool:
    """Whether somebody waits for this worker's task: nobody does when the driver was interrupted or killed."""
    task = get_worker().state.tasks.get(key)
    return task is not None and task.state != "cancelled"


def _wait(futures: set[Future]) -> set[Future]:
    """Those that have ended, after a while."""
    try:
        return wait(futures, timeout=INTERVAL, return_when="FIRST_COMPLETED").done
    except TimeoutError:  # Dask's: before Python 3.11 it is not the builtin one
        return set()
