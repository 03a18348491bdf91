"""The comparison of the two trainings: every gradient, every parameter, and the verdict."""

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch as th
from rich.live import Live
from rich.table import Table

from sb3_klip.progress import PipedProgress
from sb3_klip.verify.bits import Difference, largest_difference
from sb3_klip.verify.training import PAIRS, Arrays, Training, Update


class Verdict(NamedTuple):
    """
    What came out.

    :param identical: None if the two could not be compared
    :param text: for the user
    """

    identical: bool | None
    text: str


class Comparison:
    """
    What two trainings have done, compared as it comes.

    :param options: of the command line
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.steps = self.updates = self.minibatches = 0
        self.gradient = self.state = Difference(0, "")
        self.kill: list[float] = []
        self.passed: list[float] = []
        self.residual: list[np.ndarray] = []

    def run(self, base: Training, ours: Training, live: Live) -> Verdict:
        """Compare until both have ended, or one minibatch or one update differs."""
        piped = PipedProgress(live.console)
        index, first = 0, None
        while True:
            (kind, theirs), (our_kind, own) = base.next(), ours.next()
            if uneven := kind != our_kind:  # one of the two has stopped early
                (kind, theirs), (our_kind, own) = base.finish(kind, theirs), ours.finish(our_kind, own)
            for training, message in ((base, (kind, theirs)), (ours, (our_kind, own))):
                if message[0] == "error":
                    return Verdict(None, f"{training.algo} stopped after {self.steps} steps. {message[1]}")
            if kind == "end":
                return self._verdict()
            if kind == "rollout":
                if theirs != own:
                    return Verdict(
                        None,
                        f"The rollout of update {self.updates} differs, although the policies were equal to the last bit: "
                        f"{self.options.env} does not repeat its episodes with the same seed, so it cannot be used for this "
                        "comparison.",
                    )
                continue
            if kind == "gradient":
                self.minibatches += 1
                worst = largest_difference(_tensors(own), _tensors(theirs))
                if worst.ulps > 0 and first is None:
                    first = (index, theirs, own)
                self.gradient = max(self.gradient, worst)
                index += 1
                continue
            self._take(theirs, own)
            live.update(self.table())
            piped.tell(f"{self.steps} of {self.options.n_timesteps} steps compared", self.steps / self.options.n_timesteps)
            if first is not None or uneven or self.state.ulps > 0:
                return self._different(first, base, ours)
            index = 0
            base.send(None)
            ours.send(None)

    def _take(self, theirs: Update, own: Update) -> None:
        """The numbers of an update."""
        self.steps = own.steps
        self.updates += 1
        self.state = max(self.state, largest_difference(_tensors(own.state), _tensors(theirs.state)))
        if own.kill is not None and own.passed is not None:
            self.kill.append(own.kill)
            self.passed.append(own.passed)
        self.residual.append(own.residual)

    def _verdict(self) -> Verdict:
        if self.minibatches == 0:
            return Verdict(None, f"No update was made in {self.options.n_timesteps} steps; ask for more with -n.")
        if sum(self.kill) == 0:
            return Verdict(None, "Equal so far, but no sample was clipped, so this shows nothing; train for longer with -n.")
        if all(kill + passed > 1 - 1e-9 for kill, passed in zip(self.kill, self.passed, strict=True)):
            reason = f"the clip range was 0 or less, as schedules run out before the first rollout of {self.steps} steps ends"
            return Verdict(None, f"Equal so far, but {reason}; train for longer with -n.")
        return Verdict(True, f"IDENTICAL: all {self.minibatches} gradients and all parameters, to the last bit.")

    def _different(self, first: Any, base: Training, ours: Training) -> Verdict:
        """Save the first minibatch that differs."""
        if first is None:
            return Verdict(
                False, f"DIFFERENT: {self.state.name} after update {self.updates - 1}, though all gradients are equal."
            )
        minibatch, theirs, own = first
        base.send(minibatch)
        ours.send(minibatch)
        content = {
            "update": self.updates - 1,
            "minibatch": minibatch,
            **{f"gradient of {t.algo}": _tensors(gradient) for t, gradient in ((base, theirs), (ours, own))},
            **{f"samples of {t.algo}": t.next()[1] for t in (base, ours)},
        }
        try:
            th.save(content, self.options.output)
            saved = f"is saved to {self.options.output} (torch.load)"
        except (OSError, RuntimeError) as error:  # torch has its own for a file that cannot be written
            saved = f"could not be saved to {self.options.output}: {error}"
        return Verdict(
            False,
            f"DIFFERENT: the gradient of {self.gradient.name}, first in minibatch {minibatch} of update {self.updates - 1}, "
            f"which {saved}.",
        )

    def table(self) -> Table:
        """All numbers so far."""
        pair = PAIRS[self.options.algo]
        table = Table(show_header=False, title=f"{self.options.env}: {pair.zoo_base} and {pair.zoo_name}")
        rows = [
            ("steps", f"{self.steps} of {self.options.n_timesteps}"),
            ("updates", f"{self.updates}"),
            ("minibatches compared", f"{self.minibatches}"),
            ("largest difference of gradients", _shown(self.gradient)),
            ("largest difference of parameters and optimizer", _shown(self.state)),
        ]
        if self.kill:
            mean, peak = np.mean(self.kill), max(self.kill)
            rows.append(("samples whose gradient the clip removes", f"{mean:.2%} (in one update at most {peak:.2%})"))
            rows.append(("samples outside the band that it lets through", f"{np.mean(self.passed):.2%}"))
        for row in rows:
            table.add_row(*row)
        return table

    def why(self) -> str:
        """What the analytic divergence leaves of the gradient, in words."""
        shares = np.concatenate([np.zeros(0), *self.residual])
        if len(shares) == 0:
            return "No sample was clipped in this update, so there is nothing to compare; try another seed or more epochs."
        low, middle = shares.min(), np.median(shares)
        text = (
            "For each sample, the clip removes a multiple of the gradient of log pi(a|s), which depends on the action. The "
            "gradient of the analytic KL divergence does not depend on the action, and has another direction. "
            f"On the {len(shares)} clipped samples of this update, with the best coefficient for each sample, {middle:.1%} of "
            f"the gradient that should be removed remains (median; at least {low:.1%})."
        )
        if middle < 1e-6:
            text += " Here nothing remains: a distribution with a single parameter has gradients in one direction only."
        return text


def _tensors(arrays: Arrays) -> dict[str, th.Tensor]:
    return {name: th.from_numpy(array) for name, array in arrays.items()}


def _shown(difference: Difference) -> str:
    if difference.ulps == 0:
        return "0 ulp"
    return f"{difference.ulps} ulp ({difference.name})" if difference.ulps < 2**62 else f"shape or NaN ({difference.name})"
