"""The server's command line.

Managed flags come first, in a fixed order, and the caller's extra args last, so that an explicit
flag wins over a field: llama-server lets the last one win. It never contains a secret.
"""

from __future__ import annotations

from orchestrator.settings.drafting import speculative_flags
from orchestrator.settings.fields import SETTINGS
from orchestrator.settings.target import Target


def build_argv(
    target: Target, *, template_file: str | None, prompts_folder: str | None = None
) -> tuple[str, ...]:
    """Return the whole command line. The port is 0: the server picks a free one and reports it, so
    no other process can take it in between.

    Args:
        target: What to run, with its effective extra args.
        template_file: Path of the chat template override, if there is one.
        prompts_folder: Where the server may save what it has computed.
    """
    model, server = target.model, target.server
    path = model.weights[0].path if model.weights else f"<{target.request.model_path}>"
    argv = [*server.command, "-m", path, "--alias", target.alias]
    argv += ["--host", "127.0.0.1", "--port", "0"]
    argv += ["--log-jsonl"] * target.has_json_log
    if model.projector is not None:
        argv += ["--mmproj", model.projector.path]
    for name, row in SETTINGS.items():
        argv += row.to_argv(target.request.effective(name))
    argv += speculative_flags(target.speculative_type, target.extra_args, server.catalogue)
    if template_file is not None:
        argv += ["--jinja", "--chat-template-file", template_file]
    if prompts_folder is not None and target.can_keep_prompts:
        argv += ["--slot-save-path", prompts_folder]
    return (*argv, *target.extra_args)
