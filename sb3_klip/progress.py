"""Progress of a command as lines of text, if its output goes to a pipe or a file."""

import time

from rich.console import Console

#: Seconds from one line to the next.
INTERVAL = 30.0


class PipedProgress:
    """
    A line now and then; on a terminal, which shows a bar or a table, none.

    :param console: where the command writes
    """

    def __init__(self, console: Console):
        self.console = console
        self.started = self.told = time.monotonic()

    def tell(self, text: str, share: float) -> None:
        """
        Write a line, if the last one was some time ago.

        :param text: what has been done
        :param share: of all that is to be done, from 0 to 1
        """
        now = time.monotonic()
        if self.console.is_terminal or now - self.told < INTERVAL:
            return
        self.told = now
        left = f", about {duration((now - self.started) * (1 - share) / share)} left" if 0 < share < 1 else ""
        self.console.print(f"{share:.0%}: {text}{left}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in the unit in which one would tell it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
