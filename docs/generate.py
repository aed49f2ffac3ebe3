"""Generate the pages of the site that come from the code: an MkDocs hook, named in mkdocs.yml.

The other pages are Markdown that also reads well in the repository; their links out of docs/ are
rewritten here. Nothing is written into the sources, and no page loads anything from another host.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, cast

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from prometheus_client.parser import text_string_to_metric_families

import orchestrator
from orchestrator.cli import app as cli
from orchestrator.errors import CLASSES, OrchestratorError
from orchestrator.http import create_app
from orchestrator.http.metrics import Metrics
from orchestrator.http.problems import CATEGORIES
from orchestrator.machine import diagram
from orchestrator.pool import diagram as pool_diagram
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.server import failures
from orchestrator.settings.fields import SETTINGS

_ROOT: Final = Path(__file__).parents[1]
_FROM_THE_ROOT: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
}
_LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)*)([^)#:]+)(#[^)]*)?\)")
_FOREIGN: Final = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|"
    r"<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(?:https?:)?//"
)


# ------------------------------------------------------------------------------------- the hooks


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in _generated():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite links out of docs/: diagrams are on the site too, source files become plain text."""
    depth = page.file.src_uri.count("/")

    def on_site(found: re.Match[str]) -> str:
        bang, text, up, target, anchor = found.groups()
        if page.file.src_uri in _FROM_THE_ROOT.values():  # its source is one folder higher
            target = target.removeprefix("docs/")
        elif len(up) // 3 <= depth:
            return found[0]
        if target.startswith(("orchestrator/", "tests/")):
            return cast("str", text)
        target = _FROM_THE_ROOT.get(target, target)
        return f"{bang}[{text}]({'../' * depth}{target}{anchor or ''})"

    return _LINK.sub(on_site, markdown)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Refuse a page that would load something from another host."""
    if found := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def _generated() -> Iterator[tuple[str, str]]:
    for source, name in _FROM_THE_ROOT.items():
        text = (_ROOT / source).read_text()
        yield name, text if source.endswith(".md") else f"# Licence\n\n```text\n{text}```\n"
    yield "diagrams/lifecycle.svg", diagram.svg()
    yield "diagrams/lifecycle.md", "# The transition table\n\n" + diagram.markdown()
    yield "diagrams/pool.svg", pool_diagram.DRAWING.svg()
    yield "diagrams/pool.md", "# The pool's table\n\n" + pool_diagram.DRAWING.markdown()
    yield "reference/api.md", _api()
    yield "reference/http.md", _http()
    yield "reference/openapi.json", json.dumps(_openapi(), indent=2)
    yield "reference/cli.md", _command_line()
    yield "reference/metrics.md", _metrics()
    yield "reference/events.md", _events()
    yield "reference/errors.md", _errors()


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    head = list(head)
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)]) + "\n"


def _code(value: object) -> str:
    return f"`{value}`" if value not in (None, "") else ""


# ---------------------------------------------------------------------------------------- Python


def _api() -> str:
    """Return every public name but the errors, which have a page of their own."""
    first = ["AsyncOrchestrator", "Orchestrator", "LoadRequest"]
    others = [
        name
        for name in orchestrator.__all__
        if name not in first and name != "__version__" and not _is_error(name)
    ]
    parts = [
        "# Python",
        (
            "The names in `from orchestrator import ...`, and those of `orchestrator.http` at the "
            "end. Errors are on [their own page](errors.md)."
        ),
        *(f"::: orchestrator.{name}" for name in first),
        "### The fields of a load",
        _table(
            ["field", "default", "meaning"],
            (
                (_code(name), "" if name == "model_path" else f"`{row.default!r}`", row.help)
                for name, row in SETTINGS.items()
            ),
        ),
        *(f"::: orchestrator.{name}" for name in others),
        "::: orchestrator.http.create_app",
        "::: orchestrator.http.router",
        "::: orchestrator.http.PassThrough",
    ]
    return "\n\n".join(parts) + "\n"


def _is_error(name: str) -> bool:
    value = getattr(orchestrator, name)
    return isinstance(value, type) and issubclass(value, OrchestratorError)


# ------------------------------------------------------------------------------------------ HTTP


@cache
def _openapi() -> dict[str, Any]:
    return create_app().openapi()


def _http() -> str:
    schemas = _openapi()["components"]["schemas"]
    parts = [
        "# HTTP",
        (
            "The routes of the OpenAPI document ([openapi.json](openapi.json), also served at "
            "`/openapi.json` and `/docs`). [HTTP](../http.md) explains them."
        ),
        _table(
            ["route", "summary"],
            (
                (f"[`{method.upper()} {path}`](#{_anchor(method, path)})", operation["summary"])
                for path, method, operation in _operations()
            ),
        ),
        *(_operation(*one) for one in _operations()),
        "## Schemas",
        *(f"### {name}\n\n{_members(schema)}" for name, schema in schemas.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in _openapi()["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _anchor(method: str, path: str) -> str:
    return re.sub(r"\W+", "-", f"{method}{path}").strip("-").lower()


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [f"## {method.upper()} {path} {{ #{_anchor(method, path)} }}"]
    if "description" in operation:
        parts.append(operation["description"])
    if parameters := operation.get("parameters"):
        rows = [(_code(p["name"]), p["in"], *_value(p["schema"])) for p in parameters]
        parts.append(_table(["parameter", "in", "type", "default"], rows))
    if body := operation.get("requestBody"):
        (media, content), *_ = body["content"].items()
        needed = "" if body.get("required") else ", optional"
        parts.append(f"Body (`{media}`{needed}):\n\n{_members(content.get('schema', {}))}")
    statuses = []
    for status, answer in operation["responses"].items():
        shapes = [_type(c["schema"]) for c in answer.get("content", {}).values() if "schema" in c]
        statuses.append((status, answer["description"], ", ".join(shapes)))
    parts.append(_table(["status", "meaning", "answer"], statuses))
    return "\n\n".join(parts)


def _members(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            _code(name),
            "yes" if name in required else "",
            *_value(member),
            member.get("description", ""),
        )
        for name, member in schema.get("properties", {}).items()
    ]
    about = schema.get("description", "")
    return f"{about}\n\n" + (
        _table(["member", "required", "type", "default", ""], rows) if rows else ""
    )


def _value(schema: Mapping[str, Any]) -> tuple[str, str]:
    default = schema.get("default")
    return _type(schema), _code(json.dumps(default)) if "default" in schema else ""


def _type(schema: Mapping[str, Any]) -> str:
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if "const" in schema:
        return _code(json.dumps(schema["const"]))
    if "enum" in schema:
        return ", ".join(_code(json.dumps(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


# -------------------------------------------------------------------------------- command line


def _command_line() -> str:
    group = cli.commands
    parts = ["# Command line", _help(group, cli.PROGRAM)]
    with click.Context(group, info_name=cli.PROGRAM) as ctx:
        for name in group.list_commands(ctx):
            command = cast("click.Command", group.get_command(ctx, name))
            parts += [f"## {name}", _help(command, name, ctx), *_below(command, name, ctx)]
    parts.append("Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.")
    parts.append(
        "## Completion\n\nThe shell completes commands and options after this line in `~/.bashrc` "
        "(`zsh_source` in `~/.zshrc`, or `fish_source`):\n\n```sh\n"
        'eval "$(_LLAMA_ORCHESTRATOR_COMPLETE=bash_source llama-orchestrator)"\n```'
    )
    return "\n\n".join(parts) + "\n"


def _below(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    """Yield the commands of a group, with all words that name them."""
    if isinstance(command, click.Group):
        ctx = click.Context(command, parent, info_name=name)
        for own, below in command.commands.items():
            if isinstance(below, click.Group):
                yield from _below(below, own, ctx)
            else:
                words = ctx.command_path.removeprefix(f"{cli.PROGRAM} ")
                yield from (f"### {words} {own}", _help(below, own, ctx))


def _help(command: click.Command, name: str, parent: click.Context | None = None) -> str:
    ctx = click.Context(command, parent, info_name=name, terminal_width=96)
    return f"```text\n{command.get_help(ctx)}\n```"


# ---------------------------------------------------------------------------- metrics and events


def _metrics() -> str:
    text = Metrics(AsyncOrchestrator()).render().decode()
    labels = _labels_in_http_page()
    rows = sorted(
        (_code(name), family.type, labels[name], family.documentation)
        for family in text_string_to_metric_families(text)
        for name in (family.name.removeprefix("llama_orchestrator_"),)
        if name in labels  # leaves out `_created`, which the client library adds
    )
    return (
        "# Metrics\n\n`GET /metrics`, for Prometheus. All names begin with `llama_orchestrator_`. "
        "A counter ends in `_total`; a histogram has `_bucket`, `_sum` and `_count`.\n\n"
        + _table(["name", "type", "labels", "meaning"], rows)
    )


def _labels_in_http_page() -> dict[str, str]:
    """Return the labels by metric, also of metrics without samples; a test checks this page."""
    found = {}
    table = (_ROOT / "docs" / "http.md").read_text().partition("## Metrics")[2]
    for names, labels in re.findall(r"^\|([^|]*`[^|]*)\|([^|]*)\|", table, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            found[name.removesuffix("_total")] = labels.strip()
    return found


def _events() -> str:
    rows = sorted((_code(n), level, ", ".join(map(_code, keys))) for n, level, keys in _logged())
    return "\n\n".join(
        [
            "# Events",
            "## The event stream",
            (
                "`events()` and `GET /api/inference/events`. Over HTTP there are also events named "
                "`progress` with the data of `progress()`; they repeat the id of the event before "
                "them, because a client need not resume at one. "
                "[The table](../diagrams/lifecycle.md) lists all transitions."
            ),
            (
                "::: orchestrator.runtime.events.Event\n    options:\n      members: false\n"
                "      show_root_heading: false\n      show_root_toc_entry: false"
            ),
            "## The log",
            "Every event that the code logs; the keys are `record.fields`.",
            _table(["event", "level", "keys"], rows),
        ]
    )


def _logged() -> set[tuple[str, str, tuple[str, ...]]]:
    """Return name, level and keys of every event that the package logs."""
    found = set()
    for path in (_ROOT / "orchestrator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            words = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            match ast.unparse(node.func).split("."):  # `_log(level, event)` or `_log.level(event)`
                case ["_log"]:
                    level, name = words
                case ["_log", level]:
                    (name,) = words
                case _:
                    continue
            found.add((name, level, tuple(keyword.arg for keyword in node.keywords if keyword.arg)))
    return found


# ---------------------------------------------------------------------------------------- errors


def _errors() -> str:
    tree = inspect.getdoc(inspect.getmodule(OrchestratorError)) or ""
    own = [(_code(c.category), c.status, c.title, _code(c.__name__)) for c in CLASSES.values()]
    of_http = [
        (_code(category), status, HTTPStatus(status).phrase, "")
        for status, categories in CATEGORIES.items()
        for category in categories
        if category != "internal"
    ]
    causes = {cause.reason: cause for cause in (*failures.CONSEQUENCES, *failures.CAUSES)}
    reasons = sorted((_code(c.reason), _code(c.field), c.advice) for c in causes.values())
    return "\n\n".join(
        [
            "# Errors",
            "```text\n" + tree.split("\n\n")[1] + "\n```",
            "## By category",
            _table(["category", "status", "title", "class"], [*own, *of_http]),
            "Categories without a class occur over HTTP only.",
            "## Why a server did not start",
            (
                "`reason` of `server_start_failed`, the field to change, and the advice in the "
                "message (one of several wordings; words in braces are filled in)."
            ),
            _table(["reason", "field", "advice"], reasons),
            "## As data",
            "::: orchestrator.errors.Problem",
            "::: orchestrator.errors.Restored",
            "::: orchestrator.errors.OrchestratorError",
        ]
    )
