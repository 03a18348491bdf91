"""``sb3_klip.verify``: what it finds identical, what different, and what cannot be compared.

A check is worth what it finds, so each that finds nothing here stands beside one where there is something to find.
"""

import copy
import functools
import re
import tempfile
import types
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th
from helpers import SABOTAGE, nothing, sabotage
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.utils import set_random_seed
from verify_results import (
    DEFAULT,
    FORKS,
    OWN_ENV,
    SMALL_LSTM,
    UPDATES,
    assert_identical_result,
    assert_one_message,
    found_difference,
)

from sb3_klip import progress
from sb3_klip.fast import optimizer
from sb3_klip.surrogate import clip_objective

forks = pytest.mark.skipif(not FORKS, reason="what is patched here would not be patched in the two processes")


@pytest.mark.parametrize(
    ("arguments", "minibatches"),
    [
        ((*DEFAULT, *UPDATES), 40),
        ((*DEFAULT, *UPDATES, "batch_size:60", "target_kl:0.02"), None),
        ((*DEFAULT, *UPDATES, "n_envs:3", "normalize:True", "batch_size:50"), 2 * 10 * 4),
        ((*OWN_ENV, *UPDATES), 40),
        ((*OWN_ENV, "--algo", "mask", *UPDATES, "batch_size:60"), 80),
        ((*DEFAULT, "--algo", "lstm", "-n", 128, *UPDATES[2:], "batch_size:50", SMALL_LSTM), 40),
        (("--env", "CartPole-v1", "-n", 512), 40),  # eight environments, both schedules
        (("--env", "Hopper-v4", "-n", 256, "-params", "n_steps:128", "n_envs:2"), 40),  # VecNormalize
        (("--env", "Hopper-v4", "--hyperparams", "paper", "-n", 128, "-params", "n_steps:128", "learning_rate:0.003"), 20),
        (("--env", "Pendulum-v1", "-n", 256, "-params", "n_steps:64", "learning_rate:0.01"), 40),  # gSDE
        (("--env", "CartPole-v1", "--hyperparams", "paper", "-n", 512, "-params", "learning_rate:0.003"), 80),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_identical(verify, arguments, minibatches):
    count = assert_identical_result(verify(*arguments))
    assert count == minibatches or minibatches is None
    assert not Path("difference.pt").exists()


def test_what_it_will_take_and_how_far_it_has_come(verify, monkeypatch):
    """In a pipe, as here; a terminal shows the table as it changes."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    lines = verify(*DEFAULT, "-n", 256, "-params", "n_steps:64").out.splitlines()
    assert lines[0] == "Training ppo and klip_ppo, 256 steps each, on CartPole-v1"
    assert [line.split(",")[0] for line in lines[1:5]] == [
        f"{share}%: {steps} of 256 steps compared" for share, steps in ((25, 64), (50, 128), (75, 192), (100, 256))
    ]
    assert re.search(r", about \d+ s left$", lines[1])


def test_of_dictionaries_of_images(verify):
    gym.register("Images-v0", functools.partial(SimpleMultiObsEnv, random_start=False))
    arguments = ("--hyperparams", "default", "-n", 32, "-params", "n_steps:32", "batch_size:20", "learning_rate:0.01")
    result = verify("--env", "Images-v0", *arguments, "n_epochs:2")
    assert_identical_result(result)
    assert result.cell("minibatches compared") == "4"
    result = verify("--env", "Images-v0", "--beta", "none", *arguments, "n_epochs:2")
    assert result.status == 1
    saved = th.load("difference.pt", weights_only=True)
    assert saved["samples of ppo"]["observations"]["img"].shape == (20, 1, 64, 64)


def test_a_difference_that_cannot_be_saved(verify, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 128 vs 22")

    monkeypatch.setattr(th, "save", full)
    result = verify(*DEFAULT, "--beta", "linear_ramp", "-n", 256, "-params", "n_steps:64", "learning_rate:0.01")
    assert result.status == 1
    assert "DIFFERENT: the gradient of " in result.out
    assert "which could not be saved to difference.pt: unexpected pos 128 vs 22." in result.out


@pytest.mark.parametrize("update", [0, 1])
def test_the_first_difference_can_be_computed_again(verify, update):
    """From the parameters at that minibatch, which are still those of PPO, and the samples that were saved."""
    # A small learning rate leaves all samples in the band in the first update.
    rate = {0: 0.01, 1: 0.0004}[update]
    arguments = ("-n", 1024, "-params", "n_steps:64", "batch_size:32", f"learning_rate:{rate}")
    result = verify(*DEFAULT, "--beta", "linear_ramp", "-o", "first.pt", *arguments)
    name, saved = found_difference(result, "first.pt")
    assert saved["update"] >= update
    assert result.cell("updates") == str(saved["update"] + 1)
    theirs, ours = saved["gradient of ppo"], saved["gradient of klip_ppo"]
    assert int(result.cell("largest difference of gradients").split()[0]) > 0
    assert not th.equal(theirs[name], ours[name])
    for key, tensor in saved["samples of ppo"].items():
        assert th.equal(saved["samples of klip_ppo"][key], tensor)

    set_random_seed(0)
    vec_env = make_vec_env("CartPole-v1", 1, seed=0)
    model = PPO("MlpPolicy", vec_env, n_steps=64, batch_size=32, learning_rate=rate, seed=0, device="cpu")
    evaluate_actions, states = model.policy.evaluate_actions, []

    def keeping(*args):
        states.append(copy.deepcopy(model.policy.state_dict()))
        return evaluate_actions(*args)

    model.policy.evaluate_actions = keeping
    model.learn(64 * (saved["update"] + 1))
    model.policy.load_state_dict(states[20 * saved["update"] + saved["minibatch"]])

    samples = types.SimpleNamespace(**saved["samples of ppo"])
    advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)
    gradients = {}
    for algo in ("ppo", "klip_ppo"):
        values, log_prob, _ = evaluate_actions(samples.observations, samples.actions.long().flatten())
        ratio = (log_prob - samples.old_log_prob).exp()
        if algo == "ppo":
            objective = clip_objective(ratio, advantages, 0.2)
        else:
            past = th.where(advantages > 0, ratio - 1.2, 0.8 - ratio)
            objective = ratio * advantages - (ratio * advantages * (past / 0.05).clamp(0, 1)).detach() * log_prob
        model.policy.zero_grad()
        (0.5 * (samples.returns - values.flatten()).square().mean() - objective.mean()).backward()
        gradients[algo] = {key: parameter.grad.clone() for key, parameter in model.policy.named_parameters()}
    for key, gradient in gradients["ppo"].items():
        th.testing.assert_close(theirs[key], gradient, rtol=1e-4, atol=1e-6)
        th.testing.assert_close(ours[key], gradients["klip_ppo"][key], rtol=1e-4, atol=1e-6)
    # Far more than rounding.
    assert (gradients["ppo"][name] - gradients["klip_ppo"][name]).abs().max() > 1e-4


def test_different_numbers_of_minibatches(verify):
    """The two stop early at different minibatches, after the first that differs."""
    arguments = ("-n", 256, "-params", "n_steps:256", "learning_rate:0.01", "target_kl:0.03", "n_epochs:20")
    result = verify(*DEFAULT, "--beta", "none", *arguments)
    _, saved = found_difference(result)
    assert not th.equal(saved["gradient of ppo"]["action_net.weight"], saved["gradient of klip_ppo"]["action_net.weight"])


@pytest.mark.parametrize("algo", ["lstm", "mask"])
def test_different_with_the_other_algorithms(verify, algo):
    result = verify(*OWN_ENV, "--algo", algo, "--beta", "none", *UPDATES, *([SMALL_LSTM] if algo == "lstm" else []))
    name, saved = found_difference(result)
    ours, theirs = (saved[f"gradient of {prefix}ppo_{algo}"][name] for prefix in ("klip_", ""))
    assert ours.shape == theirs.shape
    assert not th.equal(ours, theirs)
    extra = {"lstm": {"lstm_states", "episode_starts", "mask"}, "mask": {"action_masks"}}[algo]
    for prefix in ("klip_", ""):
        assert {"observations", "actions", "old_log_prob", *extra} <= set(saved[f"samples of {prefix}ppo_{algo}"])


def test_a_coefficient_with_parameters(verify):
    """Width 0 is the step."""
    ramp = (*DEFAULT, "--beta", "linear_ramp", *UPDATES)
    assert_identical_result(verify(*ramp, "beta_kwargs:dict(width=0)"))
    found_difference(verify(*ramp, "beta_kwargs:dict(width=0.01)"))


def test_what_only_our_algorithms_have(verify):
    assert_identical_result(verify(*DEFAULT, *UPDATES, "log_kl:True", "reuse:1"))


@forks
@pytest.mark.parametrize("action", SABOTAGE)
def test_the_last_bit_is_found_by_the_command(verify, monkeypatch, action):
    sabotage(monkeypatch, 25, nothing)
    assert_identical_result(verify(*DEFAULT, *UPDATES))
    sabotage(monkeypatch, 25, action)
    _, saved = found_difference(verify(*DEFAULT, *UPDATES))
    assert (saved["update"], saved["minibatch"]) == (2, 4)


@forks
def test_an_optimizer_that_differs_is_found_by_the_command(verify, monkeypatch):
    honest = optimizer.adam
    monkeypatch.setattr(optimizer, "adam", lambda *args, lr, **kwargs: honest(*args, lr=lr * (1 + 1e-6), **kwargs))
    result = verify(*DEFAULT, *UPDATES, "n_epochs:1")
    assert result.status == 1
    assert re.search(r"^DIFFERENT: \S+ after update 0, though all gradients are equal\.$", result.out, re.MULTILINE)
    assert result.cell("largest difference of gradients") == "0 ulp"
    assert int(result.cell("largest difference of parameters and optimizer").split()[0]) > 0
    assert not Path("difference.pt").exists()


@forks
@pytest.mark.parametrize("arguments", [(), ("--beta", "none"), ("--hyperparams", "zoo", "--beta", "nnoe")])
def test_nothing_is_left_behind(verify, monkeypatch, tmp_path, arguments):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    files = set(tmp_path.rglob("*"))
    verify(*DEFAULT, *arguments, *UPDATES)
    left = {path.name for path in set(tmp_path.rglob("*")) - files}
    assert left == ({"difference.pt"} if arguments == ("--beta", "none") else set())


def test_params_are_those_of_rl_zoo(verify):
    """A name in a coefficient's parameters needs no quotes there, either."""
    result = verify(*DEFAULT, "--beta", "fixed", *UPDATES, "beta_kwargs:dict(estimator=k3)")
    found_difference(result)


def residual(result):
    found_difference(result)
    words = r"On the (\d+) clipped samples of this update, .* sample, ([\d.]+)% of .* \(median; at least ([\d.]+)%\)"
    return [float(number) for number in re.search(words, result.out).groups()]


def test_the_analytic_divergence_of_gaussians(verify):
    result = verify(
        *("--env", "Hopper-v4", "--hyperparams", "default", "--estimator", "analytic"),
        *("-n", 256, "-params", "n_steps:256", "learning_rate:0.003"),
    )
    count, middle, low = residual(result)
    assert count > 10
    assert 5 < middle < 100
    assert low < middle
    assert "Here nothing remains" not in result.out


def test_the_analytic_divergence_of_two_actions(verify):
    """The best coefficient for each sample would do here; but it is not the identity's."""
    result = verify(*DEFAULT, "--estimator", "analytic", *UPDATES)
    count, middle, low = residual(result)
    assert count > 3
    assert (middle, low) == (0, 0)
    assert "Here nothing remains" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "CartPole-v1", "--env-kwargs", "gravity:1"), "ppo stopped after 0 steps. TypeError: .*'gravity'"),
        ((*DEFAULT, "--algo", "mask", *UPDATES), "ppo_mask stopped after 0 steps. .*mask"),
        ((*DEFAULT, "--beta", "adaptive", *UPDATES, "n_steps:-1"), "ppo stopped after 0 steps."),
        (
            (*OWN_ENV, "--env-kwargs", "trouble:'raise'", "after:150", *UPDATES),
            "ppo stopped after 128 steps. RuntimeError: the motor is off",
        ),
        (
            (*OWN_ENV, "--env-kwargs", "trouble:'exit'", "after:150", *UPDATES),
            "ppo stopped after 128 steps. the process ended with status 3",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_trainings_that_stop(verify, arguments, message):
    assert_one_message(verify(*arguments), message)


def test_rewards_that_are_nan(verify):
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'nan'", "after:150", *UPDATES)
    assert result.status == 2
    assert "ppo stopped after 128 steps. ValueError: " in result.err
    assert re.search(r"\bnan\b|not finite", result.err, re.IGNORECASE)


@pytest.mark.parametrize("after", [0, 100])
def test_an_environment_that_does_not_repeat_itself(verify, after):
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'chance'", f"after:{after}", *UPDATES)
    message = f"The rollout of update {after // 64} differs, .*: Own-v0 does not repeat its episodes with the same seed"
    assert_one_message(result, message)


def test_an_environment_that_does_not_repeat_itself_and_early_stopping(verify):
    """The two make different numbers of steps, which says nothing about the algorithms."""
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'chance'", *UPDATES, "target_kl:0.001")
    assert_one_message(result, "does not repeat its episodes")


def test_no_sample_is_clipped(verify):
    result = verify(*DEFAULT, "-n", 128, "-params", "n_steps:64", "learning_rate:1e-9")
    assert_one_message(result, "^Equal so far, but no sample was clipped, so this shows nothing")
    assert result.cell("largest difference of gradients") == "0 ulp"
    assert result.cell("minibatches compared") == "20"


def test_schedules_that_run_out_before_the_first_update(verify):
    """RL Zoo's clip range for CartPole-v1 falls to 0 over training, which is shorter than a rollout here."""
    result = verify("--env", "CartPole-v1", "-n", 100)
    assert_one_message(result, "^Equal so far, but the clip range was 0 or less, .* first rollout of 256 steps ends")


def test_no_update_is_made(verify):
    stop = "callback:{'stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes': {'max_episodes': 1}}"
    assert_one_message(verify(*DEFAULT, *UPDATES, stop), "^No update was made in 256 steps")
