"""
The update that all variants share: PPO's inner loop, with the per-sample KL surrogate in place of the clipped objective.

:meth:`PerSampleKLTraining.train` is the algorithm, from top to bottom; what it calls follows in the order of the calls.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from sb3_klip.coefficients import Coefficient
from sb3_klip.diagnostics import Minibatch, UpdateLog
from sb3_klip.divergence import PolicySnapshot, scatter_to_mask
from sb3_klip.fast.compiling import compiled_loss
from sb3_klip.fast.graph import given_up, graph_loss, reason_against, reason_not_worth_it
from sb3_klip.fast.optimizer import Step, optimizer_step
from sb3_klip.fast.sequences import short_sequences
from sb3_klip.fast.whole_step import can_be_one_step, whole_step
from sb3_klip.replay import Replayed, normalized_advantages
from sb3_klip.rollout import episode_positions, indexed_minibatches, non_finite, non_finite_sample
from sb3_klip.seam import Seam
from sb3_klip.surrogate import masked_mean, per_sample_kl

#: What a clip range that a schedule takes to 0 and below is held at, for coefficients that divide by it.
SMALLEST_CLIP_RANGE = 1e-4


class Update(NamedTuple):
    """
    What does not change during one ``train()``.

    :param coefficient: the coefficient, its schedules brought up to date
    :param clip_range: half-width ε, a number or a tensor
    :param clip_range_vf: clipping range of the value function, likewise, if any
    :param ent_coef: weight of the entropy in the loss, likewise
    :param vf_coef: weight of the value loss, likewise
    :param snapshot: the rollout policy's distributions, if they are asked for
    :param positions: position of each sample in its episode, if asked for
    :param ratio_bounds: least and greatest ratio of each action within a trust region, shape (2, N), if asked for
    :param ages: updates since each sample was collected, if asked for
    :param replayed: weight and clip centre of each sample, if it learns from more than the last rollout
    """

    coefficient: Coefficient
    clip_range: Any
    clip_range_vf: Any
    ent_coef: Any
    vf_coef: Any
    snapshot: PolicySnapshot | None
    positions: th.Tensor | None
    ratio_bounds: th.Tensor | None = None
    ages: th.Tensor | None = None
    replayed: Replayed | None = None


class PerSampleKLTraining(Seam):
    """
    ``train()`` of the subclasses of SB3's and sb3-contrib's PPO, which differ in what :class:`~sb3_klip.seam.Seam` has.
    """

    # Arguments of the constructor, see sb3_klip.algorithm.
    beta: Any
    log_kl: bool
    compile: bool | dict[str, Any] = False
    # Steps that the environments' running episodes already had when the last rollout ended.
    _episode_steps: Sequence[int] = ()
    #: β of each sample in the last epoch of the last update, shape (n_steps * n_envs,).
    update_beta: th.Tensor | None = None
    #: How minibatches are computed: "traced", "compiled" (or of it, "the loss alone"), or "eager, as …" with the reason.
    update_path: str = ""
    # Of the PPO that this is mixed into; schedules once the model is set up.
    n_epochs: int
    clip_range: Any
    clip_range_vf: Any
    target_kl: float | None

    # -- the update ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """
        Update the policy on the current rollout.

        :raises ValueError: if an advantage is NaN or infinite, or the learning rate is NaN; or if a gradient is NaN or
            infinite, and then the policy is reset to its parameters before the update
        """
        if (problem := non_finite(self.rollout_buffer, self.n_steps, self._last_obs)) is not None:
            raise ValueError(
                f"{type(self).__name__} stopped at {self.num_timesteps} steps, before an update: {problem}. No gradient can "
                "be computed from it. The policy is as it was before this rollout."
            )
        update = self._begin_update()
        log = UpdateLog(float(update.clip_range), update.coefficient.estimator)
        tensors = (*(each for each in self.policy.parameters() if each.requires_grad), *self.policy.buffers())
        before = [(tensor, tensor.detach().clone()) for tensor in tensors if not is_lazy(tensor)]
        cause = None
        try:
            with self._computation(update) as (compute, step, gathered):
                for epoch in range(self.n_epochs):
                    log.begin_epoch()
                    finished = self._train_epoch(epoch, update, log, compute, step, gathered)
                    if not self._is_finite(log):
                        break
                    log.end_epoch()
                    self._n_updates += 1
                    if not finished:
                        break
        except ValueError as error:
            # A policy may refuse the NaN parameters that a bad step leaves behind.
            if self._is_finite(log):
                raise
            cause = error
        if not self._is_finite(log):
            self._abandon_update(before, log, cause)
        self._end_update(update, log)

    def _begin_update(self) -> Update:
        """Bring schedules up to date, and see to what the coefficient asks for before the first step changes the policy."""
        coefficient = self._known_coefficient()
        coefficient.set_progress(self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        rates = [group.get("lr") for group in self.policy.optimizer.param_groups]  # tensors, or None, with some optimizers
        if any(math.isnan(rate) for rate in rates if rate is not None):
            raise ValueError(
                f"learning_rate is nan at progress_remaining={self._current_progress_remaining:g}, after {self.num_timesteps} "
                "steps: its schedule must return a number. The policy is as it was before this update."
            )
        clip_range: Any = self._present_clip_range()
        if coefficient.needs_clip_range and clip_range < SMALLEST_CLIP_RANGE:
            warnings.warn(
                f"clip_range={clip_range:g} is held at {SMALLEST_CLIP_RANGE:g} for beta={coefficient!r}", stacklevel=4
            )
            clip_range = SMALLEST_CLIP_RANGE
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        positions = self._positions() if "position" in coefficient.requests else None
        ages = self._ages() if "age" in coefficient.requests else None
        snapshot = self.take_snapshot() if coefficient.needs_kl or self.log_kl else None
        ratio_bounds = None
        if coefficient.needs_ratio_bounds:
            ratio_bounds = self.take_ratio_bounds(float(clip_range), coefficient.delta)
        self.policy.set_training_mode(True)
        ent_coef: Any = self.ent_coef
        vf_coef: Any = self.vf_coef
        if self.compile:
            # Numbers would be compiled in, and compiled anew whenever something changes them.
            clip_range, ent_coef, vf_coef = (self._tensor(number) for number in (clip_range, ent_coef, vf_coef))
            clip_range_vf = None if clip_range_vf is None else self._tensor(clip_range_vf)
        return Update(coefficient, clip_range, clip_range_vf, ent_coef, vf_coef, snapshot, positions, ratio_bounds, ages)

    def _present_clip_range(self) -> float:
        """Half-width ε of this update."""
        return self.clip_range(self._current_progress_remaining)

    def _known_coefficient(self) -> Coefficient:
        """
        The coefficient to train with.

        :raises ValueError: if the model was loaded from a file whose coefficient is not known
        """
        if isinstance(self.beta, str):
            raise ValueError(
                f"this model was saved with the coefficient {self.beta!r}, which is not known in this program. Register or "
                f"import it before loading, or choose another: {type(self).__name__}.load(..., beta='step')."
            )
        return self.beta

    @contextmanager
    def _computation(self, update: Update) -> Iterator[tuple[Callable[..., tuple[Any, Minibatch]], Step, bool]]:
        """
        What computes a minibatch of this update (:meth:`_minibatch_loss`, or the same in less time), what steps on its loss,
        and whether it is given the samples of the minibatch, or those of the whole rollout.
        """
        if self.compile and can_be_one_step(self, update.coefficient):
            self.update_path = "compiled"
            with whole_step(self, update) as compute:
                yield compute, lambda norm: norm, False
            return
        if self.compile:
            self.update_path = "compiled, the loss alone"
            compute = compiled_loss(self)
        else:
            reason = reason_against(self) or reason_not_worth_it(self)
            self._tell_path(reason)
            compute = self._minibatch_loss if reason else graph_loss(self, update)
        parameters = list(self.policy.parameters())
        with (
            short_sequences(self.policy),
            optimizer_step(self.policy.optimizer, parameters, self.max_grad_norm, fused=bool(self.compile)) as step,
        ):
            yield compute, step, True

    def _tell_path(self, reason: str) -> None:
        """Keep, and show once, how minibatches are computed."""
        path = f"eager, as {reason}" if reason else "traced"
        if self.verbose >= 1 and path != self.update_path:
            print(f"The update is {path}")
        self.update_path = path

    def has_known_loss(self) -> bool:
        """Whether the loss is this package's, and no subclass or user has replaced a part of it."""
        parts = (
            "_minibatch_loss",
            "_evaluate_actions",
            "_valid_steps",
            "_normalized_advantages",
            "_value_function_loss",
            "_asked_quantities",
            "_taken_actions",
        )
        return not any(name in vars(self) for name in parts) and all(
            getattr(type(self), name).__module__.startswith("sb3_klip.") for name in parts
        )

    def _train_epoch(
        self,
        epoch: int,
        update: Update,
        log: UpdateLog,
        compute: Callable[..., tuple[Any, Minibatch]],
        step: Step,
        gathered: bool,
    ) -> bool:
        """One pass over the rollout; False if ``target_kl`` or the coefficient ended it."""
        for rollout_data, indices in indexed_minibatches(self.rollout_buffer, self.batch_size, gathered):
            loss, minibatch = compute(rollout_data, indices, update)
            if update.replayed is not None and minibatch.replayed is None:  # a graph returns only what it has made
                minibatch = minibatch._replace(replayed=update.replayed.at(self._known(indices)))
            log.minibatches.append(minibatch)
            if self._stops_early(epoch, update.coefficient, minibatch):
                if isinstance(loss, Sequence):  # of a graph: the policy is to hold the distribution of the last minibatch
                    self._evaluate_actions(rollout_data, self._taken_actions(rollout_data))
                return False
            log.gradient_norms.append(step(loss))
        return True

    def _minibatch_loss(self, rollout_data: Any, indices: th.Tensor | None, update: Update) -> tuple[th.Tensor, Minibatch]:
        """The loss of a minibatch, and what is logged of it."""
        values, log_prob, entropy = self._evaluate_actions(rollout_data, self._taken_actions(rollout_data))
        mask = self._valid_steps(rollout_data)
        advantages = rollout_data.advantages
        replayed = None if update.replayed is None else update.replayed.at(self._known(indices))
        if self.normalize_advantage:
            if replayed is None:
                advantages = self._normalized_advantages(advantages, mask)
            else:
                advantages = normalized_advantages(advantages, replayed)

        def mean(terms: th.Tensor) -> th.Tensor:
            return masked_mean(terms if replayed is None else replayed.weights * terms, mask)

        terms = per_sample_kl(
            log_prob,
            rollout_data.old_log_prob,
            advantages,
            update.coefficient,
            update.clip_range,
            centre=None if replayed is None else replayed.centre,
            **self._asked_quantities(update, indices, mask, log_prob.dtype),
        )
        policy_loss = mean(terms.loss)

        values = values.flatten()
        if update.clip_range_vf is not None:
            change = th.clamp(values - rollout_data.old_values, -update.clip_range_vf, update.clip_range_vf)
            values = rollout_data.old_values + change
        if replayed is None:
            value_loss = self._value_function_loss(rollout_data.returns, values, mask)
        else:
            value_loss = mean(F.mse_loss(rollout_data.returns, values, reduction="none"))

        # Without a closed form, -log π(a|s) estimates the entropy from the action that was taken.
        entropy_loss = -mean(-log_prob if entropy is None else entropy)
        loss = policy_loss + update.ent_coef * entropy_loss + update.vf_coef * value_loss
        terms = terms._replace(loss=terms.loss.detach())
        return loss, Minibatch(terms, advantages, mask, value_loss.detach(), entropy_loss.detach(), replayed)

    def _end_update(self, update: Update, log: UpdateLog) -> None:
        """Write the log, and let the coefficient learn from how far the policy went."""
        for key, value in log.summary(self.ent_coef, self.vf_coef).items():
            # The percentiles are for plots; on the terminal they would double the length of the table.
            self.logger.record(f"train/{key}", value, exclude="stdout" if key.startswith("beta_p") else None)
        self.update_beta = log.last_beta
        if self.update_path == "traced" and (reason := given_up(self)):
            self._tell_path(reason)
        self.logger.record("train/traced", float(self.update_path == "traced"), exclude="stdout")
        if update.coefficient.learns or self.log_kl:
            kl = self._rollout_kl(update.snapshot)
            update.coefficient.end_update(kl)
            self.logger.record("train/kl", kl)
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", float(update.clip_range))
        if update.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", float(update.clip_range_vf))

    def _stops_early(self, epoch: int, coefficient: Coefficient, minibatch: Minibatch) -> bool:
        """Whether ``target_kl`` or the coefficient ends the update before this minibatch's step."""
        if self.target_kl is not None:
            # The comparison is numpy's, as in PPO, so that both stop at the same minibatch.
            approx_kl = minibatch.approx_kl().cpu().numpy()
            if approx_kl > 1.5 * self.target_kl:
                if self.verbose >= 1:
                    print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                return True
        ratio = minibatch.policy_ratio() if coefficient.needs_policy_ratio else minibatch.shifted_ratio()
        if coefficient.stop(ratio, minibatch.mask):
            if self.verbose >= 1:
                print(f"Early stopping at step {epoch} due to the coefficient {coefficient!r}")
            return True
        return False

    # -- what a coefficient may ask for --------------------------------------------------------------------------------

    def _asked_quantities(
        self, update: Update, indices: th.Tensor | None, mask: th.Tensor | None, dtype: th.dtype
    ) -> dict[str, th.Tensor]:
        """What the coefficient asks to know of the samples that the policy has just evaluated."""
        quantities = {}
        if update.coefficient.needs_kl and update.snapshot is not None:
            quantities["kl"] = update.snapshot.kl(self._known(indices), mask, self.policy)
        if update.positions is not None:
            quantities["position"] = scatter_to_mask(update.positions[self._known(indices)].to(dtype), mask)
        if update.ratio_bounds is not None:
            bounds = update.ratio_bounds[:, self._known(indices)].to(dtype)
            quantities["least_ratio"], quantities["greatest_ratio"] = (scatter_to_mask(bound, mask) for bound in bounds)
        if update.ages is not None:
            quantities["age"] = scatter_to_mask(update.ages[self._known(indices)].to(dtype), mask)
        return quantities

    def _tensor(self, value: Any) -> th.Tensor:
        return th.as_tensor(value, dtype=th.float32, device=self.device)

    def _positions(self) -> th.Tensor:
        """Position of each sample in its episode, in the order of the flattened buffer."""
        buffer = self.rollout_buffer
        starts = buffer.episode_starts.reshape(buffer.buffer_size, buffer.n_envs)
        # A model that was loaded with another number of environments starts with new episodes.
        known = self._episode_steps if len(self._episode_steps) == buffer.n_envs else [0] * buffer.n_envs
        positions, carried = episode_positions(starts, np.array(known))
        self._episode_steps = carried.tolist()
        return th.as_tensor(positions.T.flatten(), dtype=th.float32, device=self.device)

    def _ages(self) -> th.Tensor:
        """Updates since each sample was collected, in the order of the flattened buffer."""
        return th.zeros(self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs, device=self.device)

    def _is_finite(self, log: UpdateLog) -> bool:
        """Whether the steps of the epoch are finite. Where only the norm of a gradient overflows, they are 0, as PPO's."""
        return log.is_finite() or all(bool(parameter.isfinite().all()) for parameter in self.policy.parameters())

    def _abandon_update(
        self, before: Sequence[tuple[th.Tensor, th.Tensor]], log: UpdateLog, cause: Exception | None
    ) -> NoReturn:
        """Put the policy back to where the update began, forget the optimizer's spoilt moments, and say what went wrong."""
        epoch, minibatch, problem = log.first_non_finite()
        observation = non_finite_sample(self.rollout_buffer, self.n_steps)
        cure = "Try a smaller learning rate or fewer epochs, or a coefficient that removes such samples."
        if observation is not None:
            problem, cure = f"{problem} ({observation})", f"If the policy cannot take such observations, remove them. {cure}"
        with th.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        self.policy.optimizer.state.clear()
        self.policy.optimizer.zero_grad()
        raise ValueError(
            f"{type(self).__name__} with beta={self.beta!r} stopped at {self.num_timesteps} steps "
            f"(train/n_updates {self._n_updates}, epoch {epoch}, minibatch {minibatch}), as the gradient is not finite: "
            f"{problem}. The policy was set back to the parameters from before this update. {cure}"
        ) from cause
