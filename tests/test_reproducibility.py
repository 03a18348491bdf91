"""What the bits of a run depend on beside its state."""

import platform
import random

import numpy as np
import torch as th
from helpers import assert_same_generators

from sb3_klip import __version__
from sb3_klip.reproducibility import processor, read_generators, set_generators, versions


def draw():
    return random.random(), np.random.rand(), th.rand(1).item()


def test_generators_are_put_back():
    state = read_generators()
    first, second = draw(), draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    set_generators(state)
    assert_same_generators(read_generators(), state)
    assert draw() == first


def test_versions_and_processor():
    found = versions()
    assert (found["python"], found["sb3-klip"], found["torch"]) == (platform.python_version(), __version__, th.__version__)
    assert processor()
