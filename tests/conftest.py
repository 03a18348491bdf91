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
    from sb3_klip.coefficients import registry

    words = dict(registry._WORDS)
    yield
    registry._WORDS.clear()
    registry._WORDS.update(words)
