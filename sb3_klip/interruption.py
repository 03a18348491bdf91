"""Delaying Ctrl-C at moments at which it would leave something incomplete; without effect if SIGINT is ignored."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """
    Ctrl-C waits until this ends. A process that is started meanwhile never receives it, except on Windows.

    :raises KeyboardInterrupt: at the end, if it was pressed
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    can_block = hasattr(signal, "pthread_sigmask")
    if can_block:  # what is blocked stays so in new processes and threads
        resource_tracker.ensure_running()  # or it would be started now, and let the signal through
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
