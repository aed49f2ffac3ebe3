"""The server's whole command line, from a target.

Pure. The order is stable: managed flags first, the caller's extra args last, so that an explicit
flag wins over a field (llama-server lets the last one win). Nothing secret is ever in it.
"""

from __future__ import annotations

from orchestrator.settings.fields import SETTINGS
from orchestrator.settings.flags import speculative_flags
from orchestrator.settings.target import Target


def build_argv(target: Target, *, template_file: str | None) -> tuple[str, ...]:
    """Return the server's whole command line. The port is always 0: the server picks a free one
    and the address is read from the server itself, so no picked port can be lost.

    Args:
        target: What to run; its extra args are already the effective ones.
        template_file: Where the chat template override was written, if there is one.
    """
    request = target.request
    weights = target.model.weights
    model = weights[0].path if weights else f"<{target.request.model_path}>"  # to be downloaded
    argv = [*target.server.command, "-m", model]
    argv += ["--host", "127.0.0.1", "--port", "0"]
    if target.model.projector is not None:
        argv += ["--mmproj", target.model.projector.path]
    for name, row in SETTINGS.items():
        argv += row.words(request.meant(name))
    catalogue = target.server.catalogue
    argv += speculative_flags(target.speculative_type, target.extra_args, catalogue)
    if template_file is not None:
        argv += ["--jinja", "--chat-template-file", template_file]
    return (*argv, *target.extra_args)
