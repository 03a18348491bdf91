"""What an update logs."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FAST, pendulum, train
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_klip import KLipPPO, diagnostics
from sb3_klip.callbacks import CSVLogCallback
from sb3_klip.diagnostics import PERCENTILES, _percentiles


def test_logger_keys_of_ppo_keep_their_meaning():
    kwargs = {**FAST, "batch_size": 60, "clip_range_vf": 0.3, "ent_coef": 0.01, "n_epochs": 8, "learning_rate": 1e-2}
    (_, ours), (_, theirs) = (train(algorithm, "MlpPolicy", pendulum, 256, **kwargs) for algorithm in (KLipPPO, PPO))
    assert len(ours.rows) == len(theirs.rows)
    for our_row, their_row in zip(ours.rows, theirs.rows, strict=True):
        for key in (key for key in their_row if key.startswith("train/")):
            # The sums are taken in another order, so the last digits may differ.
            assert our_row[key] == pytest.approx(their_row[key], rel=1e-4, abs=1e-7), key
    row = ours.rows[-1]
    added = {key.removeprefix("train/") for key in row if key.startswith("train/") and key not in theirs.rows[-1]}
    percentiles = {f"beta_p{level:02}" for level in PERCENTILES}
    means = {"kill_fraction", "pass_fraction", "beta_mean", "beta_abs_max", "kl_penalty", "klip_loss"}
    assert added == {*means, *percentiles, "traced"}
    assert 0 < row["train/kill_fraction"] < row["train/kill_fraction"] + row["train/pass_fraction"]
    assert row["train/kill_fraction"] + row["train/pass_fraction"] == pytest.approx(row["train/clip_fraction"])
    assert row["train/kl_penalty"] > 0
    assert row["train/beta_abs_max"] > abs(row["train/beta_mean"])


@pytest.mark.parametrize(("beta", "clip_range"), [("step", 0.01), ("quadratic", 0.2), ("sigmoid", 0.05)])
def test_what_is_logged_of_beta(beta, clip_range):
    """
    From the policy that the first epoch left, and from the definition of each coefficient: percentiles of β in the second
    epoch, which is the last, and means over both.
    """

    def trained(n_epochs: int) -> KLipPPO:
        options = {"n_steps": 256, "batch_size": 256, "learning_rate": 0.01, "seed": 0}
        return KLipPPO("MlpPolicy", "CartPole-v1", n_epochs=n_epochs, beta=beta, clip_range=clip_range, **options).learn(256)

    first, both = trained(1), trained(2)
    buffer = first.rollout_buffer
    np.testing.assert_array_equal(buffer.actions, both.rollout_buffer.actions)
    observations, actions = first.policy.obs_to_tensor(buffer.observations)[0], buffer.actions.ravel()
    distribution = first.policy.get_distribution(observations).distribution
    new = distribution.log_prob(distribution.logits.new_tensor(actions)).detach().numpy().astype(float)
    ratio = np.exp(new - buffer.log_probs.ravel())
    advantages = buffer.advantages.ravel().astype(float)
    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)

    def beta_at(ratio: np.ndarray) -> np.ndarray:
        # How far past the boundary that the advantage points to.
        distance = np.where(advantages > 0, ratio - (1 + clip_range), (1 - clip_range) - ratio)
        removal = {
            "step": np.where(distance > 0, 1.0, 0.0),
            "quadratic": np.sign(advantages) * (ratio - 1) / clip_range,
            "sigmoid": 1 / (1 + np.exp(-distance / 0.05)),
        }[beta]
        return -ratio * advantages * removal

    values = beta_at(ratio)
    assert len(np.unique(values)) > 50
    expected = np.percentile(values, PERCENTILES)
    logged = [both.logger.name_to_value[f"train/beta_p{level:02}"] for level in PERCENTILES]
    np.testing.assert_allclose(logged, expected, rtol=1e-3, atol=1e-5)
    assert np.ptp(logged) > 0.1

    old = buffer.log_probs.ravel().astype(float)
    epochs = [(np.ones_like(ratio), old, beta_at(np.ones_like(ratio))), (ratio, new, values)]
    for key, mean in (
        ("beta_mean", [b for _, _, b in epochs]),
        ("kl_penalty", [-b * (log_prob - old) for _, log_prob, b in epochs]),
        ("klip_loss", [-(w * advantages + b * log_prob) for w, log_prob, b in epochs]),
    ):
        assert both.logger.name_to_value[f"train/{key}"] == pytest.approx(np.mean(mean), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("kwargs", [{"beta": "adaptive"}, {"target_kl": 0.01}, {"reuse": 2}])
def test_it_does_not_matter_how_many_epochs_are_reduced_together(kwargs, monkeypatch):
    update = {**FAST, "n_epochs": 5, "batch_size": 24, "learning_rate": 1e-2, **kwargs}

    def logged(pending: int) -> list[dict[str, float]]:
        monkeypatch.setattr(diagnostics, "_PENDING", pending)
        _, log = train(KLipPPO, "MlpPolicy", pendulum, 256, **update)
        return log.rows

    together, apart, some = (logged(pending) for pending in (10**6, 0, 100))
    for rows in (apart, some):
        for row, expected in zip(rows, together, strict=True):
            assert row.keys() == expected.keys()
            for key in (key for key in row if key.startswith("train/")):
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_logged_is_not_rounded_by_autocast(dtype):
    def logged(algorithm):
        class InAutocast(algorithm):
            def train(self):
                with torch.autocast("cpu", dtype=dtype):
                    super().train()

        _, log = train(InAutocast, "MlpPolicy", pendulum, 512, **{**FAST, "n_steps": 512, "learning_rate": 1e-4})
        return log.rows[-1]

    ours, theirs = logged(KLipPPO), logged(PPO)
    for key in ("approx_kl", "policy_gradient_loss", "value_loss", "loss"):
        assert ours[f"train/{key}"] == pytest.approx(theirs[f"train/{key}"], rel=1e-2), key


@pytest.mark.parametrize("number", [1, 2, 100, 2**24 + 1])
def test_percentiles_of_any_number_of_samples(number):
    values = torch.randn(number)
    np.testing.assert_allclose(_percentiles(values), np.quantile(values.numpy(), np.array(PERCENTILES) / 100), atol=1e-6)


def test_percentiles_are_for_files_and_not_for_the_terminal(tmp_path, capsys):
    model = KLipPPO("MlpPolicy", "CartPole-v1", **{**FAST, "seed": 0}, verbose=1, tensorboard_log=str(tmp_path / "tb"))
    model.learn(192, callback=CSVLogCallback(tmp_path / "progress.csv"))
    out = capsys.readouterr().out
    assert "kill_fraction" in out
    assert "beta_p" not in out
    log = pd.read_csv(tmp_path / "progress.csv")
    (folder,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for level in PERCENTILES:
        name = f"train/beta_p{level:02}"
        shown = [event.value for event in events.Scalars(name)]
        assert len(shown) == 2
        np.testing.assert_allclose(log[name].dropna(), shown, rtol=1e-6, atol=1e-12)
