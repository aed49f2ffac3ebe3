"""What the commands of a step change in a world."""

from __future__ import annotations

from orchestrator.base.tokens import Generation
from orchestrator.machine.commands import (
    Accept,
    CloseGate,
    Command,
    Concluded,
    Download,
    Kill,
    LeaseGranted,
    LookUp,
    OpenGate,
    Post,
    Probe,
    Resolve,
    ServerEnded,
    SetTimer,
    Settle,
    SetToken,
    StopTimer,
)
from orchestrator.machine.context import EffectInFlight
from tests.kit.machine.world import Core, Gate, Noticed, Status, Timer, Work, WorkKind, World


class Changes:
    """The parts of a world that commands change."""

    def __init__(self, world: World, ends: Work | None, effect: EffectInFlight | None) -> None:
        self._world = world
        self._effect = effect
        self._concluded = world.concluded
        self._reported_ended = world.reported_ended
        self._calls = list(world.calls)
        self._index = {call.ticket: i for i, call in enumerate(world.calls) if call.status}
        self._work = [work for work in world.work if work is not ends]
        self._noticed = world.noticed
        self._timers = world.timers
        self._tokens = world.tokens
        self._gate = world.gate

    def carry_out(self, command: Command) -> None:
        if isinstance(command, Kill | Resolve | Download | Probe):
            self._work.append(self._begun(command))
            return
        match command:
            case Settle():
                self._settle(command)
            case Accept(ticket, generation):
                index = self._index[ticket]
                self._calls[index] = self._calls[index]._replace(generation=generation)
            case Concluded(generation):
                self._concluded |= {generation}
            case ServerEnded(pid):
                self._reported_ended |= {pid}
            case SetToken(generation):
                self._tokens |= {generation}
            case LookUp() | SetTimer() | StopTimer():
                self._time(command)
            case OpenGate() | CloseGate():
                self._turn_gate(command)
            case Post(fact):
                self._noticed |= {Noticed("promote", fact.generation)}

    def _settle(self, command: Settle) -> None:
        index = self._index[command.ticket]
        status = Status.HELD if isinstance(command.answer, LeaseGranted) else Status.DONE
        self._calls[index] = self._calls[index]._replace(status=status)
        if status is Status.HELD:
            self._gate = self._gate._replace(inside=self._gate.inside | {command.ticket})

    def _turn_gate(self, command: OpenGate | CloseGate) -> None:
        if isinstance(command, OpenGate):
            self._gate = Gate(command.lease.child.generation, is_open=True)
            return
        self._gate = self._gate._replace(
            is_open=False, drains=command.drains, at_close=self._gate.inside
        )
        if command.drains and not self._gate.inside:
            self._noticed |= {Noticed("drained", command.generation)}

    def _time(self, command: LookUp | SetTimer | StopTimer) -> None:
        match command:
            case LookUp(ticket, request):
                self._work.append(Work("look_up", Generation(ticket)))
                if request.deadline_s is not None:  # the other look-ups have ten minutes
                    self._timers |= {Timer("look_up", Generation(ticket))}
            case SetTimer(generation, kind) if kind != "look_up":
                self._timers |= {Timer(kind, generation)}
            case StopTimer(generation, kind):
                self._timers -= {Timer(kind, generation)}

    def _begun(self, command: Kill | Resolve | Download | Probe) -> Work:
        match command:
            case Kill(generation):
                return Work("kill", generation)
            case Probe(generation, child):
                return Work("probe", generation, child.pid)
            case Resolve(generation, wanted):
                return Work("resolve", generation, model=wanted.request.model_path)
            case Download(generation, wanted):
                is_own = self._effect == EffectInFlight("download", generation)
                kind: WorkKind = "download" if is_own else "prefetch"
                return Work(kind, generation, model=wanted.request.model_path)

    def world(self, core: Core) -> World:
        if self._gate.is_held:
            self._gate = self._gate._replace(is_open=core.ctx.gate == "open", is_held=False)
        return self._world._replace(
            gate=self._gate,
            core=core,
            calls=tuple(self._calls),
            work=tuple(self._work),
            noticed=self._noticed,
            timers=self._timers,
            tokens=self._tokens,
            concluded=self._concluded,
            reported_ended=self._reported_ended
            & ({core.ctx.child.pid} if core.ctx.child else set()),
        )
