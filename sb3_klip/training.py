"""The update that all variants share: PPO's inner loop, with the per-sample KL surrogate in place of the clipped objective."""

import inspect
import io
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutBufferSamples, TensorDict
from stable_baselines3.common.utils import explained_variance
from torch.nn import functional as F

from sb3_klip.checkpoint import (
    FORMAT,
    RESUME,
    Checkpoint,
    check_parameters,
    plain_names,
    restore_schedules,
    statistics_file,
    write_atomically,
)
from sb3_klip.coefficients import Coefficient, CoefficientLike, make
from sb3_klip.diagnostics import Minibatch, UpdateLog
from sb3_klip.divergence import CLOSED_FORM
from sb3_klip.errors import did_you_mean
from sb3_klip.resume import Boundary, continue_counting, read_generators, read_state, restore_state, set_generators
from sb3_klip.rollout import PolicySnapshot, episode_positions, indexed_minibatches, padded
from sb3_klip.speed import Step, check_compile, compiled, plain_forward, stepping, unchecked_distributions
from sb3_klip.surrogate import kl_estimate, masked_mean, per_sample_kl

SelfPerSampleKL = TypeVar("SelfPerSampleKL", bound="PerSampleKLTraining")


#: What a clip range that a schedule takes to 0 and below is held at, for coefficients that divide by it.
SMALLEST_CLIP_RANGE = 1e-4


def make_beta(beta: str | CoefficientLike, beta_kwargs: dict[str, Any] | None) -> Coefficient:
    """
    The coefficient that the constructor arguments ``beta`` and ``beta_kwargs`` ask for.

    :raises ValueError: if the name is unknown or a parameter out of range
    :raises TypeError: if an argument is of a wrong type or a parameter unknown
    """
    if beta_kwargs is not None and not isinstance(beta_kwargs, dict):
        raise TypeError(f"beta_kwargs must be a dict of parameters of the coefficient or None, not {beta_kwargs!r}")
    return make(beta, **(beta_kwargs or {}))


def check_policy(policy: str | type, aliases: Mapping[str, type], base: type) -> None:
    """
    Refuse a policy that the algorithm cannot use, before anything is built.

    :param policy: as given to the constructor
    :param aliases: policies known by name
    :param base: class that the algorithm's policies derive from
    :raises ValueError: naming the policies that fit
    """
    if isinstance(policy, str) and policy not in aliases:
        raise ValueError(f"policy={policy!r} must be one of {', '.join(aliases)}.{did_you_mean(policy, aliases)}")
    if isinstance(policy, type) and not issubclass(policy, base):
        raise ValueError(f"policy={policy.__name__} must derive from {base.__name__}, as do {', '.join(aliases)}")


class Update(NamedTuple):
    """
    What does not change during one ``train()``.

    :param coefficient: the coefficient, its schedules brought up to date
    :param clip_range: half-width ε, a number or a tensor
    :param clip_range_vf: clipping range of the value function, likewise, if any
    :param snapshot: the rollout policy's distributions, if they are asked for
    :param positions: position of each sample in its episode, if asked for
    """

    coefficient: Coefficient
    clip_range: Any
    clip_range_vf: Any
    snapshot: PolicySnapshot | None
    positions: th.Tensor | None


class PerSampleKLTraining(OnPolicyAlgorithm):
    """
    ``train()``, ``save()`` and ``load()`` of the subclasses of SB3's and sb3-contrib's PPO.

    What differs between those is in four small methods, here as in SB3's ``PPO``: :meth:`_evaluate_actions`,
    :meth:`_valid_steps`, :meth:`_normalize_advantages` and :meth:`_value_loss`.
    """

    # A name only after loading a file whose coefficient is not known here.
    beta: str | Coefficient
    beta_kwargs: dict[str, Any] | None
    log_kl: bool
    # Arguments of torch.compile, or True for none; False for the update whose bits are PPO's.
    compile: bool | dict[str, Any] = False
    _compiled_loss: Callable[..., Any] | None = None
    # Steps that the environments' running episodes already had when the last rollout ended.
    _episode_steps: Sequence[int] = ()
    #: β of each sample in the last epoch of the last update, shape (n_steps * n_envs,).
    update_beta: th.Tensor | None = None
    # The last moment between two rollouts, if that is now; see sb3_klip.resume.
    _boundary: Boundary | None = None
    # Random generators to put back when learning goes on, in a model that was loaded with resume=True.
    _resuming: dict[str, Any] | None = None
    # Of the PPO that this is mixed into; schedules once the model is set up.
    n_epochs: int
    batch_size: Any
    clip_range: Any
    clip_range_vf: Any
    normalize_advantage: bool
    target_kl: float | None

    # -- the seam between the variants ---------------------------------------------------------------------------------

    def _evaluate_actions(
        self, rollout_data: RolloutBufferSamples, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values, log-probabilities and entropy (None if it has no closed form) under the current policy."""
        return self.policy.evaluate_actions(rollout_data.observations, actions)

    def _valid_steps(self, rollout_data: RolloutBufferSamples) -> th.Tensor | None:
        """Boolean mask of the samples that count; None if all do."""
        return None

    def _normalize_advantages(self, advantages: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Advantages with mean 0 and standard deviation 1; a single sample, which has none, is left as it is."""
        valid = advantages if mask is None else advantages[mask]
        if len(valid) <= 1:
            return advantages
        return (advantages - valid.mean()) / (valid.std() + 1e-8)

    def _value_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Mean squared error of the value function."""
        return F.mse_loss(returns, values)

    # -- the update ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """
        Update the policy on the current rollout.

        :raises ValueError: if a gradient is NaN or infinite; the policy is then set back to where the update began
        """
        update = self._begin_update()
        log = UpdateLog(float(update.clip_range), update.coefficient.estimator)
        before = {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}
        parameters, fused = list(self.policy.parameters()), bool(self.compile)
        for epoch in range(self.n_epochs):
            log.begin_epoch()
            try:
                with unchecked_distributions(), stepping(self.policy.optimizer, parameters, self.max_grad_norm, fused) as step:
                    finished = self._train_epoch(epoch, update, log, step)
            except ValueError as error:
                # A policy may refuse the NaN parameters that a bad step leaves behind.
                if (problem := log.first_non_finite()) is not None:
                    self._abandon_update(before, epoch, *problem, cause=error)
                raise
            if (problem := log.first_non_finite()) is not None:
                self._abandon_update(before, epoch, *problem)
            log.end_epoch()
            self._n_updates += 1
            if not finished:
                break
        self._end_update(update, log)
        self._boundary = Boundary(self.num_timesteps)

    def _begin_update(self) -> Update:
        """Bring schedules up to date, and see to what the coefficient asks for before the first step changes the policy."""
        coefficient = self._coefficient()
        coefficient.set_progress(self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)
        if coefficient.needs_clip_range and clip_range < SMALLEST_CLIP_RANGE:
            warnings.warn(
                f"clip_range={clip_range:g} is held at {SMALLEST_CLIP_RANGE:g} for beta={coefficient!r}", stacklevel=4
            )
            clip_range = SMALLEST_CLIP_RANGE
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        positions = self._positions() if "position" in coefficient.requests else None
        snapshot = self._snapshot() if coefficient.needs_kl or self.log_kl else None
        self.policy.set_training_mode(True)
        if self.compile:
            # Numbers would be compiled in, and compiled anew whenever a schedule changes them.
            clip_range = self._tensor(clip_range)
            clip_range_vf = None if clip_range_vf is None else self._tensor(clip_range_vf)
        return Update(coefficient, clip_range, clip_range_vf, snapshot, positions)

    def _train_epoch(self, epoch: int, update: Update, log: UpdateLog, step: Step) -> bool:
        """One pass over the rollout; False if ``target_kl`` or the coefficient ended it."""
        compute = self._loss if self._compiled_loss is None else self._compiled_loss
        for rollout_data, indices in indexed_minibatches(self.rollout_buffer, self.batch_size):
            loss, minibatch = compute(rollout_data, indices, update)
            log.minibatches.append(minibatch)
            if self._stops_early(epoch, update.coefficient, minibatch):
                return False
            log.gradient_norms.append(step(loss))
        return True

    def _loss(self, rollout_data: Any, indices: th.Tensor | None, update: Update) -> tuple[th.Tensor, Minibatch]:
        """The loss of a minibatch, and what is logged of it."""
        values, log_prob, entropy = self._evaluate_actions(rollout_data, self._actions(rollout_data))
        mask = self._valid_steps(rollout_data)
        advantages = rollout_data.advantages
        if self.normalize_advantage:
            advantages = self._normalize_advantages(advantages, mask)

        terms = per_sample_kl(
            log_prob,
            rollout_data.old_log_prob,
            advantages,
            update.coefficient,
            update.clip_range,
            **self._quantities(update, indices, mask, advantages),
        )
        policy_loss = masked_mean(terms.loss, mask)

        values = values.flatten()
        if update.clip_range_vf is not None:
            change = th.clamp(values - rollout_data.old_values, -update.clip_range_vf, update.clip_range_vf)
            values = rollout_data.old_values + change
        value_loss = self._value_loss(rollout_data.returns, values, mask)

        # Without a closed form, -log π(a|s) estimates the entropy from the action that was taken.
        entropy_loss = -masked_mean(-log_prob if entropy is None else entropy, mask)
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        terms = terms._replace(loss=terms.loss.detach())
        return loss, Minibatch(terms, advantages, mask, value_loss.detach(), entropy_loss.detach())

    def _compilable_loss(self, *args: Any) -> tuple[th.Tensor, Minibatch]:
        """:meth:`_loss`, for ``torch.compile``."""
        loss, minibatch = self._loss(*args)
        # Or it would have to leave the compiled code together with its gradient, which costs time.
        self.policy.action_dist.distribution = None  # type: ignore[assignment]
        return loss, minibatch

    def _end_update(self, update: Update, log: UpdateLog) -> None:
        """Write the log, and let the coefficient learn from how far the policy went."""
        for key, value in log.summary(self.ent_coef, self.vf_coef).items():
            # The percentiles are for plots; on the terminal they would double the length of the table.
            self.logger.record(f"train/{key}", value, exclude="stdout" if key.startswith("beta_p") else None)
        self.update_beta = log.last_beta
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
        if coefficient.stop(minibatch.terms.ratio, minibatch.mask):
            if self.verbose >= 1:
                print(f"Early stopping at step {epoch} due to the coefficient {coefficient!r}")
            return True
        return False

    def _actions(self, rollout_data: RolloutBufferSamples) -> th.Tensor:
        """Actions as the policy takes them; the buffer holds discrete ones as floats."""
        actions = rollout_data.actions
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    # -- what a coefficient may ask for --------------------------------------------------------------------------------

    def _quantities(
        self, update: Update, indices: th.Tensor | None, mask: th.Tensor | None, like: th.Tensor
    ) -> dict[str, th.Tensor]:
        """What the coefficient asks to know of the samples that the policy has just evaluated."""
        quantities = {}
        if update.coefficient.needs_kl and update.snapshot is not None:
            quantities["kl"] = update.snapshot.kl(self._known(indices), mask, self.policy)
        if update.positions is not None:
            quantities["position"] = padded(update.positions[self._known(indices)], mask)
        if "age" in update.coefficient.requests:
            quantities["age"] = th.zeros_like(like)
        return quantities

    def _known(self, indices: th.Tensor | None) -> th.Tensor:
        """Indices of a minibatch, which a user's rollout buffer may keep to itself."""
        if indices is None:
            raise ValueError(
                f"{type(self.rollout_buffer).__name__}.get does not take its samples from _get_samples, so what "
                f"beta={self.beta!r} asks to know of each sample cannot be told"
            )
        return indices

    def _evaluated_rollout(self) -> Iterator[tuple[Any, th.Tensor, th.Tensor | None, th.Tensor]]:
        """
        The whole rollout once, each minibatch after the policy has evaluated it: samples, indices, mask, log π(a|s).

        Draws no random numbers that the update would draw.
        """
        self.policy.set_training_mode(False)
        random_state = np.random.get_state()
        for rollout_data, indices in indexed_minibatches(self.rollout_buffer, self.batch_size):
            with th.no_grad():
                _, log_prob, _ = self._evaluate_actions(rollout_data, self._actions(rollout_data))
            yield rollout_data, self._known(indices), self._valid_steps(rollout_data), log_prob
        np.random.set_state(random_state)
        self.policy.set_training_mode(True)

    def _snapshot(self) -> PolicySnapshot:
        """The rollout policy's distribution at every sample; one forward pass."""
        snapshot = PolicySnapshot(self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs)
        for _, indices, mask, _ in self._evaluated_rollout():
            snapshot.store(indices, mask, self.policy)
        return snapshot

    def _rollout_kl(self, snapshot: PolicySnapshot | None) -> float:
        """Mean of KL(π_old ‖ π_new) over the rollout, in closed form, or without a snapshot by k3; one forward pass."""
        total, count = 0.0, 0
        for rollout_data, indices, mask, log_prob in self._evaluated_rollout():
            if snapshot is None:
                kl = kl_estimate("k3", log_prob, rollout_data.old_log_prob)
            else:
                kl = snapshot.kl(indices, mask, self.policy)
            total += (kl if mask is None else kl[mask]).sum().item()
            count += len(indices)
        return total / count

    def _tensor(self, value: float) -> th.Tensor:
        return th.tensor(value, dtype=th.float32, device=self.device)

    def _positions(self) -> th.Tensor:
        """Position of each sample in its episode, in the order of the flattened buffer."""
        buffer = self.rollout_buffer
        starts = buffer.episode_starts.reshape(buffer.buffer_size, buffer.n_envs)
        # A model that was loaded with another number of environments starts with new episodes.
        known = self._episode_steps if len(self._episode_steps) == buffer.n_envs else [0] * buffer.n_envs
        positions, carried = episode_positions(starts, np.array(known))
        self._episode_steps = carried.tolist()
        return th.as_tensor(positions.T.flatten(), dtype=th.float32, device=self.device)

    def _abandon_update(
        self, before: dict[str, th.Tensor], epoch: int, minibatch: int, problem: str, cause: Exception | None = None
    ) -> NoReturn:
        """Put the policy back to where the update began, forget the optimizer's spoilt moments, and say what went wrong."""
        self.policy.load_state_dict(before)
        self.policy.optimizer.state.clear()
        self.policy.optimizer.zero_grad()
        raise ValueError(
            f"{type(self).__name__} with beta={self.beta!r} stopped at {self.num_timesteps} steps "
            f"(train/n_updates {self._n_updates}, epoch {epoch}, minibatch {minibatch}), as the gradient is not finite: "
            f"{problem}. The policy was set back to the parameters from before this update. Try a smaller learning rate or "
            "fewer epochs, or a coefficient that removes such samples."
        ) from cause

    # -- the coefficient, and its place in a file ----------------------------------------------------------------------

    def _coefficient(self) -> Coefficient:
        """
        The coefficient to train with.

        :raises ValueError: if the model was loaded from a file whose coefficient is not known here
        """
        if isinstance(self.beta, str):
            raise ValueError(
                f"this model was saved with the coefficient {self.beta!r}, which is not known here. Register or import it "
                f"before loading, or choose another: {type(self).__name__}.load(..., beta='step')."
            )
        return self.beta

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> Any:
        self._coefficient()
        resuming = self._resuming is not None
        if resuming:
            if total_timesteps != self._total_timesteps:
                warnings.warn(
                    f"total_timesteps={total_timesteps} instead of {self._total_timesteps}, as in the run that is resumed: "
                    "what follows the progress of training, such as a schedule, is not what it would have been.",
                    stacklevel=4,
                )
            # SB3 adds those that were taken.
            total_timesteps, reset_num_timesteps = total_timesteps - self.num_timesteps, False
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if resuming:
            continue_counting(callback, self.num_timesteps // self.n_envs)
        return total_timesteps, callback

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect a rollout, as the base class does; a run that is resumed goes on with its random generators here."""
        if self._resuming is not None:
            set_generators(self._resuming)
            self._resuming = None
        # Before gSDE draws its noise, so that a checkpoint from on_rollout_start draws the same again.
        self._boundary = Boundary(self.num_timesteps, read_generators())
        with plain_forward(self.policy):
            return super().collect_rollouts(*args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.compile:
            self._compile()
        if isinstance(self.beta, Coefficient):
            coefficient = self.beta
        else:  # a name and parameters, as they stand in a file
            try:
                coefficient = make_beta(self.beta, self.beta_kwargs)
            except Exception as error:
                warnings.warn(
                    f"The coefficient {self.beta!r} that this model was saved with cannot be made here ({error}) "
                    "The model predicts, but does not train.",
                    stacklevel=3,
                )
                return
        self.beta = coefficient
        coefficient.load_state_dict(self.__dict__.pop("beta_state", {}).get(coefficient.name, {}))
        if coefficient.needs_clip_range and self.clip_range(1.0) <= 0:
            raise ValueError(f"clip_range={self.clip_range(1.0):g} must be positive for beta={coefficient!r}")
        action_dist = getattr(self.policy, "action_dist", None)
        if (coefficient.needs_kl or self.log_kl) and not isinstance(action_dist, CLOSED_FORM):
            raise ValueError(
                f"{'log_kl=True' if self.log_kl else f'beta={coefficient!r}'} needs the closed form of the KL divergence, "
                f"which is not known for the policy's {type(action_dist).__name__}. "
                "Use beta='fixed' or 'adaptive' with beta_kwargs={'estimator': 'k3'} (or 'k1'), which need none."
            )

    def _compile(self) -> None:
        """Compile the loss, if that can be done here; the constructor has seen to it, but a file may be from elsewhere."""
        try:
            check_compile(self.compile)
        except Exception as error:
            warnings.warn(f"The update is not compiled, as that of the saved model was: {error}", stacklevel=4)
            self.compile = False
        else:
            self._compiled_loss = compiled(self._compilable_loss, self.compile)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_boundary", "_resuming", "_compiled_loss", "update_beta"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        resumable: bool = False,
    ) -> None:
        """
        Save the model to a zip file that ``PPO.load`` opens as well; the coefficient stands there as plain JSON.

        A file with the same name is replaced in one step, so that a kill at any moment leaves one of the two whole.

        :param path: file to write; ".zip" is added to a name without a suffix
        :param exclude: attributes to leave out in addition to the default ones
        :param include: attributes to keep although they are left out by default
        :param resumable: whether to save as well what a run needs to go on exactly where it was: random generators, the
            environments in the middle of their episodes and their wrappers, the last observations. Between two rollouts only:
            see :class:`~sb3_klip.ResumableCheckpointCallback`.
        :raises ValueError: if ``resumable`` in the middle of a rollout or an update
        """
        state = read_state(self) if resumable else None
        beta, beta_kwargs = self.beta, self.beta_kwargs
        if isinstance(beta, Coefficient):
            self.beta, self.beta_kwargs = beta.name, beta.parameters
            self.beta_state = {beta.name: beta.state_dict()}
        self.klip_format = FORMAT
        buffer = io.BytesIO()
        try:
            super().save(buffer, exclude, include)
        finally:
            self.beta, self.beta_kwargs = beta, beta_kwargs
            if isinstance(beta, Coefficient):
                del self.beta_state
            del self.klip_format
        if state is not None:
            with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(RESUME, state)
        if not isinstance(path, (str, pathlib.Path)):
            open_path(path, "w").write(buffer.getvalue())
            return
        path = pathlib.Path(path)
        if path.suffix == "":
            path = path.with_name(f"{path.name}.zip")
        if path.is_dir():
            path = path.with_name(f"{path.name}_2")
            warnings.warn(f"A folder has the name of the file to save, so it is saved to {path}", stacklevel=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(
        cls: type[SelfPerSampleKL],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = True,
        resume: bool = False,
        **kwargs: Any,
    ) -> SelfPerSampleKL:
        """
        Load a model from a zip file, as SB3 does; also one that the base class saved, or RL Zoo in the days of ``gym``.

        A checkpoint holds pickles, which run code when they are loaded. Of a file that you have no reason to trust, load
        plain data only, with ``trusted=False``.

        :param path: the file, with or without ".zip", or an open one
        :param env: the environment to train on; its observation space may differ from the file's in dtype and bounds
        :param device: Device (cpu, cuda, ...) on which to run
        :param custom_objects: attributes to take instead of those in the file
        :param print_system_info: Whether to print the system that saved the file, and this one
        :param force_reset: Whether to reset ``env`` before training
        :param trusted: Whether the file may run code. With False, weights, spaces and plain hyperparameters are restored,
            functions are replaced as if they could not be restored, and a file with anything else is refused.
        :param resume: Whether to restore all that ``save(..., resumable=True)`` has saved, so that ``learn``, called as in the
            interrupted run, takes the steps that remain and ends as that run would have ended
        :param kwargs: arguments of the constructor to take instead of those in the file; a new ``beta`` comes with its own
            ``beta_kwargs``, and not with those of the file
        :return: the model
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is not a whole checkpoint of the right algorithm, does not fit ``env``, is not trusted
            and holds more than plain data, or has nothing to resume from
        """
        if "beta" in kwargs:
            kwargs["beta"] = make_beta(kwargs["beta"], kwargs.setdefault("beta_kwargs", None))
        checkpoint = Checkpoint.read(path)
        checkpoint.check_algorithm(cls)
        state = checkpoint.resume_state(trusted) if resume else None
        if resume and env is None:
            raise ValueError("resume=True needs env, made as that of the interrupted run")

        # Those of policy_kwargs are compared with the file's.
        replaced = {*(custom_objects or {}), *(kwargs.keys() - {"policy_kwargs"})}
        objects, lost = checkpoint.restore(replaced, trusted)
        schedules, source = restore_schedules(checkpoint, lost)
        defaults = inspect.signature(cls).parameters
        for name in lost:
            objects[name] = schedules.get(name, defaults[name].default if name in defaults else None)
        objects.update(custom_objects or {})
        if "beta_kwargs" in kwargs and "beta" not in kwargs:
            # Other parameters than the file's must fit its coefficient, whereas its own are allowed to be unknown here.
            make_beta(objects.get("beta", checkpoint.data.get("beta", defaults["beta"].default)), kwargs["beta_kwargs"])
        if env is not None:
            env = cls._wrap_env(env, checkpoint.data.get("verbose", 0))
            objects.update(checkpoint.fit_spaces(objects, env.observation_space, env.action_space))

        model = super().load(checkpoint.file, env, device, objects, print_system_info, force_reset, **kwargs)
        if lost:
            checkpoint.warn_of_lost(lost, schedules, source, model)
        statistics = None if env is None or checkpoint.path is None else statistics_file(checkpoint.path)
        if statistics is not None and model.get_vec_normalize_env() is None:
            warnings.warn(
                f"The agent has learned from normalized observations or rewards, as {statistics} lies beside it, but env does "
                f"not normalize. Wrap it: env = sb3_klip.load_vecnormalize({str(statistics)!r}, env)",
                stacklevel=2,
            )
        if state is not None:
            model._resuming = restore_state(model, state)
        return model

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a file or a dictionary, as SB3 does.

        :param load_path_or_dict: a checkpoint, or what ``get_parameters`` returns
        :param exact_match: Whether all parameters must be there, and no others
        :param device: Device on which to load them
        :raises ValueError: if they are of another architecture, or the file is not a checkpoint of the right algorithm; the
            model is then as it was
        """
        name = "load_path_or_dict"
        if not isinstance(load_path_or_dict, dict):
            checkpoint = Checkpoint.read(load_path_or_dict)
            checkpoint.check_algorithm(type(self))
            name = checkpoint.name
            _, load_path_or_dict, _ = load_from_zip_file(checkpoint.file, load_data=False, device=device)
        if "policy" in load_path_or_dict:
            policy = plain_names(load_path_or_dict["policy"])
            load_path_or_dict = {**load_path_or_dict, "policy": policy}  # type: ignore[dict-item]
        check_parameters(load_path_or_dict, self.policy, name, exact_match)
        super().set_parameters(load_path_or_dict, exact_match, device)
