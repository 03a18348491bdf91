"""The folder of a suite: which suite it belongs to, and whether there is enough disk space."""

import json
import shutil
from pathlib import Path
from typing import Any

from sb3_klip.experiments.results import Result, read_result
from sb3_klip.experiments.suite import CONF, Suite
from sb3_klip.files import write_atomically
from sb3_klip.reproducibility import deciding_versions

#: What a cell leaves on the disk is less than this, in bytes (measured: 1 to 5 MB).
CELL_SIZE = 20_000_000
#: File that says which suite, under which versions, the folder is for.
MANIFEST = "suite.json"
#: What a report needs to know of a result.
KEYS = ("task", "method", "seed", "algo", "hyperparams", "timesteps", "final_return", "versions", "processor")


def open_folder(folder: Path, suite: Suite, cells: int) -> None:
    """
    Make a folder ready for a suite's cells, or go on with it.

    :param folder: the folder; made if it is not there
    :param suite: whose results it holds, or is to hold
    :param cells: number of cells still to run
    :raises ValueError: if it belongs to another suite or other versions, cannot be written to, or the disk is too full
    """
    ours = {"suite": suite.name, "versions": deciding_versions(), "definition": suite.definition}
    # In a Python module, hyperparameters may be classes and functions.
    text = json.dumps(ours, indent=1, default=lambda value: getattr(value, "__qualname__", repr(value)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            theirs = _manifest(folder)
            ours = json.loads(text)  # no tuples
            # What only one of them has is no difference: a suite may have got new tasks and methods since, or lost some.
            recorded, wanted = theirs["definition"], ours["definition"]
            theirs["definition"], ours["definition"] = {**wanted, **recorded}, {**recorded, **wanted}
            if different := _differences(theirs, ours):
                listed = "\n".join(f"  - {line}" for line in different)
                raise ValueError(f"{folder} has results of another suite or version; choose another --folder:\n{listed}")
            text = json.dumps(theirs, indent=1)
        # A file of some size: an empty one fits on a full disk.
        probe = folder / ".probe"
        probe.write_bytes(bytes(2**20))
        probe.unlink()
        if (free := shutil.disk_usage(folder).free) < cells * CELL_SIZE:
            needed = cells * CELL_SIZE / 1e9
            raise ValueError(f"{folder} has {free / 1e9:.1f} GB left, and {cells} cells may need {needed:.1f} GB")
        if suite.conf is not None:
            write_atomically(folder / CONF, suite.conf.encode())
        write_atomically(folder / MANIFEST, f"{text}\n".encode())
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be written to: {error}") from error


def check_worker(folder: str) -> str | None:
    """
    What hinders a worker from running the folder's cells; None if nothing does.

    :param folder: as the worker is told
    """
    try:
        theirs = _manifest(Path(folder))["versions"]
    except OSError as error:
        return f"it does not see {folder}, which must be on a disk that all workers share ({error.strerror})"
    if different := _differences(theirs, deciding_versions()):
        return f"its versions are not those of {folder}: {'; '.join(different)}"
    return None


def read_folder(folder: Path) -> tuple[dict[str, Any], list[Result]]:
    """
    All finished cells.

    :return: the manifest, and the results in the order of their paths
    :raises ValueError: if there are none, one is not of the suite's methods, or something cannot be read
    """
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} has no {MANIFEST}, so it is not the folder of a suite")
    paths = sorted(folder.glob("results/*/*/seed-*.csv"))
    if not paths:
        raise ValueError(f"{folder} has no finished cells yet")
    manifest, results = _manifest(folder), [read_result(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        _check_result(path, path.relative_to(folder), result.about, manifest["definition"])
    return manifest, results


def _check_result(path: Path, place: Path, about: dict[str, Any], definition: dict[str, Any]) -> None:
    """Refuse a result that is not of the suite's methods, as where those of another folder were copied, or misplaced."""
    if missing := [key for key in KEYS if key not in about]:
        raise ValueError(f"{path} is not the result of a cell: it has no {', '.join(missing)}")
    name = f"{about['task']}/{about['method']}"
    own = Path("results", about["task"].replace("/", "-"), about["method"], f"seed-{about['seed']}.csv")
    if place != own:
        raise ValueError(f"{path} is the result of {own}, so it would count as another one: remove it, or rename it")
    if name not in definition:
        raise ValueError(f"{path} is of {name}, which {MANIFEST} does not have: `run` adds it, with a suite that has it")
    made_with = {**about["hyperparams"], "algo": about["algo"], "n_timesteps": about["timesteps"]}
    expected = {key: definition[name].get(key) for key in made_with}
    if different := _differences(made_with, expected):
        raise ValueError(f"{path} is of another {name} than {MANIFEST} has: {'; '.join(different)}")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if missing := {"suite", "versions", "definition"} - {*manifest}:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        if not isinstance(manifest["definition"], dict) or not manifest["definition"]:
            raise ValueError("it defines no cell")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    return manifest


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """The places where two JSON values differ."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return [] if theirs == ours else [f"{path}: {theirs!r} there, {ours!r} here"]
    found = []
    for key in dict.fromkeys([*theirs, *ours]):
        place = f"{path}.{key}" if path else key
        if key not in ours or key not in theirs:
            found.append(f"{place}: only {'there' if key in theirs else 'here'}")
        else:
            found += _differences(theirs[key], ours[key], place)
    return found
