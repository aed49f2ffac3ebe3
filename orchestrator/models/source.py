"""Where a model comes from: this machine or the Hub. Only this module decides it.

A `model_path` is local if something exists there; otherwise it is a repo if it can be one.
`look_up` reads the disk and sends no request, `resolve` asks the Hub, `fetch` makes a model whole
on disk. Errors are those of `RequestedModel` and `local.locate`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.base.tokens import CancelToken
from orchestrator.errors import InvalidRequest
from orchestrator.models import local
from orchestrator.models.hub.download import RequestedModel
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.hub.records import Records
from orchestrator.models.roots import ModelRoots
from orchestrator.models.variants import Variant
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.reference import split_reference
from orchestrator.settings.request import LoadRequest


class ModelSource:
    """The models that one orchestrator can load.

    Args:
        records: Folder for records about Hub models.
        roots: Folders that local models are confined to; None = anywhere.
    """

    def __init__(self, records: Path, roots: ModelRoots | None) -> None:
        self._records = Records(records)
        self._roots = roots

    def look_up(self, request: LoadRequest) -> ModelFiles:
        """Return a model as it is on disk, without weights if it has to be fetched first."""
        if (path := self._local_path(request)) is None:
            return self._with_projector(RequestedModel(request, self._records).look_up(), request)
        if request.revision is not None:
            message = f"{request.model_path} is not on the Hub: leave revision out"
            raise InvalidRequest.because(message, field="revision")
        return local.locate(path, request, self._roots)

    def resolve(
        self, request: LoadRequest, token: CancelToken, progress: FetchProgress | None = None
    ) -> ModelFiles:
        """Ask the Hub what a model is and whether it can be fetched."""
        return self._with_projector(
            RequestedModel(request, self._records).resolve(token, progress), request
        )

    def look_up_at(self, request: LoadRequest, running: ModelFiles) -> ModelFiles | None:
        """Return the model of a request at the commit that runs, if it is whole on disk."""
        answer = RequestedModel(request, self._records).look_up_at(running)
        return answer and self._with_projector(answer, request)

    def recent(self, request: LoadRequest, since: float = 0.0) -> ModelFiles | None:
        """Return what `resolve` returned within the last minute, and since then, for display.

        Args:
            since: Monotonic seconds.
        """
        answer = RequestedModel(request, self._records).recent(since)
        return answer and self._with_projector(answer, request)

    def fetch(
        self, request: LoadRequest, token: CancelToken, progress: FetchProgress, known: ModelFiles
    ) -> ModelFiles:
        """Make a model whole on disk. Local files may have changed since: look them up again."""
        if known.hub is None:
            path = local.resolve(request.model_path, "model_path", self._roots)
            return local.locate(path, request, self._roots)
        given = self._with_projector(ModelFiles(()), request)  # checked before anything is fetched
        files = RequestedModel(request, self._records).fetch(token, progress, known)
        names = (*files.names, *given.names)
        return replace(files, projector=given.projector or files.projector, names=names)

    def variants(self, request: LoadRequest, token: CancelToken) -> list[Variant]:
        """Return the variants of a model."""
        if (path := self._local_path(request)) is None:
            return RequestedModel(request, self._records).variants(token)
        return local.variants_of(path, request, self._roots)

    @property
    def is_confined(self) -> bool:
        """Whether files are allowed in the folders of an operator only."""
        return self._roots is not None

    def check_args(self, args: tuple[str, ...]) -> None:
        """Raise RefusedArgument for extra args that name files outside of the allowed folders."""
        if self._roots is not None:
            self._roots.check_args(args)

    def _local_path(self, request: LoadRequest) -> Path | None:
        """Return the path of a model; None if nothing is there and it may be a repo."""
        path = local.resolve(request.model_path, "model_path", self._roots)
        return path if path.exists() or split_reference(request.model_path) is None else None

    def _with_projector(self, files: ModelFiles, request: LoadRequest) -> ModelFiles:
        return local.with_projector(files, request, self._roots)
