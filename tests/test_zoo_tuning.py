"""The coefficient as a hyperparameter of RL Zoo's tuner."""

from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from helpers import config, zoo_here, zoo_train
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

from sb3_klip.coefficients import available, make
from sb3_klip.zoo.tuning import converter_with_beta, sampler_with_beta, sampler_with_reuse, search_space


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

    # RL Zoo takes trial 0 for none at all.
    trial = study.trials[study.best_trial.number or 1]
    zoo_train(*STUDY, "--trial-id", trial.number, "--eval-freq", -1, cwd=tmp_path)
    (model,) = tmp_path.glob("logs/klip_ppo/*/CartPole-v1.zip")
    assert config(model.parent)["beta"] == trial.params["beta"]


@pytest.mark.parametrize("name", ["beta", "reuse"])
def test_search_needs_the_tuner(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}='search' is for --optimize-hyperparameters"):
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-params", f"{name}:'search'", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
