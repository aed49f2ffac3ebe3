"""Counterexamples: a shortest way to break an invariant, as a story and as a sequence diagram."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Accept,
    Answer,
    CancelAnswer,
    CloseGate,
    Command,
    Concluded,
    Done,
    Download,
    DropStale,
    Effect,
    Kill,
    LeaseGranted,
    Loaded,
    LookUp,
    OpenGate,
    Post,
    Prefetched,
    Probe,
    Resolve,
    ServerEnded,
    SetTimer,
    Settle,
    SetToken,
    Spawn,
    StopTimer,
    Unloaded,
    Warm,
)
from orchestrator.machine.states import State


@dataclass(frozen=True, slots=True)
class StoryLine:
    """One line of a story."""

    who: str
    text: str
    before: State
    after: State
    outcome: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A shortest way to break an invariant."""

    invariant: str
    message: str
    steps: tuple[StoryLine, ...]

    def __str__(self) -> str:
        """The story, and the same as a Mermaid diagram."""
        return f"{self.story}\n\n{self.mermaid()}"

    @property
    def story(self) -> str:
        lines = [f"{self.invariant}: {self.message}"]
        for number, line in enumerate(self.steps, 1):
            change = "" if line.before is line.after else f"  [{line.before} -> {line.after}]"
            lines.append(f"{number:3}. {line.who}: {line.text}{change}")
            lines += [f"       {outcome}" for outcome in line.outcome]
        return "\n".join(lines)

    def mermaid(self) -> str:
        """Return the story as a Mermaid sequence diagram."""
        names = {line.who: line.who.replace(" ", "_") for line in self.steps}
        lines = ["sequenceDiagram", "  participant machine"]
        lines += [f"  participant {alias} as {who}" for who, alias in names.items()]
        for line in self.steps:
            lines.append(f"  {names[line.who]}->>machine: {_plain(line.text)}")
            if line.before is not line.after:
                lines.append(f"  Note over machine: {line.before} to {line.after}")
            lines += [f"  machine->>machine: {_plain(outcome)}" for outcome in line.outcome]
        lines.append(f"  Note over machine: {_plain(self.message)}")
        return "\n".join(lines)


def describe(command: Command) -> str:
    """Return a command in words, or nothing for one that the story shows otherwise."""
    match command:
        case Accept(ticket, generation, joined):
            return f"call {ticket} {'joins' if joined else 'is'} load {generation}"
        case Settle(ticket, answer):
            return f"call {ticket} is answered: {_answer(answer)}"
        case SetToken(generation, reason):
            return f"the token of load {generation} is set: {reason}"
        case SetTimer(generation, kind):
            return f"the {kind} timer of load {generation} is set"
        case LookUp(ticket, request):
            return f"the look-up of {request.model_path} begins, for call {ticket}"
        case Post(fact):
            return f"load {fact.generation} is promoted"
        case DropStale(generation, trigger):
            return f"{trigger} of load {generation} is dropped as stale"
        case Concluded() | ServerEnded() | StopTimer() | Warm() | OpenGate() | CloseGate():
            return ""
        case Kill() | Resolve() | Download() | Spawn() | Probe():
            return _begins(command)


def _begins(effect: Effect) -> str:
    match effect:
        case Kill(_, child):
            return f"the kill begins: {f'server {child.pid}' if child else 'nothing on record'}"
        case Resolve(generation, target):
            return f"the Hub is asked for {target.request.model_path}, for load {generation}"
        case Download(generation, target):
            return f"the download of {target.request.model_path} begins, for load {generation}"
        case Probe(_, child):
            return f"the health wait for {f'server {child.pid}' if child else 'nothing'} begins"
        case Spawn():
            return ""


def _answer(answer: Answer) -> str:
    match answer:
        case Loaded():
            how = "already loaded" if answer.already else "loaded"
            return f"{how} {answer.target.request.model_path}, server {answer.child.pid}"
        case Unloaded(changed):
            return "unloaded" if changed else "unchanged, another model"
        case CancelAnswer(cancelled):
            return "cancelled" if cancelled else "nothing to cancel"
        case Prefetched():
            return "it is on disk"
        case LeaseGranted():
            return f"leased server {answer.child.pid}"
        case Done(is_kept=True):
            return "shut down, but for the server"
        case Done():
            return "shut down"
        case Problem():
            return answer.category


def _plain(text: str) -> str:
    """Mermaid ends a statement at `;` and starts an entity at `#`."""
    return text.replace(";", ",").replace("#", "no. ")
