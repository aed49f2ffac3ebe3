"""Where a model comes from: a file or folder of this machine, or the Hub. Decided here, once.

`look_up` reads the disk and asks nobody, `resolve` asks the Hub what a model is, `fetch` makes it
whole on disk. What a request is about is local if something of that name is there, and the Hub's
if it could be a repo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from orchestrator.base.paths import PathNames
from orchestrator.base.tokens import CancelToken
from orchestrator.errors import InvalidRequest, naming
from orchestrator.models import local
from orchestrator.models.hub.download import Hub, is_hub
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.roots import ModelRoots
from orchestrator.models.variants import Variant
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest


class ModelSource:
    """The models one orchestrator can load.

    Args:
        records: Folder for what is worth keeping about Hub models.
        roots: Folders that local models are confined to; None = anywhere.
    """

    def __init__(self, records: Path, roots: ModelRoots | None) -> None:
        self._hub = Hub(records)
        self._roots = roots

    def look_up(self, request: LoadRequest) -> ModelFiles:
        """Return the files of a model, or where it comes from if it is not here yet.

        Raises:
            ModelNotFound, InvalidModel, InvalidRequest: names the field.
        """
        with self._naming(request) as names:
            if self._is_on_hub(request):
                files = self._with_projector(self._hub.look_up(request), request)
            elif request.revision is not None:
                message = f"revision is of a Hub model, and {request.model_path} is not one"
                raise InvalidRequest.because(message, field="revision")
            else:
                files = local.locate(request, self._roots)
        return replace(files, names=(*names, *files.names))

    def resolve(
        self, request: LoadRequest, token: CancelToken, progress: FetchProgress | None = None
    ) -> ModelFiles:
        """Ask the Hub what the model is and whether it may be had; see `Hub.resolve`."""
        with self._naming(request) as names:
            files = self._with_projector(self._hub.resolve(request, token, progress), request)
        return replace(files, names=(*names, *files.names))

    def recent(self, request: LoadRequest) -> ModelFiles | None:
        """Return what `resolve` has answered within the last minute, for display."""
        answer = self._hub.recent(request)
        return answer and self._with_projector(answer, request)

    def fetch(
        self,
        request: LoadRequest,
        token: CancelToken,
        progress: FetchProgress,
        known: ModelFiles,
    ) -> ModelFiles:
        """Make the model whole on disk, and look at local files again: they may have been replaced
        since the load was accepted. See `Hub.fetch`.
        """
        with self._naming(request) as names:
            if known.hub is None:
                files, projector = local.locate(request, self._roots), None
            else:
                projector = local.given_projector(request, self._roots)  # nothing fetched without
                files = self._hub.fetch(request, token, progress, known)
        names = (*names, *files.names)
        return replace(files, projector=projector or files.projector, names=names)

    def variants(self, request: LoadRequest, token: CancelToken) -> list[Variant]:
        """Return what a model could be loaded as; see `Hub.variants`."""
        with self._naming(request):
            if self._is_on_hub(request):
                return self._hub.variants(request, token)
            return local.variants_of(request, self._roots)

    def check_args(self, args: tuple[str, ...]) -> None:
        """Refuse extra args that name files outside of the allowed folders.

        Raises:
            RefusedArgument: names the flag.
        """
        if self._roots is not None:
            self._roots.check_args(args)

    @contextlib.contextmanager
    def _naming(self, request: LoadRequest) -> Iterator[PathNames]:
        """Yield what the paths of a request are called; what goes wrong inside carries that too."""
        names = local.names_of(request.model_path, "model_path", self._roots)
        if request.mmproj_path is not None:
            names += local.names_of(request.mmproj_path, "mmproj_path", self._roots)
        with naming(names):
            yield names

    def _is_on_hub(self, request: LoadRequest) -> bool:
        is_local = local.is_local(request.model_path, self._roots)
        return not is_local and is_hub(request.model_path)

    def _with_projector(self, files: ModelFiles, request: LoadRequest) -> ModelFiles:
        projector = local.given_projector(request, self._roots)
        return files if projector is None else replace(files, projector=projector)
