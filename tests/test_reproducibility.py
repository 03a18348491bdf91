"""What the bits of a run depend on beside its state."""

import json
import platform
import random
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import assert_same_generators

from sb3_klip import __version__
from sb3_klip.reproducibility import (
    about_this_installation,
    deciding_versions,
    processor,
    read_generators,
    set_generators,
    unchanged_generators,
    versions,
)


def draw():
    return random.random(), np.random.rand(), th.rand(1).item()


def test_generators_are_put_back():
    state = read_generators()
    first, second = draw(), draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    set_generators(state)
    assert_same_generators(read_generators(), state)
    assert draw() == first


def test_what_draws_for_a_while_changes_no_generator():
    class Owner:
        def __init__(self):
            self.python, self.numpy, self.old = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
            self.torch, self.other = th.Generator().manual_seed(1), "no generator"

        def draw(self):
            own = self.python.random(), self.numpy.random(), self.old.rand(), th.rand(1, generator=self.torch).item()
            return (*draw(), *own)

    owner = Owner()
    with unchanged_generators(owner):
        first = owner.draw()

    @unchanged_generators(owner)
    def fail():
        assert owner.draw() == first
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    with unchanged_generators():
        second = owner.draw()
    third = owner.draw()
    assert second == first
    assert third[:3] == first[:3]
    assert all(a != b for a, b in zip(third[3:], first[3:], strict=True))


def test_versions_and_processor():
    found = versions()
    assert (found["python"], found["sb3-klip"], found["torch"]) == (platform.python_version(), __version__, th.__version__)
    assert processor()


def test_results_of_earlier_versions_count_where_the_numbers_are_the_same():
    """The committed suites were made with 0.1.0, and this version goes on with them."""
    manifests = [json.loads(path.read_text()) for path in Path(__file__).parents[1].glob("results/*/suite.json")]
    assert manifests
    assert {each["versions"]["sb3-klip"] for each in manifests} == {deciding_versions()["sb3-klip"]}
    assert "python" not in deciding_versions()


def test_what_a_report_of_a_bug_says():
    lines = about_this_installation().splitlines()
    assert f"sb3-klip: {__version__}" in lines
    assert f"torch: {th.__version__}" in lines
    assert f"processor: {processor()}" in lines
