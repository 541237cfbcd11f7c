"""Bars: how far something is, as text.

tqdm's own choice for a notebook is a widget, and a widget lives in its kernel: saved and opened again, the notebook has
"Error displaying widget: model not found" in the place of every bar. Text has no such trouble. In a notebook it goes to
standard output, since standard error is red there, and is gone when the bar is full. All bars take the same line and
have the same width, so one within another covers it for its time: a notebook cannot move up to the outer bar's line.
"""

import sys

from tqdm import std

IN_A_NOTEBOOK = {"leave": False, "position": 0, "ncols": 90}


class tqdm(std.tqdm):  # noqa: N801, it takes the place of tqdm's
    """tqdm's bar. On a terminal the outermost stays and those within it vanish; in a notebook all of them do."""

    def __init__(self, *args, **options):
        own = IN_A_NOTEBOOK | {"file": sys.stdout} if in_notebook() else {"leave": None}
        super().__init__(*args, **own | options)


def in_notebook():
    """Whether this is the kernel of a notebook."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")
