"""A suite's folder: whose results it holds, and whether there is room for more."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_suites import SUITE, TINY, made_up_result, write_suite

from sb3_klip.experiments.__main__ import main
from sb3_klip.experiments.folder import check_worker, open_folder, read_folder
from sb3_klip.experiments.results import Result, write_result
from sb3_klip.experiments.suite import Suite, read_suite


def test_hyperparameters_that_are_no_plain_data(tmp_path, monkeypatch):
    """As a module may have them; a folder is gone on with, and a change is noticed."""
    module = "from torch import nn\n"
    module += "hyperparams = {'default': {'n_timesteps': 9, 'env_wrapper': nn.ReLU, 'rollout_buffer_class': lambda x: x}}"
    (tmp_path / "own_tuned.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_suite(tmp_path, hyperparams="own_tuned", methods={"step": {}})
    open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned")
    open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned").hyperparams["default"]["env_wrapper"] = None
    (tmp_path / "own_tuned.py").write_text(module.replace("ReLU", "Tanh  "))
    with pytest.raises(ValueError, match="env_wrapper: 'ReLU' there, 'Tanh' here"):
        open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned")


def test_hyperparameters_that_have_changed(tmp_path):
    def suite(n_steps: int, n_envs: int) -> Suite:
        entry = {"policy": "MlpPolicy", "n_timesteps": 100, "n_steps": n_steps, "n_envs": n_envs}
        (tmp_path / "tuned.yml").write_text(yaml.safe_dump({"default": entry}))
        return read_suite(write_suite(tmp_path, hyperparams="tuned.yml", methods={"step": {}}))

    open_folder(tmp_path / "out", suite(64, 1), 1)
    open_folder(tmp_path / "out", suite(64, 1), 1)
    with pytest.raises(ValueError, match="has results of another suite or version") as error:
        open_folder(tmp_path / "out", suite(32, 2), 1)
    assert set(str(error.value).splitlines()[1:]) == {
        "  - definition.CartPole-v1/step.n_steps: 64 there, 32 here",
        "  - definition.CartPole-v1/step.n_envs: 1 there, 2 here",
    }


def test_results_of_another_folder_are_told_apart(tmp_path):
    """As where two folders were merged, which is done by copying files."""
    folder = tmp_path / "out"
    open_folder(folder, read_suite(write_suite(tmp_path, methods={"step": {"beta": "step", "gamma": 0.9}})), 1)
    made_with = {"hyperparams": {"beta": "step", "gamma": 0.9}, "timesteps": 512}

    def put(method: str, **changes: Any) -> None:
        about, curve = made_up_result("CartPole-v1", method, 0, 1.0)
        path = folder / "results" / "CartPole-v1" / method / "seed-0.csv"
        write_result(path, Result({**about, **made_with, **changes}, curve))

    put("step")
    assert len(read_folder(folder)[1]) == 1
    put("step", hyperparams={"beta": "step", "gamma": 0.8}, timesteps=7)
    with pytest.raises(
        ValueError, match=r"seed-0\.csv is of another CartPole-v1/step .*gamma: 0\.8 there, 0\.9 here; n_timesteps: 7"
    ):
        read_folder(folder)
    put("step")
    put("other")
    with pytest.raises(
        ValueError, match=r"seed-0\.csv is of CartPole-v1/other, which suite\.json does not have: `run` adds it"
    ):
        read_folder(folder)


def test_a_result_that_is_not_in_its_place_or_incomplete(tmp_path):
    """A copy would count as one more seed."""
    folder = tmp_path / "out"
    open_folder(folder, read_suite(write_suite(tmp_path, methods={"step": {"beta": "step"}})), 1)
    about, curve = made_up_result("CartPole-v1", "step", 0, 1.0)
    about |= {"hyperparams": {"beta": "step"}, "timesteps": 512}
    path = folder / "results" / "CartPole-v1" / "step" / "seed-0.csv"
    write_result(path, Result(about, curve))
    read_folder(folder)
    copied = shutil.copy(path, path.with_name("seed-99.csv"))
    with pytest.raises(ValueError, match=r"seed-99\.csv is the result of results/.*seed-0\.csv, so it would count as another"):
        read_folder(folder)
    Path(copied).unlink()
    del about["task"], about["versions"]
    write_result(path, Result(about, curve))
    with pytest.raises(ValueError, match=r"seed-0\.csv is not the result of a cell: it has no task, versions"):
        read_folder(folder)


def test_what_hinders_a_worker(tmp_path):
    folder = tmp_path / "out"
    assert "does not see" in str(check_worker(str(folder)))
    assert "which must be on a disk that all workers share" in str(check_worker(str(folder)))
    open_folder(folder, read_suite(write_suite(tmp_path)), 1)
    assert check_worker(str(folder)) is None

    path = folder / "suite.json"
    content = json.loads(path.read_text())
    ours = content["versions"]["torch"]
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    assert check_worker(str(folder)) == f"its versions are not those of {folder}: torch: '1.0' there, {ours!r} here"


def test_a_folder_of_another_suite(refused, tmp_path):
    suite = write_suite(tmp_path)
    open_folder(tmp_path / "out", read_suite(suite), 1)
    methods = {"ppo": SUITE["methods"]["ppo"], "step": {"beta": "step", **TINY, "n_steps": 32}, "none": {"beta": "none"}}
    lines = refused("--suite", write_suite(tmp_path, methods=methods), "-f", "out").splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'} has results of another suite or version")
    assert lines[1:] == ["  - definition.CartPole-v1/step.n_steps: 64 there, 32 here"]


def test_a_suite_that_has_grown_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "out"

    def definition(**changes: Any) -> dict[str, Any]:
        open_folder(folder, read_suite(write_suite(tmp_path, **changes)), 1)
        return json.loads((folder / "suite.json").read_text())["definition"]

    before = definition()
    grown = {"none": {"beta": "none", **TINY}, **SUITE["methods"]}
    after = definition(methods=grown, tasks=["Hopper-v4", "CartPole-v1"])
    # In the suite's order, which is that of the report.
    assert [*after] == [f"{task}/{method}" for task in ("Hopper-v4", "CartPole-v1") for method in grown]
    assert before.items() <= after.items()
    # What is no longer in the suite has results still.
    assert definition(methods={"step": SUITE["methods"]["step"]}) == after
    with pytest.raises(ValueError, match=r"definition\.CartPole-v1/none\.beta: 'none' there, 'step' here"):
        definition(methods={**grown, "none": {"beta": "step", **TINY}})


def test_a_folder_of_other_versions(refused, tmp_path):
    suite = write_suite(tmp_path)
    open_folder(tmp_path / "out", read_suite(suite), 1)
    path = tmp_path / "out" / "suite.json"
    content = json.loads(path.read_text())
    content["versions"]["mujoco"] = "2.1"
    path.write_text(json.dumps(content))
    assert "  - versions.mujoco: '2.1' there, " in refused("--suite", suite, "-f", "out")


def test_a_folder_of_another_name(refused, tmp_path):
    open_folder(tmp_path / "out", read_suite(write_suite(tmp_path)), 1)
    (tmp_path / "mine.yml").rename(tmp_path / "yours.yml")
    assert "  - suite: 'mine' there, 'yours' here" in refused("--suite", "yours.yml", "-f", "out")


@pytest.mark.parametrize("content", ["", "[", "3"])
def test_a_folder_whose_description_is_damaged(refused, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "suite.json").write_text(content)
    assert str(tmp_path / "out") in refused("--suite", write_suite(tmp_path), "-f", "out")


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(refused, tmp_path, folder):
    (tmp_path / "file").touch()
    message = refused("--suite", write_suite(tmp_path), "-f", folder)
    assert message.startswith(f"the folder {tmp_path / folder} cannot be written to: ")


def test_a_disk_that_is_too_full(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))
    folder = tmp_path / "out"
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(folder)]) == 2
    assert capsys.readouterr().err == f"{folder} has 0.0 GB left, and 4 cells may need 0.1 GB\n"
    assert not (folder / "suite.json").exists()
    # One cell fits.
    open_folder(folder, read_suite(write_suite(tmp_path)), 1)
    assert sorted(path.name for path in folder.iterdir()) == ["suite.json"]


def test_a_disk_that_takes_nothing(tmp_path, monkeypatch, capsys):
    def write_bytes(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"the folder {tmp_path / 'out'} cannot be written to: ")
