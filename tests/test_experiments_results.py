"""What remains of a cell: its episodes, their digest, and a hundred rows."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sb3_klip.experiments.results import POINTS, Result, digest, read_episodes, read_result, summarize, write_result


def write_monitors(folder: Path, *environments: list[tuple[float, int]]) -> list[Path]:
    """SB3's files, from the returns and lengths of each environment's episodes."""
    paths = []
    for index, episodes in enumerate(environments):
        rows = "".join(f"{episode_return},{length},{0.5 * i}\n" for i, (episode_return, length) in enumerate(episodes))
        paths.append(folder / f"{index}.monitor.csv")
        paths[-1].write_text(f'#{{"t_start": 0.0, "env_id": "CartPole-v1"}}\nr,l,t\n{rows}')
    return paths


def test_episodes_of_several_environments(tmp_path):
    paths = write_monitors(tmp_path, [(1.5, 3), (2.5, 5)], [(3.5, 4), (4.5, 4)], [(0.0, 8)])
    episodes = read_episodes(paths[::-1])
    assert episodes.columns.tolist() == ["timesteps", "env", "return", "length"]
    # Three environments take three steps at a time; those that end at once stay in the order of the environments.
    assert episodes.to_numpy().tolist() == [[9, 0, 1.5, 3], [12, 1, 3.5, 4], [24, 0, 2.5, 5], [24, 1, 4.5, 4], [24, 2, 0.0, 8]]


def test_no_episode_has_ended(tmp_path):
    episodes = read_episodes(write_monitors(tmp_path, [], []))
    assert len(episodes) == 0
    result = summarize(episodes, pd.DataFrame({"time/total_timesteps": [100]}), 100, 128)
    assert (result.about["episodes"], result.about["final_return"], result.about["final_episodes"]) == (0, None, 0)
    write_result(tmp_path / "result.csv", result)
    assert read_result(tmp_path / "result.csv").curve["episodes"].tolist() == [0] * POINTS


@pytest.mark.filterwarnings("error")
def test_an_environment_without_an_episode(tmp_path):
    with_one = read_episodes(write_monitors(tmp_path, [(1.5, 3)], []))
    assert with_one.to_numpy().tolist() == [[6, 0, 1.5, 3]]
    assert digest(with_one) == hashlib.sha256(b"0,1.5,3").hexdigest()


def test_digest(tmp_path):
    first, second = [(1.0, 3), (2.0, 5)], [(3.0, 4), (4.0, 4)]

    def of(*environments: list[tuple[float, int]]) -> str:
        return digest(read_episodes(write_monitors(tmp_path, *environments)))

    text = "0,1.0,3\n1,3.0,4\n0,2.0,5\n1,4.0,4"
    assert of(first, second) == hashlib.sha256(text.encode()).hexdigest()
    others = [
        of([(1.000001, 3), (2.0, 5)], second),
        of([(1.0, 4), (2.0, 5)], second),
        of([(1.0, 3), (2.0, 6)], second),
        of(second, first),
        of([*first, (9.0, 1)], second),
        of(first[:1], second),
        of(first[::-1], second),
        of(first),
    ]
    assert len({of(first, second), *others}) == 1 + len(others)


def test_digest_does_not_depend_on_time(tmp_path):
    (path,) = write_monitors(tmp_path, [(1.0, 3), (2.0, 5)])
    before = digest(read_episodes([path]))
    path.write_text(path.read_text().replace('"t_start": 0.0', '"t_start": 7.0').replace(",0.5\n", ",7.5\n"))
    assert digest(read_episodes([path])) == before


def test_summary_by_hand():
    """A training of 1000 steps, which are cut into parts of ten, and which ended at step 1004."""
    steps = [5, 10, 11, 900, 905, 1000, 1004]
    episodes = pd.DataFrame({"timesteps": steps, "env": 0, "return": [1.0, 3, 5, 100, 7, 9, 11.2], "length": 5})
    log = pd.DataFrame(
        {
            "time/total_timesteps": [4, 8, 10, 500, 1004],
            "train/kill_fraction": [np.nan, 0.1, 0.3, 0.25, 0.05],
            "train/beta_p50": [np.nan, 1.0, 2.0, -3.0, 4.0],
            "train/unrelated": 1.0,
        }
    )
    about, curve = summarize(episodes, log, 1000, 1024)
    assert about.pop("episodes_sha256") == digest(episodes)
    assert about == {
        "timesteps": 1000,
        "episodes": 7,
        "final_return": 9.0667,  # (7 + 9 + 11.2) / 3
        "final_episodes": 3,
        "peak_kill_fraction": 0.3,
    }
    assert curve.columns.tolist() == ["timesteps", "episodes", "return", "kill_fraction", "beta_p50"]
    assert curve["timesteps"].tolist() == list(range(10, 1001, 10))

    def filled(name: str) -> dict[int, float]:
        return {index: pytest.approx(value) for index, value in curve[name].items() if value == value and value != 0}

    assert filled("episodes") == {0: 2, 1: 1, 89: 1, 90: 1, 99: 2}
    assert filled("return") == {0: 2.0, 1: 5.0, 89: 100.0, 90: 7.0, 99: 10.1}
    assert filled("kill_fraction") == {0: 0.2, 49: 0.25, 99: 0.05}
    assert filled("beta_p50") == {0: 1.5, 49: -3.0, 99: 4.0}


def test_summary_of_a_training_that_skips_frames():
    """Monitors below a wrapper such as Atari's count frames, here four in a step."""
    episodes = pd.DataFrame({"timesteps": [400, 2000, 3600, 4096], "env": 0, "return": [1.0, 2, 3, 4], "length": 1})
    about, curve = summarize(episodes, pd.DataFrame({"time/total_timesteps": []}), 1000, 1024)
    assert curve["episodes"].to_numpy().nonzero()[0].tolist() == [9, 49, 89, 99]
    assert (about["final_return"], about["final_episodes"]) == (4.0, 1)


def test_more_than_ten_environments(tmp_path):
    paths = write_monitors(tmp_path, *[[(float(i), 1)] for i in range(11)])
    assert read_episodes(paths)["return"].tolist() == list(range(11))


def test_summary_of_an_algorithm_that_kills_nothing():
    episodes = pd.DataFrame({"timesteps": [5], "env": [0], "return": [1.0], "length": [5]})
    result = summarize(episodes, pd.DataFrame({"time/total_timesteps": [100], "train/approx_kl": [0.1]}), 100, 128)
    assert "peak_kill_fraction" not in result.about
    assert result.curve.columns.tolist() == ["timesteps", "episodes", "return", "approx_kl"]


@pytest.fixture
def result() -> Result:
    """A result with numbers of all sizes."""
    curve = pd.DataFrame({"timesteps": np.arange(1, POINTS + 1) * 12345, "episodes": range(POINTS)})
    curve["return"] = np.random.default_rng(0).normal(size=POINTS) * np.logspace(-6, 6, POINTS)
    curve.loc[7, "return"] = np.nan
    about = {"task": "Hopper-v4", "seed": 0, "episodes_sha256": "ab" * 32, "final_return": None, "hyperparams": {"a": "β\n,"}}
    return Result(about, curve)


def test_written_and_read(tmp_path, result):
    path = tmp_path / "deep" / "er" / "seed-0.csv"
    write_result(path, result)
    about, curve = read_result(path)
    assert about == result.about
    assert curve.columns.tolist() == result.curve.columns.tolist()
    for name in ("timesteps", "episodes"):
        assert curve[name].tolist() == result.curve[name].tolist()
    np.testing.assert_array_equal(curve["return"], [float(f"{value:.4g}") for value in result.curve["return"]])
    assert [path.name for path in path.parent.iterdir()] == ["seed-0.csv"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:30], id="cut in the first line"),
        pytest.param(lambda content: content.splitlines()[0], id="without its curve"),
        pytest.param(lambda content: b"\n".join(content.splitlines()[1:]), id="without its first line"),
        pytest.param(lambda content: b"\n".join(content.splitlines()[:40]), id="cut in the curve"),
        pytest.param(lambda content: content.replace(b"# {", b"# [3]\n{"), id="something else"),
        pytest.param(lambda content: b"\xff\xfe" + content, id="bytes"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
        pytest.param(lambda content: content.replace(b",return", b",gone"), id="without a column"),
        pytest.param(lambda content: content.replace(b"\n", b"\nx", 2), id="text in the curve"),
    ],
)
def test_damaged_results(tmp_path, result, damage):
    path = tmp_path / "seed-0.csv"
    write_result(path, result)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"seed-0\.csv is not the result of a cell: ") as error:
        read_result(path)
    assert str(path) in str(error.value)
