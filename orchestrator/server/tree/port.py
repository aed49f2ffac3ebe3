"""What a keeper needs of its platform to own a server with everything below it.

Standard library only. Each platform has a module with these names, and `__init__.py` chooses; what
else differs is told by `base/waitable.py`, by `locks` here, and by `server/pin.py`.
"""

from __future__ import annotations

from typing import Any, Final, Protocol, Self

VERSION: Final = 2
"""Of the messages; the first one of a keeper names it."""

Message = dict[str, Any]
Part = int | bytes
"""What goes with a message: a descriptor, or a text that may be long, or a secret."""


def text_of(part: Part) -> bytes:
    """Return the text that has been received as a part, which may have come as a file."""
    if isinstance(part, bytes):
        return part
    with open(part, "rb") as file:
        file.seek(0)
        return file.read()


class CannotExecute(Exception):
    """A server cannot be started: the error number (0 for none) and its text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)
        self.number = number
        self.text = text

    @classmethod
    def of(cls, error: BaseException) -> Self:
        number, text = getattr(error, "errno", None), getattr(error, "strerror", None)
        return cls(number or 0, text or str(error))


class Helper(Protocol):
    """The process that was started to become a keeper."""

    def wait(self) -> object:
        """Reap it; called once the keeper has said hello, or was killed."""

    def kill(self) -> None: ...


class Tree(Protocol):
    """One server at a time, with everything that it started.

    Attributes:
        contains: Whether nothing can leave the tree, so that `is_empty` is a proof.
        leader: The pid of the server, until it has been reaped.
        exit_fd: To be waited for until the server has exited; None where a signal tells, or where
            that must be polled.
    """

    contains: bool
    leader: int | None

    @property
    def exit_fd(self) -> int | None: ...

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        """Start a server in an empty tree and return its pid; raises `CannotExecute`.

        Args:
            spec: `argv`, `env`, and `cwd`, the working directory of the host.
        """

    def signal(self, signum: int) -> None:
        """Send a signal to everything, once each."""

    def exit_status(self) -> tuple[bool, int | None]:
        """Return whether the last server has exited, and its status: negative for a signal, None if
        another part of the program has taken it. This does not reap it.
        """

    def reap_orphans(self) -> None:
        """Reap what has ended, except the server itself."""

    def is_empty(self) -> bool:
        """Reap what has ended, the server last, and return whether nothing is left."""

    def pids(self) -> list[int]:
        """Return what is running."""
