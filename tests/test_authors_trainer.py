"""The paper's trainer, which explains where the paper's numbers and ours differ: `results/authors_trainer.py`."""

import runpy
from pathlib import Path

import pytest
import torch as th
from helpers import assert_identical, python
from stable_baselines3 import PPO

from sb3_klip.experiments.results import read_result

SCRIPT = Path(__file__).parents[1] / "results" / "authors_trainer.py"
MADE = runpy.run_path(str(SCRIPT))
SMALL = {"policy": "MlpPolicy", "env": "Pendulum-v1", "n_steps": 64, "batch_size": 32, "seed": 0, "device": "cpu"}


def test_without_its_two_differences_it_is_ppo():
    ours = MADE["AuthorsPPO"](**SMALL, rollout_advantages=False, larger_value_loss=False).learn(128)
    assert_identical(ours, PPO(**SMALL).learn(128))


def test_its_value_loss_is_the_larger_one():
    model = MADE["AuthorsPPO"](**SMALL)
    model._old_values = th.zeros(4)
    returns, values = th.tensor([1.0, -1.0, 0.1, 1.0]), th.tensor([0.9, 0.9, 0.1, 0.1])
    # Clipped to 0.2, the first value errs by 0.8 and not by 0.1; the second errs by 1.9 as it is, and by 1.2 clipped.
    expected = (0.8**2 + 1.9**2 + 0.0 + 0.9**2) / 4 / 2
    assert model._value_function_loss(returns, values, None).item() == pytest.approx(expected)


def test_its_advantages_are_normalised_over_the_rollout():
    seen = []
    model = MADE["AuthorsPPO"](**SMALL)
    loss = model._minibatch_loss
    model._minibatch_loss = lambda data, *args: seen.append(data.advantages.clone()) or loss(data, *args)
    model.learn(64)
    first_epoch = th.cat(seen[:2])
    assert first_epoch.mean().item() == pytest.approx(0, abs=1e-6)
    assert first_epoch.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert abs(seen[0].mean().item()) > 1e-3  # a minibatch by itself is not


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name", "added"), [("", "", {}), (" --beta fixed", "fixed_", {"beta": "fixed"})])
def test_a_run_writes_its_result(options, name, added, tmp_path):
    (tmp_path / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    command = f"value_loss --env CartPole-v1 --seed 3{options}"
    python(SCRIPT.name, *command.split(), cwd=tmp_path)
    about = read_result(tmp_path / f"authors_trainer/results/CartPole-v1/{name}value_loss/seed-3.csv").about
    assert about["command"] == f"python results/authors_trainer.py {command}"
    assert about["hyperparams"] == {"vf_coef": 0.5, "rollout_advantages": False, **added}
