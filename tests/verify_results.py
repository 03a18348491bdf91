"""What the command ``sb3_klip.verify`` is asked, and what it has said."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch as th


class Result(NamedTuple):
    """What the command did."""

    status: int
    out: str
    err: str

    def cell(self, name):
        """A number in the table."""
        (found,) = re.findall(rf"│ {name}\s*│ (.*?)\s*│", self.out)
        return found


#: Where processes can be forked, they have all modules from the start, which takes most of the time.
FORKS = sys.platform == "linux" and not th.cuda.is_available()
DEFAULT = ("--env", "CartPole-v1", "--hyperparams", "default")
OWN_ENV = ("--env", "Own-v0", "--gym-packages", "own_env", "--hyperparams", "default")
# Four updates, of ten minibatches each.
UPDATES = ("-n", 256, "-params", "n_steps:64", "learning_rate:0.01")
SMALL_LSTM = "policy_kwargs:dict(lstm_hidden_size=8,net_arch=[8])"


def assert_identical_result(result):
    assert (result.status, result.err) == (0, "")
    count = result.cell("minibatches compared")
    assert f"\nIDENTICAL: all {count} gradients and all parameters, to the last bit.\n" in result.out
    for name in ("largest difference of gradients", "largest difference of parameters and optimizer"):
        assert result.cell(name) == "0 ulp"
    assert float(result.cell("samples whose gradient the clip removes").split("%")[0]) > 0
    kernels, threads = th.backends.cpu.get_cpu_capability(), "with 1 thread"
    assert f"This holds for torch {th.__version__} on this machine's CPU ({kernels} kernels) {threads}." in result.out
    return int(count)


def found_difference(result, path="difference.pt"):
    """What the command found and saved."""
    assert (result.status, result.err) == (1, "")
    assert "This holds for torch" in result.out
    where = re.search(
        r"DIFFERENT: the gradient of (\S+), first in minibatch (\d+) of update (\d+), .* (\S+) \(torch", result.out
    )
    assert where[4] == str(path)
    saved = th.load(path, weights_only=True)
    assert (saved["minibatch"], saved["update"]) == (int(where[2]), int(where[3]))
    return where[1], saved


def assert_one_message(result, pattern):
    """One line that says it, and nothing else."""
    assert result.status == 2
    assert "IDENTICAL" not in result.out
    assert "DIFFERENT" not in result.out
    (line,) = result.err.splitlines()
    assert re.search(pattern, line), line
    assert not Path("difference.pt").exists()
