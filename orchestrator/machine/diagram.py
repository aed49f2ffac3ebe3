"""The transition table as Mermaid, Graphviz, SVG and Markdown.

Everything is generated from the table. Rows that keep the state are only in the Markdown table.
Live views can mark the current state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from orchestrator.machine.states import State
from orchestrator.machine.table import TABLE, Row

_ORDER: Final = tuple(State)


@dataclass(frozen=True, slots=True)
class Edge:
    """All rows that lead from one state to another."""

    source: State
    dest: State
    rows: tuple[Row, ...]

    @property
    def triggers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.trigger for row in self.rows))

    @property
    def step(self) -> int:
        """How many states it goes forward; negative for an edge that leads back."""
        return _ORDER.index(self.dest) - _ORDER.index(self.source)


def edges() -> tuple[Edge, ...]:
    """Return every edge of the table once, in table order."""
    found: dict[tuple[State, State], list[Row]] = {}
    for row in TABLE:
        for source in row.sources:
            if row.dest is not None:
                found.setdefault((source, row.dest), []).append(row)
    return tuple(Edge(source, dest, tuple(rows)) for (source, dest), rows in found.items())


def mermaid(current: State | None = None) -> str:
    """Return a Mermaid `stateDiagram-v2`."""
    lines = ["stateDiagram-v2", "    direction LR", f"    [*] --> {_ORDER[0]}"]
    lines += [f"    {e.source} --> {e.dest} : {', '.join(e.triggers)}" for e in edges()]
    if current is not None:
        lines += ["    classDef current fill:#2f6feb,color:#fff", f"    class {current} current"]
    return "\n".join(lines) + "\n"


def dot(current: State | None = None) -> str:
    """Return a Graphviz digraph."""
    lines = ["digraph lifecycle {", "  rankdir=LR;", '  node [shape=box, style="rounded,filled"];']
    for state in _ORDER:
        fill, font = ("#2f6feb", "white") if state is current else ("#f6f8fa", "black")
        lines.append(f'  {state} [fillcolor="{fill}", fontcolor="{font}"];')
    for edge in edges():
        label = "\\n".join(edge.triggers)
        lines.append(f'  {edge.source} -> {edge.dest} [label="{label}"];')
    return "\n".join([*lines, "}"]) + "\n"


def markdown() -> str:
    """Return the whole table, one line per row, in the order in which rows are tried."""
    lines = ["| trigger | from | guards | to | actions |", "|---|---|---|---|---|"]
    for row in TABLE:
        sources = "any" if len(row.sources) == len(_ORDER) else ", ".join(row.sources)
        guards = ", ".join(f"`{name}`" for name in row.guards) or "otherwise"
        actions = ", ".join(f"`{name}`" for name in row.actions)
        dest = row.dest or "(stays)"
        lines.append(f"| {row.trigger} | {sources} | {guards} | {dest} | {actions} |")
    return "\n".join(lines) + "\n"


_BOX_W: Final = 132
_BOX_H: Final = 54
_PITCH: Final = 212
_LEFT: Final = 34
_LANE: Final = 44
_FIRST_LANE: Final = 46
_SPREAD: Final = 17
_GATE_LEFT: Final = 96
_CORNER: Final = 12

STYLE: Final = """
    svg { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #8c959f;
          --box: #f6f8fa; --rim: #b7bfc8; --lit: #0969da; --paper: #ffffff; --gate: #8250df; }
    @media (prefers-color-scheme: dark) {
      svg { --ink: #e6edf3; --soft: #9198a1; --line: #656c76; --box: #161b22; --rim: #3d444d;
            --lit: #4493f8; --paper: #0d1117; --gate: #ab7df8; } }
    .paper { fill: var(--paper); }
    .state rect { fill: var(--box); stroke: var(--rim); stroke-width: 1.5; }
    .state text { fill: var(--ink); font: 600 15px system-ui, sans-serif; text-anchor: middle; }
    .state.current rect { fill: var(--lit); stroke: var(--lit); }
    .state.current text { fill: #ffffff; }
    .edge path { fill: none; stroke: var(--line); stroke-width: 1.6; marker-end: url(#tip); }
    .edge.traced path { stroke: var(--lit); stroke-width: 2.6; }
    .edge rect { fill: var(--paper); }
    .edge text { fill: var(--soft); font: 12.5px ui-monospace, monospace; text-anchor: middle; }
    .forward path { stroke: var(--soft); stroke-width: 2.2; }
    .gate rect { fill: var(--paper); stroke: var(--gate); stroke-dasharray: 4 3; }
    .gate line { stroke: var(--gate); stroke-dasharray: 4 3; }
    .gate text { fill: var(--gate); font: 12.5px ui-monospace, monospace; text-anchor: middle; }
    #tip path { fill: var(--soft); }
"""

_FRAME: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-labelledby="title">
  <title id="title">Lifecycle of a llama-server: {states}</title>
  <style>{style}  </style>
  <defs><marker id="tip" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" \
markerHeight="7" orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z"/></marker></defs>
  <rect class="paper" width="{width}" height="{height}" rx="10"/>
{parts}
</svg>
"""


def svg(current: State | None = None) -> str:
    """Return a drawing that follows the reader's light or dark theme.

    The path to Healthy runs from left to right, edges that skip a part of it and edges back to Idle
    above it, and edges back to Killing below it. Elements have ids (`state-Idle`,
    `edge-Idle-Killing`) for live views.
    """
    forward = [edge for edge in edges() if edge.step == 1]
    ahead = [edge for edge in edges() if edge.step > 1]
    back = sorted((edge for edge in edges() if edge.step < 0), key=lambda edge: edge.step)
    above = [edge for edge in back if edge.dest is State.IDLE]
    below = [edge for edge in back if edge.dest is not State.IDLE]
    top = 24 + _lane(above[0]) + _LANE * len(ahead)
    width = 2 * _LEFT + _PITCH * (len(_ORDER) - 1) + _BOX_W
    height = top + _BOX_H + _lane(below[0]) + 30
    parts = [
        *(_arc(edge, top) for edge in (*above, *below)),
        *(_leap(edge, top, 24 + _LANE * n) for n, edge in enumerate(ahead)),
        *(_arrow(edge, top) for edge in forward),
        *(_state(state, top, is_current=state is current) for state in _ORDER),
        *(_gate(edge, top) for edge in forward if edge.dest is State.SPAWNING),
    ]
    return _FRAME.format(
        width=width, height=height, states=", ".join(_ORDER), style=STYLE, parts="\n".join(parts)
    )


def _lane(edge: Edge) -> int:
    """How far from the boxes an edge back runs."""
    return _FIRST_LANE + _LANE * (-edge.step - 1)


def _x(state: State) -> int:
    """The middle of a state's box."""
    return _LEFT + _PITCH * _ORDER.index(state) + _BOX_W // 2


def _state(state: State, top: int, *, is_current: bool) -> str:
    mark = " current" if is_current else ""
    return (
        f'  <g class="state{mark}" id="state-{state}"><rect x="{_x(state) - _BOX_W // 2}" '
        f'y="{top}" width="{_BOX_W}" height="{_BOX_H}" rx="12"/>'
        f'<text x="{_x(state)}" y="{top + _BOX_H // 2 + 5}">{state}</text></g>'
    )


def _arrow(edge: Edge, top: int) -> str:
    y = top + _BOX_H // 2
    start, end = _x(edge.source) + _BOX_W // 2, _x(edge.dest) - _BOX_W // 2 - 3
    first, *others = edge.triggers
    middle = (start + end) // 2
    text = _text(middle, y - 9, first)
    text += "".join(_text(middle, y + 18 + 15 * n, other) for n, other in enumerate(others))
    return _edge(edge, f"M{start} {y} H{end}", text, "edge forward")


def _arc(edge: Edge, top: int) -> str:
    """An edge back: out of the box, along a lane of its own, into the other box."""
    side = -1 if edge.dest is State.IDLE else 1
    base = top if side < 0 else top + _BOX_H
    lane = base + side * _lane(edge)
    start = _x(edge.source) - (10 if side < 0 else 0)
    spread = 2.5 + edge.step if side > 0 else 3 + 2 * edge.step
    end, r = round(_x(edge.dest) + _SPREAD * spread), _CORNER
    path = (
        f"M{start} {base} V{lane - side * r} Q{start} {lane} {start - r} {lane} "
        f"H{end + r} Q{end} {lane} {end} {lane - side * r} V{base + side * 3}"
    )
    middle = (start + end) // 2
    if edge.step == -1:  # too short for a label on the line
        label = _text(middle, lane + (17 if side > 0 else -8), " · ".join(edge.triggers))
        return _edge(edge, path, label, "edge")
    return _edge(edge, path, _chip(edge, middle, lane), "edge")


def _leap(edge: Edge, top: int, lane: int) -> str:
    """An edge that skips states: up from the box, along a lane of its own, and down again."""
    start, end, r = _x(edge.source) - 2 * _SPREAD, _x(edge.dest), _CORNER
    path = (
        f"M{start} {top} V{lane + r} Q{start} {lane} {start + r} {lane} "
        f"H{end - r} Q{end} {lane} {end} {lane + r} V{top - 3}"
    )
    return _edge(edge, path, _chip(edge, (start + end) // 2, lane), "edge")


def _chip(edge: Edge, x: int, y: int) -> str:
    """The triggers of an edge, on its line."""
    label = " · ".join(edge.triggers)
    half = round(3.9 * len(label)) + 6
    rect = f'<rect x="{x - half}" y="{y - 9}" width="{2 * half}" height="18"/>'
    return rect + _text(x, y + 4, label)


def _text(x: int, y: int, label: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(label)}</text>'


def _edge(edge: Edge, path: str, text: str, css: str) -> str:
    rows = "\n".join(
        f"{row.trigger}{' when ' if row.guards else ''}{', '.join(row.guards)}: "
        f"{', '.join(row.actions)}"
        for row in edge.rows
    )
    return (
        f'  <g class="{css}" id="edge-{edge.source}-{edge.dest}">'
        f'<title>{escape(rows)}</title><path d="{path}"/>{text}</g>'
    )


def _gate(edge: Edge, top: int) -> str:
    """The guards of the only way into Spawning, written out."""
    text = " and ".join(name for name in edge.rows[0].guards if name != "is_current")
    x, y, width = (_x(edge.source) + _x(edge.dest)) // 2, top - _FIRST_LANE, 8 * len(text) + 24
    return (
        f'  <g class="gate"><line x1="{x}" y1="{y + 13}" x2="{x}" y2="{top + 6}"/>'
        f'<rect x="{x - _GATE_LEFT}" y="{y - 13}" width="{width}" height="26" rx="13"/>'
        f'<text x="{x - _GATE_LEFT + width // 2}" y="{y + 4}">{escape(text)}</text></g>'
    )


FILES: Final[dict[str, Callable[[], str]]] = {
    "lifecycle.mmd": mermaid,
    "lifecycle.dot": dot,
    "lifecycle.svg": svg,
    "lifecycle.md": markdown,
}
"""The generated files of `diagrams/`."""


def write(folder: Path) -> None:
    """Write the generated files into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, draw in FILES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
