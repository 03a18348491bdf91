"""The coefficient as a hyperparameter of RL Zoo's tuner."""

import argparse
import functools
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import collected, config, zoo_here, zoo_train
from optuna.trial import TrialState
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import (
    HYPERPARAMS_CONVERTER,
    HYPERPARAMS_SAMPLER,
    convert_onpolicy_params,
    sample_ppo_params,
)

from sb3_klip import zoo
from sb3_klip.coefficients import available, make, register, registry
from sb3_klip.zoo.tuning import (
    converter_with_beta,
    name_best_trial,
    sampler_with_beta,
    sampler_with_reuse,
    search_space,
)


@pytest.mark.parametrize("n_actions", [0, 3])
def test_every_point_of_the_space_is_a_valid_pair(n_actions):
    sampler, converter = sampler_with_beta(sample_ppo_params), converter_with_beta(convert_onpolicy_params)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(200):
        trial = study.ask()
        sampled = sampler(trial, n_actions, 1, {})
        coefficient = make(sampled["beta"], **sampled["beta_kwargs"])
        assert set(sampled["beta_kwargs"]) == set(search_space()[coefficient.name])
        # What is read back from a storage is what was trained with.
        assert converter(trial.params) == sampled
        seen.add(coefficient.name)
        study.tell(trial, 0.0)
    # The zoo's count of actions is 0 where they are discrete; others have no probabilities.
    mean_probabilities = {"dynamic_clip", "probability_clip", "mass_adaptive"}
    assert seen == set(search_space()) - (mean_probabilities if n_actions else set())


def test_the_number_of_rollouts_is_searched_as_well():
    sampler = sampler_with_reuse(sampler_with_beta(sample_ppo_params))
    converter = converter_with_beta(convert_onpolicy_params)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(50):
        trial = study.ask()
        sampled = sampler(trial, 1, 1, {})
        assert converter(trial.params) == sampled
        seen.add(sampled["reuse"])
        study.tell(trial, 0.0)
    assert seen == {1, 2, 3, 4, 5}


def test_the_space_leaves_out_only_what_cannot_be_compared():
    """`none` has no trust region, and `position` is a schedule around another coefficient."""
    assert set(available()) - set(search_space()) == {"none", "position"}


def test_arguments_that_have_no_default_are_searched(monkeypatch):
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))

    @register("limited", search={"limit": (1.0, 3.0)})
    class Limited:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, ratio, advantages, clip_range):
            return (ratio > self.limit).to(ratio)

    assert search_space(is_continuous=True)["limited"] == search_space()["limited"] == {"limit": (1.0, 3.0)}


def test_a_study_that_searched_among_others():
    study = optuna.create_study(study_name="mine")
    sampler_with_beta(sample_ppo_params, "sigmoid")(study.ask(), 1, 1, {})
    with pytest.raises(ValueError, match=r"--study-name='mine' has searched among other coefficients than .*linear_ramp"):
        sampler_with_beta(sample_ppo_params)(study.ask(), 1, 1, {})


def test_converter_passes_on_trials_without_a_coefficient():
    params = optuna.create_study().ask()
    sample_ppo_params(params, 1, 1, {})
    assert converter_with_beta(convert_onpolicy_params)(params.params) == convert_onpolicy_params(params.params)


STUDY = ("--env", "CartPole-v1", "-f", "logs", "-n", 300, "--storage", "logs/study.log", "--study-name", "coefficients")
SEARCHING = (
    *("--optimize-hyperparameters", "--n-trials", 3, "--sampler", "random", "--pruner", "none", "--no-optim-plots"),
    *("--n-evaluations", 1, "--eval-episodes", 1, "-params", "beta:'search'", "n_envs:1"),
)


@pytest.mark.slow
def test_two_workers_search_one_journal_and_a_trial_is_trained_again(tmp_path):
    (tmp_path / "logs").mkdir()
    with ThreadPoolExecutor(2) as pool:
        for worker in [pool.submit(zoo_train, *STUDY, "--seed", seed, *SEARCHING, cwd=tmp_path) for seed in (1, 2)]:
            worker.result()
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "logs/study.log")))
    study = optuna.load_study(storage=storage, study_name="coefficients")
    assert len(study.trials) == 6
    assert all(trial.state.is_finished() and trial.params["beta"] in search_space() for trial in study.trials)

    trial = study.best_trial
    zoo_train(*STUDY, "--trial-id", trial.number, "--eval-freq", -1, cwd=tmp_path)
    (model,) = tmp_path.glob("logs/klip_ppo/*/CartPole-v1.zip")
    assert config(model.parent)["beta"] == trial.params["beta"]


@pytest.mark.parametrize("name", ["beta", "reuse"])
def test_search_needs_the_tuner(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}='search' is for --optimize-hyperparameters"):
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-params", f"{name}:search", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


# -- a named coefficient -----------------------------------------------------------------------------------------------


def read(**hyperparams: Any) -> None:
    """As ``rl_zoo3.train -optimize`` reads these hyperparameters."""
    zoo.register()
    namespace = argparse.Namespace()
    manager = ExperimentManager(
        namespace, "klip_ppo", "CartPole-v1", "logs", hyperparams=hyperparams, optimize_hyperparameters=True
    )
    manager.read_hyperparameters()


def sampled() -> dict[str, Any]:
    """What a trial gets."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    hyperparams = HYPERPARAMS_SAMPLER["klip_ppo"](trial, 0, 1, {})
    assert HYPERPARAMS_CONVERTER["klip_ppo"](trial.params) == hyperparams
    return hyperparams


def deep_ramp(ratio, advantages, clip_range, *, width=0.1, bound=2.0):
    return ((ratio - 1).abs() / width).clamp(0, bound)


def test_the_parameters_of_an_own_coefficient_are_searched():
    register("deep_ramp", search={"width": (0.5, 0.7)})(deep_ramp)
    for name in ("deep_ramp", f"{__name__}:deep_ramp"):
        read(beta=name)
        found = sampled()
        assert found["beta"] == name
        assert found["beta_kwargs"].keys() == {"width"}
        assert 0.5 <= found["beta_kwargs"]["width"] <= 0.7


def test_a_coefficient_that_declares_no_ranges(capsys):
    name = f"{__name__}:deep_ramp"
    read(beta=name)
    assert f"beta={name!r} declares no ranges, so its parameters are not searched: width, bound." in capsys.readouterr().out
    assert "beta" not in sampled()
    read(beta="step")  # has no parameters
    read(beta="sapo", beta_kwargs={"tau_pos": 2.0})  # has those that it was given
    assert "declares no ranges" not in capsys.readouterr().out
    assert "beta" not in sampled()


# -- trials by their number --------------------------------------------------------------------------------------------


def make_study(storage: Path | None, states: str) -> optuna.Study:
    """A study with a trial for each letter: complete, pruned or failed; each better than the one before."""
    kept = storage and optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.create_study(storage=kept, study_name="study", direction="maximize")
    kinds = {"c": TrialState.COMPLETE, "p": TrialState.PRUNED, "f": TrialState.FAIL}
    for number, letter in enumerate(states):
        trial = study.ask()
        sampler_with_beta(sample_ppo_params, "fixed")(trial, 0, 1, {})
        study.tell(trial, float(number) if letter == "c" else None, kinds[letter])
    return study


def manager_of(**arguments: Any) -> ExperimentManager:
    zoo.register()
    return ExperimentManager(argparse.Namespace(), "klip_ppo", "CartPole-v1", "logs", **arguments)


def test_the_number_of_the_best_trial_is_told(tmp_path, capsys):
    manager = manager_of(storage="a folder/study.log", study_name="study")
    name_best_trial(lambda manager: make_study(None, "cpccp"), manager)
    out = capsys.readouterr().out
    assert out.startswith("The best is trial 3.")
    words = shlex.split(out.splitlines()[-1])
    assert words[words.index("--storage") + 1] == "a folder/study.log"
    assert words[words.index("--trial-id") + 1] == "3"
    name_best_trial(lambda manager: make_study(None, "c"), manager_of())
    assert "search with --storage and --study-name" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1])
def test_a_trial_is_trained_by_its_number(tmp_path, number):
    storage = tmp_path / "study.log"
    trial = make_study(storage, "cc").trials[number]
    manager = manager_of(storage=str(storage), study_name="study", trial_id=number, hyperparams={"n_steps": 7})
    hyperparams, _ = manager.read_hyperparameters()
    assert (hyperparams["beta"], hyperparams["n_steps"]) == ("fixed", 7)
    assert hyperparams["beta_kwargs"] == {"value": trial.params["beta_fixed_value"]}


def test_trials_that_are_not_what_somebody_wants(tmp_path):
    storage = tmp_path / "study.log"
    make_study(storage, "cpf")
    load = functools.partial(manager_of().load_trial, str(storage), "study")
    for number, state in ((1, "pruned"), (2, "fail")):
        message = f"Trial {number} was not trained to its end: {state}. The best is --trial-id 0."
        with pytest.warns(UserWarning, match=re.escape(message)):
            load(number)
    with collected() as messages:
        assert load(0) == load()
    assert messages == []
    with pytest.raises(ValueError, match="--trial-id=3: the study 'study' has 3 trials, from 0 on"):
        load(3)
    with pytest.raises(ValueError, match="--trial-id=-1 must be 0 or more"):
        load(-1)
    with pytest.raises(ValueError, match=r"--study-name='stdy': the storage .* has no such study"):
        manager_of().load_trial(str(storage), "stdy", 0)
    with pytest.raises(ValueError, match="--trial-id=1 needs --storage and --study-name"):
        manager_of(trial_id=1).read_hyperparameters()
