"""Hub models: what the cache holds of a model, and the download of the rest.

The files are chosen here. A child process (fetcher.py) talks to the Hub, so a cancel is a kill,
whatever it blocks on. A file counts as whole only after it was hashed once; a record of that holds
while its size, time and inode stay.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

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
from orchestrator.models.hub.records import UNKNOWN, Listing, Records, key_of
from orchestrator.models.local import identity_of, role_of
from orchestrator.models.variants import Chosen, Variant
from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.reference import split_reference
from orchestrator.settings.request import LoadRequest

FRESHNESS_S: Final = 2.0  # for the Hub to say that a cached revision is the newest
LISTING_S: Final = 20.0  # for the Hub to list a repo for `variants`
RECENT_S: Final = 60.0  # for a plan to use an answer of the Hub
_MAX_BYTES: Final = 1 << 50
_ANSWERS: Final = frozenset(  # of the Hub, for which what is whole in the cache is used
    {"hub_unreachable", "hub_rate_limited", "hub_error", "hub_corrupt", "cache_dir"}
    | {"hub_unauthorized", "hub_gated", "model_not_found"}
)
_log = event_log("orchestrator.download")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of one commit that make a model."""

    repo: CachedRepo
    revision: str | None  # as requested
    commit: str
    chosen: Chosen
    listing: Listing  # empty if another tool fetched the files

    def path(self, name: str) -> Path:
        return self.repo.path(self.commit, name)

    def size_and_etag(self, name: str) -> tuple[int, str]:
        listed = self.listing.get(name, UNKNOWN)
        return self.repo.size_and_etag(self.commit, name) if listed == UNKNOWN else listed

    def identities(self) -> list[FileIdentity]:
        """Return the files as they are on disk; none unless all are there with the right size."""
        found: list[FileIdentity] = []
        for name in self.chosen.files:
            with contextlib.suppress(OSError):
                file = identity_of(self.path(name), keeps_name=True)
                if file.size_bytes == self.size_and_etag(name)[0]:
                    found.append(file)
        return found if len(found) == len(self.chosen.files) else []

    def model(self) -> ModelFiles:
        """Return the model, without weights unless all is on disk; InvalidModel if not a GGUF."""
        found = self.identities()
        for file in found:
            gguf_file.inspect(file)
        parts = len(self.chosen.weights)
        hub = HubModel(self.repo.name, self.revision, self.commit)
        projector = next(iter(found[parts:]), None)
        sizes = () if found else (self.size_and_etag(name)[0] for name in self.chosen.files)
        variant, listed_bytes = self.chosen.variant, sum(sizes)
        return ModelFiles(tuple(found[:parts]), projector, variant, hub, listed_bytes=listed_bytes)

    def cached_model(self) -> ModelFiles | None:
        """Return the model if all of it is on disk and each file is a GGUF by its header."""
        with contextlib.suppress(InvalidModel):
            return model if (model := self.model()).is_on_disk else None
        return None


class RequestedModel:
    """The model of one request, on the Hub and in its cache. Methods with a token block."""

    def __init__(self, request: LoadRequest, records: Records) -> None:
        repo, variant = split_reference(request.model_path) or (request.model_path, None)
        given, revision = request.gguf_variant, request.revision
        if variant is not None and given is not None and variant.lower() != given.lower():
            message = f"gguf_variant is {given!r}, but model_path has {variant!r}: give one of them"
            raise InvalidRequest.because(message, field="gguf_variant")
        if revision is not None and not cache.is_revision(revision):
            message = f"revision {revision[:99]!r} is not a branch, a tag or a commit: check it"
            raise InvalidRequest.because(message, field="revision")
        self._request = request
        self._records = records
        self._repo = repo
        self._variant = variant or given

    def look_up(self) -> ModelFiles:
        """Return the model as it is in the cache, without weights unless it is whole there."""
        wanted = self._cached()
        if wanted is not None and (files := wanted.cached_model()) is not None:
            is_settled = self._needs_no_hub(wanted)
            return replace(files, hub=replace(cast("HubModel", files.hub), is_settled=is_settled))
        hub = HubModel(self._repo, self._request.revision, is_settled=False)
        return ModelFiles((), None, self._variant, hub)

    def look_up_at(self, running: ModelFiles) -> ModelFiles | None:
        """Return the variant and commit that run, if they are whole in the cache."""
        hub = cast("HubModel", running.hub)
        with contextlib.suppress(ModelNotFound):
            wanted = self._wanted(cache.place(hub.repo), cast("str", hub.commit), running.variant)
            return wanted.cached_model()
        return None

    def recent(self, since: float = 0.0) -> ModelFiles | None:
        """Return what `resolve` returned for an equal request in the last minute, for display."""
        at, answer = self._records.answers.get(self._question(), (0.0, None))
        return answer if at >= max(since, time.monotonic() - RECENT_S) else None

    def resolve(self, token: CancelToken, progress: FetchProgress | None = None) -> ModelFiles:
        """Ask the Hub what the model is and whether it can be fetched.

        A model that is whole in the cache is returned without a request if it is pinned or offline,
        and with a note if the Hub does not answer with a model.
        """
        _check_token(token)
        known = self._cached()
        files = known.cached_model() if known else None
        if known and files and self._needs_no_hub(known):
            return files
        if cache.is_offline():
            raise self._not_cached()
        try:
            wanted = self._ask(token, progress or FetchProgress(), is_patient=files is None)
            answer = wanted.model()
        except OrchestratorError as error:
            answer = _fall_back(files, error)
        self._records.answers[self._question()] = time.monotonic(), answer
        return answer

    def fetch(
        self, token: CancelToken, progress: FetchProgress, resolved: ModelFiles | None = None
    ) -> ModelFiles:
        """Make the model whole on disk: the answer of `resolve`, which is called first if None."""
        _check_token(token)
        if resolved is None or not (resolved.is_resolved and resolved.is_settled):
            resolved = self.resolve(token, progress)
        hub, variant = cast("HubModel", resolved.hub), resolved.variant
        repo, commit = cache.place(hub.repo), cast("str", hub.commit)
        wanted = self._wanted(repo, commit, variant)
        if wanted.cached_model() is not None:
            try:
                files = self._complete(wanted, token, progress, is_offline=True)
                return replace(files, hub=hub)  # with the note of the answer
            except HubCorrupt:
                if cache.is_offline():
                    raise
                if not wanted.listing:  # the damaged file is set aside: ask what it should be
                    pinned = replace(self._request, revision=commit)
                    RequestedModel(pinned, self._records).resolve(token, progress)
                    wanted = self._wanted(repo, commit, variant)
        try:
            return self._complete(wanted, token, progress)
        except OrchestratorError as error:
            older = self._cached()
            has_run = resolved.is_on_disk  # it is restarted, or restored: no other commit will do
            if has_run or older is None or older.commit == wanted.commit:
                raise
            files = _fall_back(older.cached_model(), error)
            self._complete(older, token, progress, is_offline=True)
            return files

    def variants(self, token: CancelToken) -> list[Variant]:
        """Return the variants of the repo; those in the cache where the Hub lists none."""
        repo = self._repo
        try:
            if cache.is_offline():
                raise self._not_cached()
            with FetchProcess(self._request, repo, token, FetchProgress()) as fetcher:
                cached, commit, listing = self._accept(fetcher.listing(LISTING_S))
        except OrchestratorError as error:
            known = cache.find_commit(repo, self._request.revision)
            names = known[0].names(known[1]) if known else []
            if not known or not names or error.problem.category not in _ANSWERS:
                raise
            cached, commit = known
            listing = {name: cached.size_and_etag(commit, name) for name in names}
        role = _roles(cached, commit, listing)
        found, default = variants.every(listing, where=repo, role=role)
        listed = []
        for chosen in found:
            wanted = Wanted(cached, None, commit, chosen, listing)
            sizes = [wanted.size_and_etag(name) for name in chosen.files]
            size = None if cache.ABSENT in sizes else sum(size for size, _ in sizes)
            is_cached = bool(wanted.identities())
            listed.append(Variant(chosen.variant, size, chosen is default, is_cached))
        return listed

    def _cached(self) -> Wanted | None:
        """Return the files of the model in the cache, if its commit and variant are known."""
        if (known := cache.find_commit(self._repo, self._request.revision)) is not None:
            with contextlib.suppress(ModelNotFound):
                return self._wanted(*known, self._variant)
        return None

    def _wanted(self, repo: CachedRepo, commit: str, variant: str | None) -> Wanted:
        """Choose from the listing of a commit, or else from the files that are in the cache."""
        return self._choose(repo, commit, variant, self._records.listing(repo.name, commit))

    def _choose(
        self, repo: CachedRepo, commit: str, variant: str | None, listing: Listing
    ) -> Wanted:
        names, role = listing or repo.names(commit), _roles(repo, commit, listing)
        chosen = variants.choose(names, variant, where=self._repo, role=role)
        if self._request.mmproj_path is not None:
            chosen = replace(chosen, projector=None)
        return Wanted(repo, self._request.revision, commit, chosen, listing)

    def _needs_no_hub(self, wanted: Wanted) -> bool:
        """A commit never changes; but the preferred variant is unknown without a listing."""
        is_settled = bool(wanted.listing) or self._variant is not None
        return cache.is_offline() or (cache.is_commit(wanted.revision) and is_settled)

    def _ask(self, token: CancelToken, progress: FetchProgress, *, is_patient: bool) -> Wanted:
        """Request the list of files, choose, and check that what is missing can be fetched."""
        request = self._request
        tries, within_s = (None, None) if is_patient else (1, FRESHNESS_S)
        with FetchProcess(request, self._repo, token, progress, listing_tries=tries) as fetcher:
            repo, commit, listing = self._accept(fetcher.listing(within_s))
            wanted = self._choose(repo, commit, self._variant, listing)
            unknown = [n for n in wanted.chosen.files if wanted.size_and_etag(n) == cache.ABSENT]
            if unknown:
                files = {"repo": repo.name, "commit": commit, "unknown": unknown}
                found = fetcher.about(files, within_s)
                wanted = replace(wanted, listing=self._complement(wanted, found))
            fetcher.check(self._job(wanted), within_s)
        return wanted

    def _accept(self, answer: dict[str, Any]) -> tuple[CachedRepo, str, Listing]:
        """Record a listing, without anything that could lead out of the cache."""
        repo, commit, name = self._repo, str(answer["commit"]), str(answer["repo"])
        if not cache.is_commit(commit):
            message = "the Hub's answer cannot be used (it has no commit): try again later"
            raise HubUnreachable.because(message)
        known, listing = self._records.listing(repo, commit), {}
        for file, (size, etag) in answer["files"].items():
            if cache.is_file_name(file):
                if size is None or etag is None:  # a mirror need not list them
                    listing[file] = known.get(file, UNKNOWN)
                elif _is_usable(size, etag):
                    listing[file] = size, etag
        self._records.add_listing(repo, commit, listing)
        spelled = name if name.lower() == repo.lower() else repo
        return cache.find(repo) or cache.place(spelled), commit, listing

    def _complement(self, wanted: Wanted, found: dict[str, Any]) -> Listing:
        """Record what a listing lacked, as the Hub said for each file."""
        listing = {**wanted.listing}
        for name, (size, etag) in found.items():
            if not _is_usable(size, etag):
                what = f"it has no size or no hash of {name}"
                message = f"the Hub's answer cannot be used ({what}): try another HF_ENDPOINT"
                raise HubUnreachable.because(message)
            listing[name] = size, etag
        self._records.add_listing(wanted.repo.name, wanted.commit, listing)
        return listing

    def _complete(
        self,
        wanted: Wanted,
        token: CancelToken,
        progress: FetchProgress,
        *,
        is_offline: bool = False,
    ) -> ModelFiles:
        """Fetch missing files, hash those that were never hashed, and return the model."""
        job, repo = self._job(wanted), wanted.repo.name

        def add_hashed(name: str) -> None:
            self._records.add_hashed(wanted.path(name), wanted.size_and_etag(name)[1])

        if not is_offline or any(file["verify"] for file in job["files"]):
            with FetchProcess(
                self._request, repo, token, progress, is_offline=is_offline, lists=False
            ) as fetcher:
                fetcher.fetch(job, add_hashed)
        if not (files := wanted.model()).is_on_disk:
            message = f"{repo} was removed while it was downloaded: check what cleans the cache"
            raise CacheDirError.because(message, field="model_path")
        first, named = wanted.chosen.weights[0], (self._variant or files.variant or "").lower()
        is_by_path = named in {first.lower(), first[:-5].lower()}
        role = role_of(wanted.path(first))
        if role not in {None, variants.MODEL} and not is_by_path:
            message = f"{first} of {repo} is no model by its header ({role}): load another variant"
            raise InvalidModel.because(message, field="gguf_variant")
        progress.bytes_done = progress.bytes_total = files.size_bytes
        return files

    def _job(self, wanted: Wanted) -> dict[str, Any]:
        """Return a job for the fetcher, which also hashes files that were never hashed."""
        files = []
        for name in wanted.chosen.files:
            size, etag = wanted.size_and_etag(name)
            paths = wanted.path(name), wanted.repo.root / "blobs" / etag
            is_hashed = any(self._records.is_hashed(path, etag) for path in paths)
            files.append({"name": name, "size": size, "etag": etag, "verify": not is_hashed})
        revision = wanted.revision or cache.DEFAULT_REVISION
        return {
            "repo": wanted.repo.name,
            "root": str(wanted.repo.root),
            "commit": wanted.commit,
            "revision": None if cache.is_commit(revision) else revision,
            "files": files,
        }

    def _question(self) -> str:
        """Return a key for a question to the Hub; a hash, because the token is part of it."""
        request, variant = self._request, self._variant
        parts = variant and variant.lower(), request.revision, bool(request.mmproj_path)
        return key_of(self._repo.lower(), *parts, request.hf_token)

    def _not_cached(self) -> HubUnreachable:
        known = cache.find_commit(self._repo, self._request.revision)
        names = sorted(known[0].names(known[1])) if known else []
        found = ", ".join(name for name in names if name.endswith(".gguf"))[:1000] or "no model"
        variant = self._variant or "the preferred variant"
        revision = self._request.revision or cache.DEFAULT_REVISION
        return HubUnreachable.because(
            f"{variant} of {self._repo} at {revision} is not completely cached (cached: "
            f"{found}), and HF_HUB_OFFLINE is set: unset it, or request a cached variant",
            field="model_path",
            reason="offline",
        )


def _check_token(token: CancelToken) -> None:
    if token.is_set():
        raise Cancelled.because("the download was cancelled")


def _is_usable(size: object, etag: object) -> bool:
    return cache.is_etag(etag) and isinstance(size, int) and 0 <= size < _MAX_BYTES


def _roles(repo: CachedRepo, commit: str, listing: Listing) -> variants.RoleOf:
    """Return what files are by their headers, where they are in the cache."""

    def role(name: str) -> str | None:
        path = repo.path(commit, name)
        if not path.exists() and listing.get(name, UNKNOWN) != UNKNOWN:
            path = repo.root / "blobs" / listing[name][1]
        return role_of(path)

    return role


def _fall_back(files: ModelFiles | None, error: OrchestratorError) -> ModelFiles:
    """Return a cached model with a note, if there is one, whatever the Hub answered."""
    if files is None or files.hub is None or error.problem.category not in _ANSWERS:
        raise error
    _log("warning", "hub.fell_back", repo=files.hub.repo, reason=error.message)
    note = f"the cached revision is used: {error.message}"
    return replace(files, hub=replace(files.hub, note=note))
