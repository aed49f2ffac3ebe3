"""A model's files on disk, and where on the Hub they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record


@dataclass(frozen=True, slots=True)
class FileIdentity(Record):
    """A file as the kernel identifies it: a replaced file is another file."""

    path: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class HubModel(Record):
    """Where on the Hub a model comes from.

    Attributes:
        repo: `owner/name`, without regard to case.
        revision: As requested; None = the default branch.
        commit: The commit of that revision, once known.
        is_settled: Whether the Hub has answered, or need not be asked.
        note: A remark for the caller, e.g. that the Hub could not be reached.
    """

    repo: str
    revision: str | None = None
    commit: str | None = None
    is_settled: bool = True
    note: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ModelFiles(Record):
    """Every shard of a model in order, and the projector of a vision model.

    Attributes:
        weights: Empty for a Hub model that is not downloaded.
        variant: The resolved variant; the requested one until the Hub has answered.
        names: Public names of these paths, see `base.paths`.
        listed_bytes: What the Hub said that all files have, while they are not downloaded; 0 if it
            has not said so.
    """

    weights: tuple[FileIdentity, ...]
    projector: FileIdentity | None = None
    variant: str | None = None
    hub: HubModel | None = None
    names: PathNames = field(default=(), compare=False, repr=False)
    listed_bytes: int = field(default=0, compare=False)

    @property
    def is_on_disk(self) -> bool:
        return bool(self.weights)

    @property
    def is_resolved(self) -> bool:
        """Whether it is known which files these are, downloaded or not."""
        return self.hub is None or self.hub.commit is not None

    @property
    def is_settled(self) -> bool:
        """Whether the Hub need not be asked before a server is stopped for this model."""
        return self.hub is None or self.hub.is_settled

    @property
    def name(self) -> str:
        """The repo, or the path of the first file."""
        return self.hub.repo.lower() if self.hub is not None else self.weights[0].path

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return (*self.weights, *filter(None, (self.projector,)))

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)
