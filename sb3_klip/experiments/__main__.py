"""``python -m sb3_klip.experiments``: the command line."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path

EPILOG = """\
examples:
  python -m sb3_klip.experiments run --suite smoke                          # tests the installation, one or two minutes
  python -m sb3_klip.experiments run --suite paper --tasks Hopper-v4 --seeds 0 1
  python -m sb3_klip.experiments run --suite paper --scheduler tcp://node1:8786
  python -m sb3_klip.experiments report logs/experiments/paper

To continue after an interruption, run the same command again. Finished cells are kept; interrupted cells start again.
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m sb3_klip.experiments",
        description="Experiments over tasks, methods and seeds. Each cell (one task, method and seed) is one run of RL Zoo.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="{run,report}")

    run = commands.add_parser("run", help="train the missing cells", epilog=EPILOG, formatter_class=made.formatter_class)
    suites = "paper, coefficients, wide, fast, knobs, reuse, reuse_long, smoke, or a YAML file of your own"
    run.add_argument("--suite", required=True, help=suites)
    run.add_argument("-f", "--folder", type=Path, help="folder for the results (default: logs/experiments/<suite>)")
    run.add_argument("--tasks", nargs="+", default=[], metavar="ENV", help="only these tasks (default: all of the suite)")
    run.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only these methods (default: all)")
    run.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="seeds (default: those of the suite)")
    run.add_argument("--workers", type=int, metavar="N", help="cells in parallel on this machine (default: number of cores)")
    run.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="use the workers of this Dask scheduler instead")

    report = commands.add_parser("report", help="make tables and figures from the finished cells")
    report.add_argument("folder", type=Path, help="folder of a suite; report.md and figures/ are written there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param arguments: of the command line
    :return: exit status: 0 if all went well, 1 if a cell failed or trainings that should be identical are not, 2 if an
        argument is wrong, 130 if interrupted
    """
    words = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(words)
    try:
        # Clusters end a job that has used up its time this way.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return _run(args, shlex.join(words)) if args.command == "run" else _report(args)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f'{error}: experiments need more packages: pip install "sb3-klip[experiments]"', file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, words: str) -> int:
    from distributed.comm import CommClosedError
    from filelock import FileLock, Timeout
    from rich.console import Console

    from sb3_klip.experiments.folder import open_folder
    from sb3_klip.experiments.scheduling import connect, run_cells
    from sb3_klip.experiments.suite import check_models, read_suite, select

    # Trainings run in the suite's folder, and do not find what only this one has; nor must the checks.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers={args.workers} must be at least 1")
    if args.workers is not None and args.scheduler is not None:
        raise ValueError("--workers starts workers here, and --scheduler uses those of a cluster: give one of the two")
    suite = read_suite(args.suite)
    cells = select(suite, args.tasks, args.methods, args.seeds)
    folder = (args.folder or Path("logs/experiments", suite.name)).absolute()
    missing = [cell for cell in cells if not cell.result_file(folder).exists()]
    check_models(suite, missing)
    open_folder(folder, suite, len(missing))
    print(f"{len(cells)} cell{'s' * (len(cells) != 1)}, {len(cells) - len(missing)} finished already; results go to {folder}")
    finished = f"All finished. Tables and figures:\n  python -m sb3_klip.experiments report {folder}"
    if not missing:
        print(finished)
        return 0
    print(f"To train: {sum(cell.timesteps for cell in missing):,} steps of {len(missing)} cells")
    again = f"python -m sb3_klip.experiments {words}"
    try:
        with FileLock(folder / ".lock", timeout=0), connect(args.scheduler, args.workers, folder) as client:
            try:
                failed = run_cells(missing, folder, client, Console())
            except KeyboardInterrupt:
                # What follows takes seconds, and must come to its end.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise
    except Timeout:
        raise ValueError(f"another run is at work in {folder}") from None
    except (CancelledError, CommClosedError):  # Dask's CancelledError is one, too
        print(f"\nThe scheduler is gone. What is finished is in {folder}; to go on:\n  {again}")
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is finished is in {folder}; to go on:\n  {again}")
        return 130
    for reason in failed.values():
        print(f"\n{reason}")
    if failed:
        print(f"\n{len(failed)} of {len(missing)} cells failed. To try them again:\n  {again}")
        return 1
    print(finished)
    return 0


def _report(args: argparse.Namespace) -> int:
    from sb3_klip.experiments.report import write_report

    try:
        identical = write_report(args.folder)
    except OSError as error:
        raise ValueError(f"the report of {args.folder} cannot be written: {error}") from None
    print((args.folder / "report.md").read_text(encoding="utf-8"))
    print(f"Written to {args.folder / 'report.md'} and {args.folder / 'figures'}.")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a pipe on Windows may have no ±
    sys.exit(main())
