"""``rl_zoo3.train`` for as long as the worker that started it is there."""

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
    sys.argv[0] = "rl_zoo3.train"
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
