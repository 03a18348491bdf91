"""``rl_zoo3.train`` in a process that ends when its worker ends."""

import os
import runpy
import sys
import threading


def _end_with_worker() -> None:
    # The worker holds the other end of standard input and writes nothing, so that reading ends when the worker does, however.
    # Not through sys.stdin: a thread that waits in it keeps Python from shutting down.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_worker, daemon=True).start()
    # RL Zoo writes this beside its agent.
    sys.orig_argv[:] = ["rl_zoo3.train" if word == __spec__.name else word for word in sys.orig_argv]
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
