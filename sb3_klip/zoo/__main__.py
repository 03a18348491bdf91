"""``python -m sb3_klip.zoo train --algo klip_ppo …``: a script of RL Zoo with the algorithms registered."""

import runpy
import sys

from _sb3_klip_zoo_hook import SCRIPTS
from sb3_klip.errors import did_you_mean
from sb3_klip.zoo import register


def main() -> None:
    """
    Run a script of RL Zoo with our algorithms registered.

    :raises SystemExit: if the script is unknown
    """
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        usage = f"usage: python -m sb3_klip.zoo {{{','.join(SCRIPTS)}}} ...\n"
        if given in ("-h", "--help"):
            print(f"{usage}\nRuns a script of RL Zoo that knows this package's algorithms; the rest is for the script.")
            return
        sys.exit(f"{usage}unknown script {given!r}.{did_you_mean(given, SCRIPTS)}" if given else usage)
    script = sys.argv.pop(1)
    register()
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
