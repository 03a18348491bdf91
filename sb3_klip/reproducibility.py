"""What the bits of a run depend on in addition to its own state: random generators, package versions, and the machine."""

import functools
import importlib.metadata
import pathlib
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from sb3_klip import __version__

#: The version of this package since which every training gives the same numbers.
SAME_NUMBERS_SINCE = "0.1.0"
#: Other packages whose versions decide the numbers.
PACKAGES = ("stable-baselines3", "sb3-contrib", "rl-zoo3", "gymnasium", "mujoco", "torch", "numpy")


def read_generators() -> dict[str, Any]:
    """State of the random generators of Python, numpy and torch."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],
    }


def set_generators(state: dict[str, Any]) -> None:
    """
    Put the random generators back; those of GPUs that are not here are left out.

    :param state: as :func:`read_generators` returned it
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(generator, device)


@contextmanager
def unchanged_generators(owner: Any = None) -> Iterator[None]:
    """
    Put back afterwards what is drawn from random generators meanwhile.

    :param owner: an object, of which the generators among its attributes are put back, too
    """
    state, own = read_generators(), [_own_state(value) for value in vars(owner).values()] if owner is not None else []
    try:
        yield
    finally:
        set_generators(state)
        for put_back in own:
            put_back()


def _own_state(generator: Any) -> Callable[[], None]:
    """What puts a random generator back to where it is now; does nothing for anything else."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    for kind, read, write in (
        (random.Random, "getstate", "setstate"),
        (np.random.RandomState, "get_state", "set_state"),
        (th.Generator, "get_state", "set_state"),
    ):
        if isinstance(generator, kind):
            return functools.partial(getattr(generator, write), getattr(generator, read)())
    return lambda: None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    others = {name: importlib.metadata.version(name) for name in PACKAGES}
    # Of this one, the code's own: the metadata of a clone are those of the day on which it was installed.
    return {"python": platform.python_version(), "sb3-klip": __version__, **others}


def deciding_versions() -> dict[str, str]:
    """What must be the same where numbers are to be: not Python, and of this package what its trainings give."""
    return {**{name: version for name, version in versions().items() if name != "python"}, "sb3-klip": SAME_NUMBERS_SINCE}


def about_this_installation() -> str:
    """Versions and machine, for a report of a bug: one line each."""
    threads, gpu = th.get_num_threads(), th.cuda.get_device_name() if th.cuda.is_available() else "none"
    lines = {
        **versions(),
        "system": platform.platform(),
        "processor": processor(),
        "kernels of torch": f"{th.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads != 1)}",
        "GPU": gpu,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def processor() -> str:
    """The processor's own name, as far as the system tells it: ``platform`` knows no more than its kind on Linux."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
