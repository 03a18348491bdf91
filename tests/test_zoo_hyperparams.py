"""Hyperparameters in RL Zoo: the zoo's own with ours laid over them."""

import argparse
import importlib
import importlib.resources
import json
from pathlib import Path

import pytest
import rl_zoo3
import rl_zoo3.train
import yaml
from rl_zoo3.utils import StoreDict
from stable_baselines3 import PPO

from sb3_klip import KLipPPO, zoo
from sb3_klip.zoo import hyperparameters
from sb3_klip.zoo.hyperparams import evaluate_beta_kwargs, protocol


def test_our_file_changes_nothing_as_shipped():
    zoos = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
    assert "Hopper-v4" in zoos
    assert zoo.overlaid_hyperparams("ppo", "klip_ppo") == zoos


def test_our_file_is_merged_key_by_key(tmp_path, monkeypatch):
    zoos = zoo.overlaid_hyperparams("ppo", "klip_ppo")
    overlay = "Hopper-v4:\n  beta: none\n  n_epochs: 7\nMyTask-v0:\n  beta: none\n"
    (tmp_path / "klip_ppo.yml").write_text(overlay)
    monkeypatch.setattr(importlib.import_module("sb3_klip.hyperparams"), "__path__", [str(tmp_path)])
    merged = zoo.overlaid_hyperparams("ppo", "klip_ppo")
    assert merged.pop("Hopper-v4") == {**zoos.pop("Hopper-v4"), "beta": "none", "n_epochs": 7}
    assert merged.pop("MyTask-v0") == {**zoos["default"], "beta": "none"}
    assert merged == zoos


@pytest.mark.parametrize("name", ["klip_ppo", "paper", "geppo", "wide", "fast"])
def test_each_reading_of_a_module_gives_a_new_dictionary(name):
    # RL Zoo deletes keys from what it is given, so that a second training in one process would find them gone.
    module = importlib.import_module(f"sb3_klip.hyperparams.{name}")
    before = json.dumps(module.hyperparams)
    module.hyperparams["Hopper-v4"].clear()
    module.hyperparams.clear()
    assert json.dumps(module.hyperparams) == before


@pytest.mark.parametrize("given", ["dict(width=0.1)", "{'width': 0.1}", {"width": 0.1}])
def test_beta_kwargs_may_be_written_in_python(given):
    hyperparams = {"beta": "linear_ramp", "beta_kwargs": given}
    evaluate_beta_kwargs(hyperparams)
    assert hyperparams == {"beta": "linear_ramp", "beta_kwargs": {"width": 0.1}}


def test_hyperparameters_are_those_of_the_algorithm_and_of_the_zoo():
    ours, theirs = hyperparameters(KLipPPO), hyperparameters(PPO)
    assert ours - theirs == {"beta", "beta_kwargs", "log_kl", "compile", "reuse"}
    assert {"n_envs", "normalize", "learning_rate"} <= theirs <= ours
    assert not {"env", "seed", "verbose"} & ours


def test_a_protocol_is_read_anew_each_time(tmp_path):
    (tmp_path / "own.yml").write_text("default:\n  n_steps: 8\n")
    read = protocol(str(tmp_path / "own.py"))
    read("hyperparams")["default"]["n_steps"] = 9
    assert read("hyperparams") == {"default": {"n_steps": 8}}
    with pytest.raises(AttributeError, match=r"sb3_klip\.hyperparams\.own.* has no attribute 'hyperparam'"):
        read("hyperparam")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("beta:linear_ramp", "linear_ramp"),
        ("beta:'linear_ramp'", "linear_ramp"),
        ("beta:my_module:my_ramp", "my_module:my_ramp"),
        ("beta:'my_module:my_ramp'", "my_module:my_ramp"),
        ("beta:None", None),
        ("beta_kwargs:dict(width=0.1, estimator=k3)", {"width": 0.1, "estimator": "k3"}),
        ("beta_kwargs:{'widths': [x for x in (1, 2)], estimator: k1}", {"widths": [1, 2], "estimator": "k1"}),
        ("beta_kwargs:dict(width=max(1, 2), bound=float('2'))", {"width": 2, "bound": 2.0}),
    ],
)
def test_names_without_quotes(given, expected):
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    zoo.register()
    key = given.partition(":")[0]
    assert parser.parse_args(["-params", given]).params == {key: expected}
    if key == "beta_kwargs" and "max" not in given:  # in a YAML file, no functions
        hyperparams = {key: given.partition(":")[2]}
        evaluate_beta_kwargs(hyperparams)
        assert hyperparams == {key: expected}


def test_names_in_code_stay_names(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    zoo.register()
    made = parser.parse_args(["-params", "beta_kwargs:dict(width=lambda progress: 2 * progress)"]).params
    assert made["beta_kwargs"]["width"](3) == 6
    with pytest.raises(NameError):
        parser.parse_args(["-params", "learning_rate:fast"])
    with pytest.raises(SystemExit):
        parser.parse_args(["-params", "beta:lin_0.1"])
    assert "-params: 'lin_0.1' is no value in Python" in capsys.readouterr().err
