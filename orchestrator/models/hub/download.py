"""Hub models: what of one is in the cache, and the rest of it, fetched.

The choice of files is made here; the Hub is spoken to by a child process (fetcher.py), so that a
cancel is a kill, in any phase and whatever it hangs in. Nothing is believed to be whole that was
not hashed once: what has been is written down, by size, time and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from orchestrator.base.json_file import write_json
from orchestrator.base.log import event_log
from orchestrator.base.tokens import CancelToken
from orchestrator.errors import (
    CacheDirError,
    Cancelled,
    HubCorrupt,
    HubUnreachable,
    InvalidModel,
    InvalidRequest,
    ModelNotFound,
    OrchestratorError,
)
from orchestrator.models import gguf_file, variants
from orchestrator.models.hub import cache
from orchestrator.models.hub.cache import CachedRepo
from orchestrator.models.hub.fetch_process import FetchProcess, FetchProgress
from orchestrator.models.local import identity_of
from orchestrator.models.variants import Variant
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.reference import split_reference
from orchestrator.settings.request import LoadRequest

FRESHNESS_S: Final = 2.0
"""How long the Hub may take to say that a cached revision is the newest."""

RECENT_S: Final = 60.0
"""How long a plan may use what the Hub has said."""

LISTING_S: Final = 20.0
"""How long the Hub may take to say what is in a repo, when nothing but that is asked."""

_MAX_BYTES: Final = 1 << 50
_MAX_ANSWERS: Final = 64
_K = TypeVar("_K")
_V = TypeVar("_V")
_FALLS_BACK: Final = frozenset({"hub_unreachable", "hub_rate_limited", "hub_error"})
_log = event_log("orchestrator.download")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of one commit that make a model."""

    repo: CachedRepo
    commit: str
    chosen: variants.Chosen
    listed: Mapping[str, tuple[int, str]]  # name -> size and etag; empty if nobody wrote it down

    @property
    def names(self) -> tuple[str, ...]:
        return _names(self.chosen)

    def size_and_etag(self, name: str) -> tuple[int, str]:
        return self.listed.get(name) or self.repo.size_and_etag(self.commit, name)


class Hub:
    """The Hub as one orchestrator sees it.

    Args:
        records: Folder of our own, for listings and for what was hashed.
    """

    def __init__(self, records: Path) -> None:
        self._records = records
        self._listed: dict[tuple[str, str], dict[str, tuple[int, str]]] = {}
        self._answers: dict[str, tuple[float, ModelFiles]] = {}

    # ----------------------------------------------------------------------- without the network

    def look_up(self, request: LoadRequest) -> ModelFiles:
        """Return the model as the cache has it; one that is not whole there has no weights.

        Raises:
            InvalidRequest: the request contradicts itself (field `gguf_variant` or `revision`).
        """
        repo, variant = _reference(request)
        wanted = self._cached(repo, variant, request)
        if wanted is not None and (files := _on_disk(wanted, request)) is not None:
            is_settled = _needs_no_hub(wanted, request, variant)
            return replace(files, hub=files.hub and replace(files.hub, is_settled=is_settled))
        return ModelFiles((), None, variant, HubModel(repo, request.revision, is_settled=False))

    def _cached(self, repo: str, variant: str | None, request: LoadRequest) -> Wanted | None:
        """Return what would be used of what is known: by the listing of the commit if there is
        one, else by the files another tool has put there.
        """
        cached = cache.find(repo)
        commit = cached.commit(request.revision) if cached else None
        if cached is None or commit is None:
            return None
        with contextlib.suppress(ModelNotFound):
            return self._wanted(cached, commit, variant, request)
        return None

    # ---------------------------------------------------------------------------- with the network

    def resolve(
        self, request: LoadRequest, token: CancelToken, progress: FetchProgress | None = None
    ) -> ModelFiles:
        """Ask the Hub what the model is, and whether it may be had; nothing of it is fetched.

        Its commit and variant are known then; it has weights if it is whole here. A whole cached
        revision is taken without any network when it is pinned or offline, and when the Hub cannot
        be asked; its note says so. Blocks; ends early when the token is set.

        Raises:
            Cancelled: the token was set.
            ModelNotFound, HubError, DiskFull, Stalled: see `orchestrator.errors`.
        """
        _check_token(token)
        repo, variant = _reference(request)
        known = self._cached(repo, variant, request)
        files = _on_disk(known, request) if known else None
        if known and files and _needs_no_hub(known, request, variant):
            return files
        if cache.is_offline():
            raise _not_cached(repo, variant, request)
        try:
            answer = self._asked(request, token, progress, is_patient=files is None)
        except OrchestratorError as error:
            answer = _fallen_back(files, error)
        _remember(self._answers, _question(request), (time.monotonic(), answer))
        return answer

    def recent(self, request: LoadRequest) -> ModelFiles | None:
        """Return what the Hub said of this model within the last minute, for display."""
        at, answer = self._answers.get(_question(request), (0.0, None))
        return answer if time.monotonic() - at <= RECENT_S else None

    def fetch(
        self,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress,
        resolved: ModelFiles | None = None,
    ) -> ModelFiles:
        """Make the model whole on disk, and return it. Blocks; ends early when the token is set.

        Args:
            resolved: What `resolve` has answered: just that is fetched, and the Hub is not asked
                again what it is. Without an answer it is asked first.

        Raises:
            Cancelled: the token was set.
            ModelNotFound, HubError, DiskFull, Stalled: see `orchestrator.errors`.
        """
        _check_token(token)
        model = resolved
        if model is None or not (model.is_resolved and model.is_settled):
            model = self.resolve(request, token, progress)
        hub = cast("HubModel", model.hub)
        place, commit = cache.place(hub.repo), cast("str", hub.commit)
        wanted = self._wanted(place, commit, model.variant, request)
        if (files := _on_disk(wanted, request)) is not None:
            try:
                found = self._verified(wanted, files, request, token, progress)
            except HubCorrupt:
                if cache.is_offline():
                    raise
                if not wanted.listed:  # it has been set aside, and nobody has noted what it was
                    pinned = replace(request, revision=commit)
                    self._asked(pinned, token, progress, is_patient=True)
                    wanted = self._wanted(place, commit, model.variant, request)
            else:  # as it was answered, with its note
                return replace(found, hub=hub)
        try:
            return self._fetched(wanted, request, token, progress)
        except OrchestratorError as error:
            older = self._cached(*_reference(request), request)
            if older is None or older.commit == wanted.commit:
                raise
            found = _fallen_back(_on_disk(older, request), error)
            return self._verified(older, found, request, token, progress)

    def variants(self, request: LoadRequest, token: CancelToken) -> list[Variant]:
        """Return what a load of this repo could choose from. Blocks, `LISTING_S` at most.

        Offline, and when the Hub cannot be asked: what of it is whole in the cache.

        Raises:
            Cancelled: the token was set.
            ModelNotFound, HubError: as `fetch`.
        """
        repo, _ = _reference(request)
        try:
            if cache.is_offline():
                raise _not_cached(repo, None, request)
            with FetchProcess(request, repo, token, FetchProgress()) as fetcher:
                cached, commit, listed = self._noted(fetcher.listing(LISTING_S), repo)
        except OrchestratorError as error:
            known = cache.find(repo)
            at = known.commit(request.revision) if known else None
            names = known.names(at) if known and at else []
            if not known or not at or not names or error.problem.category not in _FALLS_BACK:
                raise
            cached, commit = known, at
            listed = {name: known.size_and_etag(at, name) for name in names}
        found, default = variants.every(listed, where=repo)
        return [
            Variant(
                chosen.variant,
                sum(listed[name][0] for name in _names(chosen)),
                is_default=chosen is default,
                is_cached=_identities(Wanted(cached, commit, chosen, listed)) is not None,
            )
            for chosen in found
        ]

    def _asked(
        self,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress | None,
        *,
        is_patient: bool,
    ) -> ModelFiles:
        """Ask for the list of files, and whether what is missing of the chosen ones may be had."""
        repo, variant = _reference(request)
        tries, within_s = (None, None) if is_patient else (1, FRESHNESS_S)
        seen = progress or FetchProgress()
        with FetchProcess(request, repo, token, seen, listing_tries=tries) as fetcher:
            cached, commit, listed = self._noted(fetcher.listing(within_s), repo)
            wanted = Wanted(cached, commit, _choose(listed, variant, request), listed)
            fetcher.check(self._order(wanted, request), within_s)
        found = _identities(wanted)
        if found is not None:
            return _model(wanted, found, request)
        hub = HubModel(wanted.repo.repo, request.revision, commit)
        return ModelFiles((), None, wanted.chosen.variant, hub)

    def _wanted(
        self, cached: CachedRepo, commit: str, variant: str | None, request: LoadRequest
    ) -> Wanted:
        """Return the files of a variant at a commit.

        Raises:
            ModelNotFound: as far as is known here, there is no such variant.
        """
        listed = self._listing(cached.repo, commit)
        names = listed or dict.fromkeys(cached.names(commit))
        return Wanted(cached, commit, _choose(names, variant, request), listed)

    def _fetched(
        self, wanted: Wanted, request: LoadRequest, token: CancelToken, progress: FetchProgress
    ) -> ModelFiles:
        repo = wanted.repo.repo
        with FetchProcess(request, repo, token, progress, lists=False) as fetcher:
            fetcher.fetch(self._order(wanted, request), self._note_verified(wanted))
        found = _identities(wanted)
        if found is None:
            message = f"{repo} was fetched and is gone: does another program clean the cache?"
            raise CacheDirError.because(message, field="model_path")
        return _model(wanted, found, request)

    def _verified(
        self,
        wanted: Wanted,
        files: ModelFiles,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress,
    ) -> ModelFiles:
        """Return files of the cache, hashed once; what other tools fetched nobody has hashed."""
        order = self._order(wanted, request)
        if any(file["verify"] for file in order["files"]):
            repo = wanted.repo.repo
            with FetchProcess(request, repo, token, progress, is_offline=True) as fetcher:
                fetcher.fetch(order, self._note_verified(wanted))
        progress.bytes_done = progress.bytes_total = files.size_bytes
        return files

    def _noted(
        self, listing: dict[str, Any], repo: str
    ) -> tuple[CachedRepo, str, dict[str, tuple[int, str]]]:
        """Write a listing down; believe nothing of it that could lead out of the cache."""
        commit, name = listing["commit"], str(listing["repo"])
        if not cache.is_commit(commit):
            raise HubUnreachable.because("the Hub's answer makes no sense (no commit): try again")
        listed = {
            name: (size, etag)
            for name, (size, etag) in listing["files"].items()
            if cache.is_file_name(name)
            and cache.is_etag(etag)
            and isinstance(size, int)
            and 0 <= size < _MAX_BYTES
        }
        if (cached := cache.find(repo)) is None:
            cached = cache.place(name if name.lower() == repo.lower() else repo)
        _remember(self._listed, (repo.lower(), commit), listed)  # also where no note can be written
        write_json(self._listing_file(repo, commit), {"files": listed})
        return cached, commit, listed

    def _order(self, wanted: Wanted, request: LoadRequest) -> dict[str, Any]:
        """Say what to fetch: what has not been hashed by anybody yet is to be verified."""
        files = []
        for name in wanted.names:
            size, etag = wanted.size_and_etag(name)
            paths = wanted.repo.path(wanted.commit, name), wanted.repo.blob(etag)
            known = any(self._is_verified(path, etag) for path in paths)
            files.append({"name": name, "size": size, "etag": etag, "verify": not known})
        return {
            "repo": wanted.repo.repo,
            "root": str(wanted.repo.root),
            "commit": wanted.commit,
            "revision": None
            if cache.is_commit(request.revision)
            else request.revision or cache.DEFAULT_REVISION,
            "files": files,
        }

    # ------------------------------------------------------------------------------ our own notes

    def _listing_file(self, repo: str, commit: str) -> Path:
        return self._records / f"{_key(repo.lower(), commit)}.json"

    def _listing(self, repo: str, commit: str) -> dict[str, tuple[int, str]]:
        if (known := self._listed.get((repo.lower(), commit))) is not None:
            return known
        damaged = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
        with contextlib.suppress(OSError, *damaged):
            text = self._listing_file(repo, commit).read_text(encoding="utf-8")
            files = json.loads(text)["files"]
            return {str(name): (int(size), str(etag)) for name, (size, etag) in files.items()}
        return {}

    def _is_verified(self, path: Path, etag: str) -> bool:
        mark = self._mark(path, etag)
        return mark is not None and mark.exists()

    def _note_verified(self, wanted: Wanted) -> Callable[[str], None]:
        def note(name: str) -> None:
            path = wanted.repo.path(wanted.commit, name)
            _, etag = wanted.size_and_etag(name)
            if (mark := self._mark(path, etag)) is not None:
                write_json(mark, {"name": name})

        return note

    def _mark(self, path: Path, etag: str) -> Path | None:
        """Return the note that says that this very file was hashed."""
        with contextlib.suppress(OSError):
            at = path.stat()
            key = _key(etag, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns)
            return self._records / f"{key}.hashed"
        return None


# ---------------------------------------------------------------------------------------- helpers


def _check_token(token: CancelToken) -> None:
    if token.is_set():
        raise Cancelled.because("the download was cancelled")


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    """Keep a value, and forget the oldest."""
    known[key] = value
    for old in list(known)[:-_MAX_ANSWERS]:
        known.pop(old, None)


def _question(request: LoadRequest) -> str:
    """What the Hub is asked by a request, and by whom; a hash, so that no token is kept."""
    repo, variant = _reference(request)
    projector = request.mmproj_path and "given"
    asked = variant and variant.lower(), request.revision, projector, request.hf_token
    return _key(repo.lower(), *asked)


def _fallen_back(files: ModelFiles | None, error: OrchestratorError) -> ModelFiles:
    """Return what is cached, with a note that says why; raise where that is no way out."""
    if files is None or files.hub is None or error.problem.category not in _FALLS_BACK:
        raise error
    _log("warning", "hub.fell_back", repo=files.hub.repo, reason=error.message)
    note = f"the cached revision is used: {error.message}"
    return replace(files, hub=replace(files.hub, note=note))


def is_hub(model_path: str) -> bool:
    """Could this be a repo on the Hub?"""
    return split_reference(model_path) is not None


def _names(chosen: variants.Chosen) -> tuple[str, ...]:
    """Every file of a variant, the projector last."""
    return (*chosen.weights, *filter(None, (chosen.projector,)))


def _reference(request: LoadRequest) -> tuple[str, str | None]:
    """Return the repo and the variant that was asked for.

    Raises:
        InvalidRequest: two different variants, or a revision that cannot be one.
    """
    repo, variant = split_reference(request.model_path) or (request.model_path, None)
    given = request.gguf_variant
    if variant is not None and given is not None and variant.lower() != given.lower():
        raise InvalidRequest.because(
            f"gguf_variant is {given!r}, and model_path says {variant!r}: give one of them",
            field="gguf_variant",
        )
    if request.revision is not None and not cache.is_revision(request.revision):
        raise InvalidRequest.because(
            "revision is no branch, tag or commit of the Hub: check it", field="revision"
        )
    return repo, variant or given


def _choose(
    names: Mapping[str, object], variant: str | None, request: LoadRequest
) -> variants.Chosen:
    where, _ = _reference(request)
    chosen = variants.choose(names, variant, where=where)
    return replace(chosen, projector=None) if request.mmproj_path is not None else chosen


def _needs_no_hub(wanted: Wanted, request: LoadRequest, variant: str | None) -> bool:
    """A commit never changes; but which variant is meant, a part of one cannot tell."""
    is_settled = bool(wanted.listed) or variant is not None
    return cache.is_offline() or (cache.is_commit(request.revision) and is_settled)


def _not_cached(repo: str, variant: str | None, request: LoadRequest) -> HubUnreachable:
    cached = cache.find(repo)
    commit = cached.commit(request.revision) if cached else None
    names = sorted(cached.names(commit)) if cached and commit else []
    found = ", ".join(name for name in names if name.endswith(".gguf"))[:1000] or "nothing"
    revision = request.revision or cache.DEFAULT_REVISION
    return HubUnreachable.because(
        f"{variant or 'the preferred variant'} of {repo} at {revision} is not "
        f"whole in the cache, which has {found}; HF_HUB_OFFLINE is set: unset it, or name what is "
        "there",
        field="model_path",
        reason="offline",
    )


def _on_disk(wanted: Wanted, request: LoadRequest) -> ModelFiles | None:
    """Return the model if every file is there, of the right size and a whole GGUF by its header."""
    found = _identities(wanted)
    with contextlib.suppress(InvalidModel):
        return None if found is None else _model(wanted, found, request)
    return None


def _identities(wanted: Wanted) -> list[FileIdentity] | None:
    found: list[FileIdentity] = []
    for name in wanted.names:
        file = _identity(wanted.repo.path(wanted.commit, name))
        if file is None or file.size_bytes != wanted.size_and_etag(name)[0]:
            return None
        found.append(file)
    return found


def _model(wanted: Wanted, found: list[FileIdentity], request: LoadRequest) -> ModelFiles:
    """Raises InvalidModel: what the Hub has is not a GGUF."""
    for file in found:
        gguf_file.inspect(file, "model_path")
    weights, projector = found[: len(wanted.chosen.weights)], found[len(wanted.chosen.weights) :]
    hub = HubModel(wanted.repo.repo, request.revision, wanted.commit)
    return ModelFiles(tuple(weights), next(iter(projector), None), wanted.chosen.variant, hub)


def _identity(path: Path) -> FileIdentity | None:
    """Under its own name: llama.cpp finds the parts of a split model by the name of the first."""
    with contextlib.suppress(OSError):
        return replace(identity_of(path), path=os.path.abspath(path))
    return None


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
