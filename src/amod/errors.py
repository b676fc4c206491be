"""The one exception that stands for a mistake in what was asked, not in this code."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong value, file or combination. The message is one line: the value, what is allowed, what to do.

    Commands print it as ``error: ...`` and exit with status 2; the library raises it as it is.
    """
