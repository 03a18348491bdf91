"""What a model is loaded with: the file's, what the caller gives, and what was lost."""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from checkpoint_files import BASES, CONFIG, VARIANTS, gym_era, trained, zoo_agent
from helpers import FAST, cartpole, collected, train

from sb3_klip import KLipPPO, KLipRecurrentPPO

SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}


class PassesOn(KLipPPO):
    """A user's subclass, whose constructor names none of the arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    KLipPPO("MlpPolicy", "CartPole-v1", beta="linear_ramp", beta_kwargs={"width": 0.3}, **SMALL).save(tmp_path / "model")
    return tmp_path / "model.zip"


@pytest.mark.parametrize("algorithm", [KLipPPO, PassesOn])
def test_other_parameters_for_the_coefficient_of_the_file(algorithm: type[KLipPPO], file: Path) -> None:
    assert repr(algorithm.load(file, beta_kwargs={"width": 0.4}).beta) == "linear_ramp(width=0.4)"
    with pytest.raises(TypeError, match="no parameter 'temperature'"):
        algorithm.load(file, beta_kwargs={"temperature": 0.4})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bta": "step"}, "KLipPPO.load has no argument 'bta'. Did you mean 'beta'?"),
        ({"custom_objects": {"learning_rat": 0.1}}, "'learning_rat'. Did you mean 'learning_rate'?"),
    ],
)
def test_a_misspelt_argument_is_refused(file: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        KLipPPO.load(file, **kwargs)
    # SB3 sets any other as an attribute.
    assert KLipPPO.load(file, my_own_thing=3, num_timesteps=7).my_own_thing == 3


def test_arguments_are_as_the_constructor_has_them(file: Path) -> None:
    assert KLipPPO.load(file, compile={}).compile is True
    for weights in (np.array([0.6, 0.4]), (0.6, 0.4)):
        assert KLipPPO.load(file, reuse=weights).reuse == [0.6, 0.4]
    assert type(KLipPPO.load(file, reuse=np.int64(2)).reuse) is int
    KLipRecurrentPPO("MlpLstmPolicy", "CartPole-v1", **SMALL).save(file)
    with pytest.raises(ValueError, match=r"reuse=\[0\.6, 0\.4\] must be 1 for KLipRecurrentPPO"):
        KLipRecurrentPPO.load(file, reuse=np.array([0.6, 0.4]))


def test_a_file_without_a_coefficient_has_the_default(file: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped.zip"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(stripped, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                data = json.loads(content)
                content = json.dumps({key: value for key, value in data.items() if "beta" not in key}).encode()
            target.writestr(name, content)
    assert repr(PassesOn.load(stripped).beta) == "step()"
    with pytest.raises(TypeError, match="'step' has no parameter 'width'"):
        PassesOn.load(stripped, beta_kwargs={"width": 0.1})


def test_a_lost_schedule_has_the_default_of_the_class_that_names_it(file: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost.zip"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(lost, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                data = json.loads(content)
                data["clip_range"] = data["learning_rate"] = {":type:": "function", ":serialized:": "bm8gcGlja2xl"}
                content = json.dumps(data).encode()
            target.writestr(name, content)
    with pytest.warns(UserWarning, match=r"clip_range is now 0\.2 at the start"):
        model = PassesOn.load(lost, env=KLipPPO("MlpPolicy", "CartPole-v1", **SMALL).get_env())
    assert (model.clip_range(1.0), model.learning_rate) == (0.2, 3e-4)
    model.learn(32)


@pytest.mark.parametrize("how", ["custom_objects", "keyword"])
def test_another_coefficient_comes_with_its_own_parameters(how: str, file: Path) -> None:
    given = {"beta": "sigmoid"}
    env = KLipPPO("MlpPolicy", "CartPole-v1", **SMALL).get_env()
    model = KLipPPO.load(file, env=env, **({"custom_objects": given} if how == "custom_objects" else given))
    assert repr(model.beta) == "sigmoid(temperature=0.05)"
    model.learn(32)


def test_a_wrong_coefficient_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    for given in ({"beta": "sigmiod"}, {"custom_objects": {"beta": "sigmiod"}}):
        with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
            KLipPPO.load(tmp_path / "not there", **given)


# -- schedules that cannot be restored -------------------------------------------------------------------------------------


def about_schedules(messages):
    return [message for message in messages if "learning_rate" in message or "clip_range" in message]


@pytest.mark.parametrize("trusted", [True, False])
def test_lost_schedules_come_from_the_zoo(tmp_path, trusted):
    path = zoo_agent(tmp_path, CONFIG)
    other = path.with_name("Other") / "config.yml"  # of another agent
    other.parent.mkdir()
    other.write_text("learning_rate: 0.5\n")
    assert "!!python/object/apply:collections.OrderedDict" in (path.with_suffix("") / "config.yml").read_text()
    with collected() as messages:
        model = KLipPPO.load(path, trusted=trusted)
    assert [model.learning_rate(progress) for progress in (1.0, 0.5, 0.0)] == [0.001, 0.0005, 0.0]
    assert model.lr_schedule(0.5) == 0.0005
    assert [model.clip_range(progress) for progress in (1.0, 0.5)] == [0.1, 0.1]
    (message,) = about_schedules(messages)
    source = str(path.with_suffix("") / "config.yml")
    assert f"learning_rate is now 0.001 at the start (from {source})" in message
    assert f"clip_range is now 0.1 at the start (from {source})" in message
    assert ("Python 3.7" if trusted else "untrusted") in message


def test_the_best_model_of_the_zoo(tmp_path):
    """It lies beside the last one, and has no folder of its own."""
    path = zoo_agent(tmp_path, CONFIG)
    with pytest.warns(UserWarning, match=r"clip_range is now 0\.1 at the start \(from .*config\.yml\)"):
        assert KLipPPO.load(path.rename(path.with_name("best_model.zip"))).learning_rate(1.0) == 0.001


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_lost_schedules_without_the_zoo(ours, name, tmp_path):
    (tmp_path / "model.zip").write_bytes(gym_era(trained(BASES[ours], name)[1], "0.19"))
    with collected() as messages:
        model = ours.load(tmp_path / "model")
    assert (model.learning_rate, model.lr_schedule(0.5), model.clip_range(0.5)) == (3e-4, 3e-4, 0.2)
    (message,) = about_schedules(messages)
    assert "learning_rate is now 0.0003" in message
    assert "clip_range is now 0.2" in message
    assert "config.yml" not in message


@pytest.mark.parametrize("config", [CONFIG, None])
@pytest.mark.parametrize("how", ["keywords", "custom_objects"])
def test_schedules_that_are_given_are_not_lost(tmp_path, how, config):
    path = zoo_agent(tmp_path, config or {})
    values = {"learning_rate": 1e-4, "clip_range": 0.05}
    with collected() as messages:
        model = KLipPPO.load(path, **(values if how == "keywords" else {"custom_objects": values}))
    assert (model.learning_rate, model.lr_schedule(0.5), model.clip_range(0.5)) == (1e-4, 1e-4, 0.05)
    assert messages == []


def test_only_what_is_not_given_is_lost(tmp_path):
    path = zoo_agent(tmp_path, {})
    with collected() as messages:
        KLipPPO.load(path, learning_rate=1e-4)
    (message,) = messages
    assert "clip_range is now 0.2" in message
    assert "learning_rate" not in message


@pytest.mark.parametrize("place", ["learning_rate: ", "other: ", ""])
@pytest.mark.parametrize("function", ["apply:os.system", "new:os.system", "apply:pathlib.Path.touch"])
def test_a_config_runs_nothing(tmp_path, place, function):
    marker = tmp_path / "run"
    path = zoo_agent(tmp_path, f"{place}!!python/object/{function} ['touch {marker}']\n")
    with collected() as messages:
        model = KLipPPO.load(path)
    assert not marker.exists()
    assert model.learning_rate == 3e-4
    assert any("config.yml could not be read" in message for message in messages)
    assert sum("learning_rate is now 0.0003" in message for message in messages) == 1


@pytest.mark.parametrize("config", ["", "[1, 2]", "learning_rate: [", "learning_rate: lin_x", "learning_rate: {}", "\x00"])
def test_a_config_without_a_schedule(tmp_path, config):
    path = zoo_agent(tmp_path, config)
    with collected() as messages:
        assert KLipPPO.load(path).learning_rate == 3e-4
    assert sum("learning_rate is now 0.0003" in message for message in messages) == 1


# -- the coefficient -------------------------------------------------------------------------------------------------------


def test_a_new_coefficient_at_loading_does_not_inherit_parameters(tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta="linear_ramp", beta_kwargs={"width": 0.3})
    model.save(tmp_path / "model")
    assert repr(KLipPPO.load(tmp_path / "model", beta="sigmoid").beta) == "sigmoid(temperature=0.05)"
    assert repr(KLipPPO.load(tmp_path / "model", beta="linear_ramp").beta) == "linear_ramp(width=0.05)"
    changed = KLipPPO.load(tmp_path / "model", beta_kwargs={"width": 0.1})
    assert repr(changed.beta) == "linear_ramp(width=0.1)"
    with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
        KLipPPO.load(tmp_path / "model", beta="sigmod")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the file's coefficient there is nothing to warn of
        with pytest.raises(TypeError, match="no parameter 'widht'"):
            KLipPPO.load(tmp_path / "model", beta_kwargs={"widht": 0.1})


def test_state_survives_when_the_same_coefficient_is_named_again(tmp_path):
    """RL Zoo passes every hyperparameter to load()."""
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 192, **FAST, beta="adaptive")
    model.save(tmp_path / "model")
    again = KLipPPO.load(tmp_path / "model", beta="adaptive", beta_kwargs={"kl_target": 0.5})
    assert again.beta.state_dict() == model.beta.state_dict() != {}
    assert KLipPPO.load(tmp_path / "model", beta="step").beta.state_dict() == {}


def test_unknown_coefficient_predicts_but_does_not_train(tmp_path):
    model, _ = train(
        KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta=lambda ratio, advantages, clip_range: th.zeros_like(ratio)
    )
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="cannot be made"):
        loaded = KLipPPO.load(tmp_path / "model", env=cartpole())
    loaded.predict(np.zeros(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"KLipPPO\.load\(\.\.\., beta='step'\)"):
        loaded.learn(64)
    loaded.save(tmp_path / "again")
    with pytest.warns(UserWarning, match="cannot be made"):
        KLipPPO.load(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KLipPPO.load(tmp_path / "again", env=cartpole(), beta="step").learn(64)
