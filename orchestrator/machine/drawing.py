"""Drawings of a transition table as Mermaid, Graphviz, SVG and Markdown.

Everything is generated from the table. Rows that keep the state are only in the Markdown table.
Live views can mark the current state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic
from xml.sax.saxutils import escape

from orchestrator.machine.rows import Row, S


@dataclass(frozen=True)  # with slots `Edge[State](...)` raises TypeError
class Edge(Generic[S]):
    """All rows that lead from one state to another, and how many states it goes forward."""

    source: S
    dest: S
    rows: tuple[Row[S], ...]
    step: int  # negative for an edge that leads back

    @property
    def triggers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.trigger for row in self.rows))


_BOX_W: Final = 132
_BOX_H: Final = 54
_PITCH: Final = 212
_LEFT: Final = 34
_LANE: Final = 44
_FIRST_LANE: Final = 46
_SPREAD: Final = 17
_WIDEST: Final = -3.6  # times the spread: still on the box
_GATE_LEFT: Final = 96
_CORNER: Final = 12
_LETTER: Final = 3.9  # half the width of one in a label
_ASIDE: Final = 14  # between two edges that skip states at one box

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

_DASHED: Final = """\
    .beside path { stroke-dasharray: 5 4; }
"""

_FRAME: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-labelledby="title">
  <title id="title">{title}: {states}</title>
  <style>{style}  </style>
  <defs><marker id="tip" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" \
markerHeight="7" orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z"/></marker></defs>
  <rect class="paper" width="{width}" height="{height}" rx="10"/>
{parts}
</svg>
"""


@dataclass(frozen=True)
class Drawing(Generic[S]):
    """How a table is drawn.

    Attributes:
        order: The states; the first is where everything begins and ends.
        table: All rows.
        title: What goes through these states.
        gated: A state whose only way in has its guards written out.
        beside: Edges that no row has, as rows; they are dashed.
    """

    order: tuple[S, ...]
    table: Sequence[Row[S]]
    title: str
    name: str
    gated: S | None = None
    beside: Sequence[Row[S]] = ()

    @property
    def edges(self) -> tuple[Edge[S], ...]:
        """Every edge once, in the order of the table."""
        found: dict[tuple[S, S], list[Row[S]]] = {}
        for row in (*self.table, *self.beside):
            for source in row.sources:
                if row.dest is not None:
                    found.setdefault((source, row.dest), []).append(row)
        return tuple(
            Edge(source, dest, tuple(rows), self.order.index(dest) - self.order.index(source))
            for (source, dest), rows in found.items()
        )

    def mermaid(self, current: S | None = None) -> str:
        """Return a Mermaid `stateDiagram-v2`."""
        lines = ["stateDiagram-v2", "    direction LR", f"    [*] --> {self.order[0]}"]
        lines += [f"    {e.source} --> {e.dest} : {', '.join(e.triggers)}" for e in self.edges]
        if current is not None:
            lines += ["    classDef current fill:#2f6feb,color:#fff"]
            lines += [f"    class {current} current"]
        return "\n".join(lines) + "\n"

    def dot(self, current: S | None = None) -> str:
        """Return a Graphviz digraph."""
        lines = [f"digraph {self.name} {{", "  rankdir=LR;"]
        lines += ['  node [shape=box, style="rounded,filled"];']
        for state in self.order:
            fill, font = ("#2f6feb", "white") if state is current else ("#f6f8fa", "black")
            lines.append(f'  {state} [fillcolor="{fill}", fontcolor="{font}"];')
        for edge in self.edges:
            label = "\\n".join(edge.triggers)
            lines.append(f'  {edge.source} -> {edge.dest} [label="{label}"];')
        return "\n".join([*lines, "}"]) + "\n"

    def markdown(self) -> str:
        """Return the whole table, one line per row, in the order in which rows are tried."""
        lines = ["| trigger | from | guards | to | actions |", "|---|---|---|---|---|"]
        for row in self.table:
            sources = "any" if len(row.sources) == len(self.order) else ", ".join(row.sources)
            guards = ", ".join(f"`{name}`" for name in row.guards) or "otherwise"
            actions = ", ".join(f"`{name}`" for name in row.actions)
            dest = row.dest or "(stays)"
            lines.append(f"| {row.trigger} | {sources} | {guards} | {dest} | {actions} |")
        return "\n".join(lines) + "\n"

    def svg(self, current: S | None = None) -> str:
        """Return a drawing that follows the reader's light or dark theme.

        The way forward runs from left to right, edges that skip a part of it and edges back to the
        first state above it, and other edges back below it. Elements have ids (`state-Idle`,
        `edge-Idle-Killing`) for live views.
        """
        edges = self.edges
        forward = [edge for edge in edges if edge.step == 1]
        ahead = [edge for edge in edges if edge.step > 1]
        back = sorted((edge for edge in edges if edge.step < 0), key=lambda edge: edge.step)
        above = [edge for edge in back if edge.dest is self.order[0]]
        below = [edge for edge in back if edge.dest is not self.order[0]]
        top = 24 + _lane(above[0]) + _LANE * len(ahead)
        width = 2 * _LEFT + _PITCH * (len(self.order) - 1) + _BOX_W
        height = top + _BOX_H + _lane(below[0]) + 30
        parts = [
            *(self._arc(edge, top) for edge in (*above, *below)),
            *self._leaps(ahead, top),
            *(self._arrow(edge, top) for edge in forward),
            *(self._state(state, top, is_current=state is current) for state in self.order),
            *(self._gate(edge, top) for edge in forward if edge.dest is self.gated),
        ]
        style = STYLE + (_DASHED if self.beside else "")
        return _FRAME.format(
            width=width,
            height=height,
            title=self.title,
            states=", ".join(self.order),
            style=style,
            parts="\n".join(parts),
        )

    # ----------------------------------------------------------------------------------- parts

    def _x(self, state: S) -> int:
        """The middle of a state's box."""
        return _LEFT + _PITCH * self.order.index(state) + _BOX_W // 2

    def _state(self, state: S, top: int, *, is_current: bool) -> str:
        mark = " current" if is_current else ""
        return (
            f'  <g class="state{mark}" id="state-{state}"><rect x="{self._x(state) - _BOX_W // 2}" '
            f'y="{top}" width="{_BOX_W}" height="{_BOX_H}" rx="12"/>'
            f'<text x="{self._x(state)}" y="{top + _BOX_H // 2 + 5}">{state}</text></g>'
        )

    def _arrow(self, edge: Edge[S], top: int) -> str:
        y = top + _BOX_H // 2
        start, end = self._x(edge.source) + _BOX_W // 2, self._x(edge.dest) - _BOX_W // 2 - 3
        first, *others = edge.triggers
        middle = (start + end) // 2
        text = _text(middle, y - 9, first)
        text += "".join(_text(middle, y + 18 + 15 * n, other) for n, other in enumerate(others))
        return self._edge(edge, f"M{start} {y} H{end}", text, "edge forward")

    def _arc(self, edge: Edge[S], top: int) -> str:
        """An edge back: out of the box, along a lane of its own, into the other box."""
        side = -1 if edge.dest is self.order[0] else 1
        base = top if side < 0 else top + _BOX_H
        lane = base + side * _lane(edge)
        start = self._x(edge.source) - (10 if side < 0 else 0)
        spread = 2.5 + edge.step if side > 0 else max(3 + 2 * edge.step, _WIDEST)
        end, r = round(self._x(edge.dest) + _SPREAD * spread), _CORNER
        path = (
            f"M{start} {base} V{lane - side * r} Q{start} {lane} {start - r} {lane} "
            f"H{end + r} Q{end} {lane} {end} {lane - side * r} V{base + side * 3}"
        )
        middle = (start + end) // 2
        if edge.step == -1:  # too short for a label on the line
            label = _text(middle, lane + (17 if side > 0 else -8), " · ".join(edge.triggers))
            return self._edge(edge, path, label, "edge")
        return self._edge(edge, path, _chip(edge, middle, lane, start - end), "edge")

    def _leaps(self, ahead: Sequence[Edge[S]], top: int) -> Iterator[str]:
        """Yield the edges that skip states: up from the box, along a lane, and down again."""
        for n, edge in enumerate(ahead):
            lane, r = 24 + _LANE * n, _CORNER
            others = ahead[n + 1 :]
            aside = _ASIDE * sum(other.source is edge.source for other in others)
            start = self._x(edge.source) - 2 * _SPREAD + aside
            end = self._x(edge.dest) + _ASIDE * sum(other.dest is edge.dest for other in others)
            path = (
                f"M{start} {top} V{lane + r} Q{start} {lane} {start + r} {lane} "
                f"H{end - r} Q{end} {lane} {end} {lane + r} V{top - 3}"
            )
            chip = _chip(edge, (start + end) // 2, lane, end - start)
            yield self._edge(edge, path, chip, "edge")

    def _edge(self, edge: Edge[S], path: str, text: str, css: str) -> str:
        is_beside = all(row in self.beside for row in edge.rows)
        rows = "\n".join(
            f"{row.trigger}{' when ' if row.guards else ''}{', '.join(row.guards)}: "
            f"{', '.join(row.actions)}"
            for row in edge.rows
        )
        return (
            f'  <g class="{css}{" beside" if is_beside else ""}" '
            f'id="edge-{edge.source}-{edge.dest}">'
            f'<title>{escape(rows)}</title><path d="{path}"/>{text}</g>'
        )

    def _gate(self, edge: Edge[S], top: int) -> str:
        """The guards of the only way into a state, written out."""
        text = " and ".join(name for name in edge.rows[0].guards if name != "is_current")
        x, y = (self._x(edge.source) + self._x(edge.dest)) // 2, top - _FIRST_LANE
        width = 8 * len(text) + 24
        return (
            f'  <g class="gate"><line x1="{x}" y1="{y + 13}" x2="{x}" y2="{top + 6}"/>'
            f'<rect x="{x - _GATE_LEFT}" y="{y - 13}" width="{width}" height="26" rx="13"/>'
            f'<text x="{x - _GATE_LEFT + width // 2}" y="{y + 4}">{escape(text)}</text></g>'
        )


def _lane(edge: Edge[S]) -> int:
    """How far from the boxes an edge back runs."""
    return _FIRST_LANE + _LANE * (-edge.step - 1)


def _chip(edge: Edge[S], x: int, y: int, width: int) -> str:
    """The triggers of an edge, on its line; in two rows, if one is wider than the line."""
    names, dot = list(edge.triggers), " · "
    rows = [dot.join(names)]
    if 2 * _half(rows[0]) > width:
        middle = (len(names) + 1) // 2
        rows = [dot.join(names[:middle]) + " ·", dot.join(names[middle:])]
    half, height = max(map(_half, rows)), 18 * len(rows)
    rect = f'<rect x="{x - half}" y="{y - height // 2}" width="{2 * half}" height="{height}"/>'
    first = y + 4 - 8 * (len(rows) - 1)
    return rect + "".join(_text(x, first + 16 * n, row) for n, row in enumerate(rows))


def _half(label: str) -> int:
    return round(_LETTER * len(label)) + 6


def _text(x: int, y: int, label: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(label)}</text>'
