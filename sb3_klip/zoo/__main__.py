"""``python -m sb3_klip.zoo train --algo klip_ppo …``: a script of RL Zoo with the algorithms registered; and ``versions``."""

import runpy
import sys

from _sb3_klip_zoo_hook import SCRIPTS
from sb3_klip.errors import did_you_mean
from sb3_klip.reproducibility import about_this_installation
from sb3_klip.zoo import register

COMMANDS = (*SCRIPTS, "versions")


def main() -> None:
    """
    Run a script of RL Zoo with our algorithms registered, or print the versions and the machine for a bug report.

    :raises SystemExit: if the script is unknown
    """
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        usage = f"usage: python -m sb3_klip.zoo {{{','.join(COMMANDS)}}} ...\n"
        if given in ("-h", "--help"):
            print(f"{usage}\nRuns a script of RL Zoo with this package's algorithms. Further arguments go to the script.")
            print("`versions` prints the versions and the machine, for a bug report.")
            return
        sys.exit(f"{usage}unknown script {given!r}.{did_you_mean(given, COMMANDS)}" if given else usage)
    script = sys.argv.pop(1)
    if script == "versions":
        print(about_this_installation())
        return
    register()
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
