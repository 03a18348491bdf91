"""Bits depend on how torch splits its sums over threads, so every test runs with one."""

import pytest
import torch as th

th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_registry():
    """Coefficients that a test registers are gone after it."""
    from sb3_klip.coefficients import base

    registry, aliases = dict(base._REGISTRY), dict(base._ALIASES)
    yield
    base._REGISTRY.clear(), base._REGISTRY.update(registry)
    base._ALIASES.clear(), base._ALIASES.update(aliases)
