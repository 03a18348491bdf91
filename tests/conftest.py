"""What all tests share."""

import signal

import pytest
import torch as th

# Bits depend on how torch splits its sums over threads.
th.set_num_threads(1)
# In the background of a shell, Ctrl-C is ignored by all that is started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _restore_registry():
    """Coefficients that a test registers are gone after it."""
    from sb3_klip.coefficients import base

    registry, aliases = dict(base._REGISTRY), dict(base._ALIASES)
    yield
    base._REGISTRY.clear(), base._REGISTRY.update(registry)
    base._ALIASES.clear(), base._ALIASES.update(aliases)
