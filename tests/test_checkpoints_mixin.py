"""Saving and loading: to the base class and back, coefficients, and files that are never half there."""

import json
import os
import pathlib
import zipfile

import pytest
import torch as th
from checkpoint_files import BASES, VARIANTS, assert_predicts_alike, content, load, members, small, task, trained
from helpers import assert_identical, collected
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_klip import KLipPPO
from sb3_klip.coefficients import make


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_to_the_base_class_and_back(ours, name):
    """The coefficient and what it has learned wait in the base class's file, even if that trains in between."""
    base = BASES[ours]
    schedules = {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "clip_range": LinearSchedule(0.3, 0.1, 1.0)}
    parameters = {"beta": "adaptive", "beta_kwargs": {"kl_target": 0.5}, "log_kl": True}
    model = small(ours, task(name), **schedules, **parameters).learn(96)
    assert model.beta.state_dict() != small(ours, task(name), **parameters).beta.state_dict()
    theirs = load(content(model), base, env=task(name))
    assert_identical(theirs, model)
    assert type(theirs) is base
    for progress in (1.0, 0.4):
        assert theirs.lr_schedule(progress) == model.lr_schedule(progress)
        assert theirs.clip_range(progress) == model.clip_range(progress)
    theirs.learn(32, reset_num_timesteps=False)
    again = load(content(theirs), ours, env=task(name))
    assert_identical(again, theirs)
    assert (again.num_timesteps, again.lr_schedule(0.4), again.clip_range(0.4)) == (
        128,
        model.lr_schedule(0.4),
        model.clip_range(0.4),
    )
    assert repr(again.beta) == repr(model.beta)
    assert again.beta.state_dict() == model.beta.state_dict()
    assert again.log_kl is True
    again.learn(32, reset_num_timesteps=False)
    assert again.beta.state_dict() != model.beta.state_dict()


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_a_model_of_the_base_class(ours, name):
    model, checkpoint = trained(BASES[ours], name)
    with collected() as messages:
        loaded = load(checkpoint, ours, env=task(name))
    assert messages == []
    assert_identical(loaded, model)
    assert (loaded.gamma, loaded.clip_range(0.5), repr(loaded.beta)) == (0.97, 0.15, "step()")
    assert repr(load(checkpoint, ours, beta="sigmoid").beta) == "sigmoid(temperature=0.05)"
    loaded.learn(32, reset_num_timesteps=False)
    assert_predicts_alike(load(content(loaded), BASES[ours]), loaded)


# -- the coefficient -------------------------------------------------------------------------------------------------------


def sinking(ratio, advantages, clip_range, *, depth=0.5):
    """A coefficient of a user's own that lives in an importable module."""
    return th.full_like(ratio, depth)


def trained_with(**kwargs):
    return small(KLipPPO, task("discrete"), **kwargs).learn(64)


def test_saving_does_not_change_the_model(tmp_path):
    model = trained_with(beta="adaptive", beta_kwargs={"initial": 2.0})
    before, attributes = repr(model.beta), set(vars(model))
    model.save(tmp_path / "model")
    assert repr(model.beta) == before
    assert set(vars(model)) == attributes


def test_the_coefficient_is_plain_json_in_the_file(tmp_path):
    model = trained_with(beta="adaptive", beta_kwargs={"kl_target": 0.01})
    model.save(tmp_path / "model")
    data = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert data["beta"] == "adaptive"
    assert data["beta_kwargs"] == {"initial": 1.0, "kl_target": 0.01, "factor": 2.0, "estimator": "analytic"}
    assert data["beta_state"] == {"adaptive": model.beta.state_dict()}
    assert model.beta.state_dict() != {}


def test_own_function_is_found_again_by_its_module(tmp_path):
    model = trained_with(beta=sinking, beta_kwargs={"depth": 0.25})
    model.save(tmp_path / "model")
    loaded = KLipPPO.load(tmp_path / "model", env=task("discrete"))
    assert loaded.beta.function is sinking
    assert loaded.beta.parameters == {"depth": 0.25}


class Deep:
    """An object of the user's own, made with an argument."""

    def __init__(self, depth):
        self.depth = depth
        self.updates = 0

    def __call__(self, ratio, advantages, clip_range, *, share=1.0):
        return th.full_like(ratio, self.depth * share)

    def end_update(self, kl, *, share):
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


@pytest.mark.parametrize(
    ("beta", "beta_kwargs"),
    [(Deep(0.25), {"share": 0.5}), (f"{Deep.__module__}:Deep", {"depth": 0.25, "share": 0.5})],
    ids=["object", "name"],
)
def test_own_object_is_made_again_with_its_arguments(beta, beta_kwargs):
    model = trained_with(beta=beta, beta_kwargs=beta_kwargs)
    data = json.loads(members(content(model))["data"])
    assert (data["beta"], data["beta_kwargs"]) == (f"{Deep.__module__}:Deep", {"depth": 0.25, "share": 0.5})
    loaded = load(content(model), env=task("discrete"))
    assert (loaded.beta.function.depth, loaded.beta.values) == (0.25, {"share": 0.5})
    assert loaded.beta.state_dict() == model.beta.state_dict() == {"updates": 2}
    loaded.learn(32)
    assert loaded.beta.state_dict() == {"updates": 3}
    assert model.beta.state_dict() == {"updates": 2}


# -- where models are saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("owner", [(os, "fsync"), (pathlib.Path, "replace")])
def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch, owner, error):
    model = small(KLipPPO, task("box"))
    path = tmp_path / "model.zip"
    model.save(path)
    old, attributes = path.read_bytes(), set(vars(model))
    model.learn(32)

    def failing(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*owner, failing)
        with pytest.raises(type(error)):
            model.save(path)
    assert path.read_bytes() == old
    assert KLipPPO.load(path).num_timesteps == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    assert attributes <= set(vars(model))
    assert "klip_format" not in vars(model)
    model.save(path)
    assert KLipPPO.load(path).num_timesteps == 32
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]


def test_at_any_moment_of_saving_there_is_a_whole_file(tmp_path, monkeypatch):
    model = small(KLipPPO, task("box"))
    path = tmp_path / "model.zip"
    model.save(path)
    model.learn(32)
    seen = []

    def watching(function):
        def watch(*args):
            seen.append(KLipPPO.load(path).num_timesteps)
            result = function(*args)
            seen.append(KLipPPO.load(path).num_timesteps)
            return result

        return watch

    monkeypatch.setattr(os, "fsync", watching(os.fsync))
    monkeypatch.setattr(pathlib.Path, "replace", watching(pathlib.Path.replace))
    model.save(path)
    assert seen[:4] == [0, 0, 0, 32]  # on the disk first, and only then in place of the old one
    assert set(seen[4:]) <= {32}


@pytest.mark.parametrize("kind", [str, pathlib.Path])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model", "model.zip"),
        ("model.zip", "model.zip"),
        ("model.backup", "model.backup"),
        ("new/folder/model", "new/folder/model.zip"),
        ("old", "old.zip"),
        ("taken.zip", "taken.zip_2"),
    ],
)
def test_where_models_are_saved(tmp_path, kind, name, file):
    """As SB3 does."""
    (tmp_path / "old").mkdir()
    (tmp_path / "taken.zip").mkdir()
    model = trained(KLipPPO, "box")[0]
    with collected():
        model.save(kind(tmp_path / name))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / file]
    assert_predicts_alike(KLipPPO.load(files[0]), model)
    files[0].unlink()
    with collected():
        PPO.save(model, kind(tmp_path / name))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == files


def test_saving_to_open_files(tmp_path):
    model = trained(KLipPPO, "box")[0]
    assert_predicts_alike(load(content(model)), model)
    with (tmp_path / "model").open("wb") as file:
        model.save(file)
        assert not file.closed
    assert_predicts_alike(KLipPPO.load(tmp_path / "model"), model)
    with pytest.raises(ValueError, match="writable"), (tmp_path / "model").open("rb") as file:
        model.save(file)


# -- arguments of load -----------------------------------------------------------------------------------------------------


def test_what_the_file_has_learned_is_not_for_an_object():
    checkpoint = content(small(KLipPPO, task("box"), beta="adaptive").learn(128))
    assert load(checkpoint, beta="adaptive").beta.state_dict() != make("adaptive").state_dict()
    own = make("adaptive")
    own.load_state_dict({"value": 7.0})
    assert load(checkpoint, beta=own).beta.state_dict() == {"value": 7.0}


def test_a_resumed_run_goes_on_with_what_its_coefficient_has_learned(tmp_path):
    model = small(KLipPPO, task("box"), beta="adaptive").learn(128)
    with pytest.raises(TypeError, match="resumable='no' must be True or False"):
        model.save(tmp_path / "model", resumable="no")
    model.save(tmp_path / "model", resumable=True)
    resumed = KLipPPO.load(tmp_path / "model", env=task("box"), resume=True, beta=make("adaptive"))
    assert resumed.beta.state_dict() == model.beta.state_dict() != make("adaptive").state_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_epochs": 0}, ValueError, "n_epochs=0 must be a whole number, at least 1"),
        ({"log_kl": "yes"}, TypeError, "log_kl='yes' must be True or False"),
        ({"trusted": "False"}, TypeError, "trusted='False' must be True or False"),
        ({"resume": "no"}, TypeError, "resume='no' must be True or False"),
        ({"trustd": False}, TypeError, "no argument 'trustd'. Did you mean 'trusted'?"),
        ({"resum": True}, TypeError, "no argument 'resum'. Did you mean 'resume'?"),
        ({"compile": {"backend": "nope"}}, ValueError, "backend='nope' must be one of"),
        ({"compile": 1}, TypeError, "compile must be True, False or a dict"),
    ],
)
def test_wrong_arguments_are_refused_as_by_the_constructor(arguments, error, message):
    checkpoint = content(small(KLipPPO, task("box")))
    with pytest.raises(error, match=message):
        load(checkpoint, **arguments)
