"""A model on disk, as the kernel and the Hub know it: its files, and where they come from.

A replaced file is another file; what the Hub has not answered yet is said to be unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.base.paths import PathNames


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as the kernel knows it: a replaced file is another file."""

    path: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class HubModel:
    """Where on the Hub a model comes from.

    Attributes:
        repo: `owner/name`; upper and lower case mean the same.
        revision: As it was asked for; None = the default branch.
        commit: What that is, once it is known.
        is_settled: The Hub has nothing to add: it has answered, or it need not be asked.
        note: What is worth knowing about it, e.g. that the Hub could not be asked.
    """

    repo: str
    revision: str | None = None
    commit: str | None = None
    is_settled: bool = True
    note: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: every shard in order, and the projector of a vision model.

    Of a Hub model that is not here there are no weights; until the Hub has answered, the variant is
    the one that was asked for. `names` says what its paths are called where strangers see them.
    """

    weights: tuple[FileIdentity, ...]
    projector: FileIdentity | None = None
    variant: str | None = None
    hub: HubModel | None = None
    names: PathNames = field(default=(), compare=False, repr=False)

    @property
    def is_on_disk(self) -> bool:
        return bool(self.weights)

    @property
    def is_resolved(self) -> bool:
        """Is it known which files it is, be they here or not?"""
        return self.hub is None or self.hub.commit is not None

    @property
    def is_settled(self) -> bool:
        """Is there nothing left that the Hub has to be asked before a server is stopped for it?"""
        return self.hub is None or self.hub.is_settled

    @property
    def name(self) -> str:
        """What the model is called: its repo, or its first file."""
        return self.hub.repo.lower() if self.hub is not None else self.weights[0].path

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in (*self.weights, *filter(None, (self.projector,))))
