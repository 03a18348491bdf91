"""The coefficient as a hyperparameter of RL Zoo's tuner."""

import os
import subprocess
import sys

import optuna
import pytest
from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

from sb3_klip.coefficients import available, make
from sb3_klip.zoo.tuning import SEARCH_SPACE, converting, searching


def test_every_point_of_the_space_is_a_valid_pair():
    sampler, converter = searching(sample_ppo_params), converting(convert_onpolicy_params)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(200):
        trial = study.ask()
        sampled = sampler(trial, 1, 1, {})
        coefficient = make(sampled["beta"], **sampled["beta_kwargs"])
        assert set(sampled["beta_kwargs"]) == set(SEARCH_SPACE[coefficient.name])
        # What is read back from a storage is what was trained with.
        assert converter(trial.params) == sampled
        seen.add(coefficient.name)
        study.tell(trial, 0.0)
    assert seen == set(SEARCH_SPACE)


def test_the_space_leaves_out_only_what_cannot_be_compared():
    """`none` has no trust region, and `position` is a schedule around another coefficient."""
    assert set(available()) - set(SEARCH_SPACE) == {"none", "position"}


def test_converter_passes_on_trials_without_a_coefficient():
    params = optuna.create_study().ask()
    sample_ppo_params(params, 1, 1, {})
    assert converting(convert_onpolicy_params)(params.params) == convert_onpolicy_params(params.params)


def zoo_train(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "rl_zoo3.train",
        "--algo",
        "klip_ppo",
        "--env",
        "CartPole-v1",
        "-f",
        "logs",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SEARCHING = [
    "--optimize-hyperparameters", "--n-trials", "3", "--sampler", "random", "--pruner", "none", "--no-optim-plots",
    "-n", "300", "--n-evaluations", "1", "--eval-episodes", "1", "--storage", "logs/study.log", "--study-name", "coefficients",
    "-params", "beta:'search'", "n_envs:1",
]  # fmt: skip


@pytest.mark.slow
def test_two_workers_search_one_journal_and_a_trial_is_trained_again(tmp_path):
    (tmp_path / "logs").mkdir()
    workers = [zoo_train(tmp_path, *SEARCHING, "--seed", str(seed)) for seed in (1, 2)]
    for worker in workers:
        output, _ = worker.communicate(timeout=600)
        assert worker.returncode == 0, output[-3000:]
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "logs/study.log")))
    study = optuna.load_study(storage=storage, study_name="coefficients")
    assert len(study.trials) == 6
    assert all(trial.state.is_finished() and trial.params["beta"] in SEARCH_SPACE for trial in study.trials)

    # RL Zoo takes trial 0 for none at all.
    trial = study.trials[study.best_trial.number or 1]
    again = zoo_train(
        tmp_path, "--storage", "logs/study.log", "--study-name", "coefficients", "--trial-id", str(trial.number),
        "-n", "300", "--eval-freq", "-1",
    )  # fmt: skip
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output[-3000:]
    (config,) = tmp_path.glob("logs/klip_ppo/*/CartPole-v1/config.yml")
    assert trial.params["beta"] in config.read_text()


def test_search_needs_the_tuner(tmp_path):
    process = zoo_train(tmp_path, "-params", "beta:'search'")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--optimize-hyperparameters" in output
    assert not (tmp_path / "logs").exists()
