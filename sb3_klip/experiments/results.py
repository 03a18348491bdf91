"""
The result of a cell: one CSV file of about a hundred rows. Its first line is JSON and says how the result was made.

It is written when the cell has ended, and in one step: a cell is finished if and only if this file exists.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from sb3_klip.diagnostics import PERCENTILES
from sb3_klip.files import write_atomically

#: Rows of a curve: the training steps are cut into as many parts of equal length.
POINTS = 100
#: Share of training, at its end, whose episodes give the final return, as in the paper.
LAST = 0.1
#: What is kept of the run's log, where the algorithm logs it.
LOGGED = (
    *("kill_fraction", "pass_fraction", "clip_fraction", "approx_kl", "kl", "beta_scalar"),
    *(f"beta_p{level:02}" for level in PERCENTILES),
)


class Result(NamedTuple):
    """
    The result of a finished cell.

    :param about: how it was made (command, versions, commit, processor), and its numbers
    :param curve: one row for each of ``POINTS`` parts of training: ``timesteps`` at its end, number of ``episodes`` that ended
        in this part, their mean ``return``, and the means of the logged values
    """

    about: dict[str, Any]
    curve: pd.DataFrame


def read_episodes(monitors: Sequence[Path]) -> pd.DataFrame:
    """
    The episodes of a training, in the order in which they ended.

    :param monitors: SB3's monitor files, one for each environment
    :return: columns ``timesteps`` (of training, when the episode ended), ``env``, ``return``, ``length``
    """
    parts = []
    for index, path in enumerate(sorted(monitors, key=lambda path: int(path.name.split(".")[0]))):
        episodes = pd.read_csv(path, skiprows=1, dtype={"r": float, "l": int}).rename(columns={"r": "return", "l": "length"})
        episodes["env"] = index
        episodes["timesteps"] = episodes["length"].cumsum() * len(monitors)
        parts.append(episodes[["timesteps", "env", "return", "length"]])
    return pd.concat(parts).sort_values(["timesteps", "env"], kind="stable", ignore_index=True)


def digest(episodes: pd.DataFrame) -> str:
    """What two trainings share if and only if all their episodes have the same returns and lengths, in the same order."""
    rows = episodes[["env", "return", "length"]].itertuples(index=False)
    return hashlib.sha256("\n".join(f"{env},{value!r},{length}" for env, value, length in rows).encode()).hexdigest()


def summarize(episodes: pd.DataFrame, log: pd.DataFrame, timesteps: int, taken: int) -> Result:
    """
    A run in a hundred rows.

    :param episodes: as from :func:`read_episodes`
    :param log: what SB3's logger got, one row per dump
    :param timesteps: length of the training, as it was asked for
    :param taken: steps it took, which are more, as it ends with a whole rollout
    """
    # Where a wrapper skips frames, as on Atari, the monitors below it have counted more than steps.
    steps = episodes["timesteps"] * min(1.0, taken / episodes["timesteps"].max())
    edges = np.linspace(0, timesteps, POINTS + 1)
    part = pd.cut(steps.clip(upper=timesteps), edges, labels=False)
    by_part = episodes.groupby(part)["return"]
    curve = pd.DataFrame({"timesteps": edges[1:].astype(int)})
    curve["episodes"] = by_part.size().reindex(curve.index, fill_value=0)
    curve["return"] = by_part.mean()
    log_part = pd.cut(log["time/total_timesteps"].clip(upper=timesteps), edges, labels=False)
    for name in LOGGED:
        if (key := f"train/{name}") in log:
            curve[name] = log.groupby(log_part)[key].mean()

    last = episodes.loc[steps > (1 - LAST) * timesteps, "return"]
    about = {
        "timesteps": timesteps,
        "episodes": len(episodes),
        "episodes_sha256": digest(episodes),
        "final_return": round(float(last.mean()), 4) if len(last) else None,
        "final_episodes": len(last),
    }
    if "train/kill_fraction" in log:
        about["peak_kill_fraction"] = round(float(log["train/kill_fraction"].max()), 4)
    return Result(about, curve)


def write_result(path: Path, result: Result) -> None:
    """Write a cell's file, in one step; numbers of the curve are rounded to four digits."""
    curve = result.curve.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"# {json.dumps(result.about)}\n{curve}".encode())


def read_result(path: Path) -> Result:
    """
    Read the result of a cell.

    :param path: its CSV file
    :return: the result
    :raises ValueError: if the file is not the result of a cell
    """
    try:
        first, _, rest = path.read_text().partition("\n")
        result = Result(json.loads(first.removeprefix("#")), pd.read_csv(io.StringIO(rest)))
        is_whole = len(result.curve) == POINTS and {"timesteps", "episodes", "return"} <= {*result.curve}
        if "episodes_sha256" not in result.about or not is_whole:
            raise ValueError("a part is missing")
        if not all(map(is_numeric_dtype, result.curve.dtypes)):
            raise ValueError("its curve holds more than numbers")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not the result of a cell: {error}") from error
    return result
