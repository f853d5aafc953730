"""What raybert raises for mistakes that the user can mend."""

from __future__ import annotations

from typing import Any

from raybert.places import shown


class UserError(Exception):
    """A mistake that the user can mend: one paragraph saying what was wanted, found, and how to
    mend it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __str__(self) -> str:
        """With what lies in object storage by its URI."""
        return shown(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it reads as it does here, where the mirrors of URIs are known."""
        return type(self), (str(self),)


class TransientError(UserError):
    """What may pass by itself: storage, the network or another process is in the way. A search
    tries such a trial again."""
