"""What the client commands print of the answers of a service."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.cli.loading import progress_parts
from orchestrator.cli.output import (
    mib_text,
    say,
    say_field,
    say_note,
    say_problem,
    say_reload_reasons,
    state_part,
)
from orchestrator.machine.plan import Plan
from orchestrator.runtime.answers import LoadOutcome, LoadProgress
from orchestrator.runtime.events import Event
from orchestrator.settings.fields import ECHOED

_ACTIONS = {
    "none": "do nothing: the model is already loaded",
    "load": "load the model",
    "reload": "reload the model",
}


def say_outcome(outcome: LoadOutcome, url: str) -> None:
    """Print what a load has done."""
    is_new = outcome.status == "loaded"
    took = f"in {outcome.timings_s.total * 1000:,.0f} ms" if is_new else "already loaded"
    say(("✓ Healthy", "bold green"), (f"  {took}", "dim"))
    say_loaded(outcome.as_dict(), url)
    say_reload_reasons([reason.as_dict() for reason in outcome.reload_reasons])
    if outcome.evicted:
        say_field("evicted", ", ".join(outcome.evicted))


def say_plan(plan: Plan) -> None:
    """Print what a load would do."""
    say("a load would ", (_ACTIONS[plan.action], "bold"))
    say_reload_reasons([reason.as_dict() for reason in plan.reload_reasons])
    say_note(plan.as_dict())
    if plan.memory is not None:
        say_memory(plan.memory.as_dict(), free=plan.free, fits=plan.fits)
    if plan.evict:
        say_field("evicts", ", ".join(plan.evict))
    say_field("argv", shlex.join(plan.argv))


def say_event(event: Event) -> None:
    """Print a transition, or a step of a download or a load."""
    whose = f"{event.data['model']}  " if "model" in event.data else ""
    if event.kind == "transition":
        what = f"  {event.trigger}, generation {event.generation}"
        at = time.strftime("%H:%M:%S", time.localtime(event.at))
        number = (f"{event.id:>5}  {at}  ", "dim")
        say(number, whose, f"{event.source} → ", state_part(event.dest), what)
    elif event.fraction is not None:
        say((f"{'':>15}  {whose}{event.phase} {event.fraction:.0%}", "dim"))


def say_status(answer: Mapping[str, Any], url: str, progress: Callable[[], LoadProgress]) -> None:
    """Print the state of one slot; `progress` is asked for where a load is in flight."""
    say(state_part(answer["state"]), (f"  for {answer['uptime_s']:,.1f} s", "dim"))
    if answer["draining_left_s"] is not None:
        left = f", for {answer['draining_left_s']:,.1f} s at most"
        requests = "1 request" if answer["leases"] == 1 else f"{answer['leases']} requests"
        say_field("waits for", f"{requests} of this server{left}")
        say_field("", ("to end them: llama-orchestrator unload MODEL --cut", "dim"))
    elif answer["leases"]:
        say_field("requests", f"{answer['leases']}")
    if (pid := answer["occupied_by"]) is not None:
        say(("  process ", "red"), f"{pid} did not exit and still occupies the slot")
    if recovery := answer["recovery"]:
        left = ""
        if recovery["left_s"]:
            next_start = {"waiting": "restarts within", "cooling_down": "no restart for"}
            left = f", {next_start[recovery['phase']]} {recovery['left_s']:,.1f} s"
        say_field("recovery", f"{recovery['failures']} failures in a row{left}")
    if loading := answer["loading"]:
        say_field("loading", loading["model_path"], (f"  {loading['phase']}", "yellow"))
        if parts := progress_parts(progress()):
            say_field("progress", *parts)
    if loaded := answer["loaded"]:
        say_loaded(loaded, url)
    if answer["last_error"]:
        say_problem(answer["last_error"])


def say_memory(
    memory: Mapping[str, Any], free: Mapping[str, int] | None = None, fits: bool | None = None
) -> None:
    """Print what a server takes of memory, and what is free."""
    fitted = ", context reduced to fit" * memory.get("fitted", False)
    say_field("memory", mib_text(memory["mib"]), (f"  {memory['source']}{fitted}", "dim"))
    for device, mib in memory["devices"].items():
        room = f" of {mib_text(free[device])} free" if free and device in free else ""
        say_field("", (f"{device}: {mib_text(mib)}{room}", "dim"))
    if fits is False:
        say_field("", ("does not fit", "red"))


def say_clients(url: str) -> None:
    """Print the base URL for clients of a service."""
    say_field("clients", (f"{url}/v1", "bold"), ("  base URL of OpenAI clients", "dim"))


def say_loaded(loaded: Mapping[str, Any], url: str | None = None) -> None:
    """Print the loaded model, its server and its settings; with a URL, that for clients too."""
    variant = f"  {loaded['gguf_variant']}" if loaded["gguf_variant"] else ""
    say_field("model", loaded["model_path"], variant)
    if url is not None:
        say_clients(url)
    origin = ", adopted" if loaded.get("adopted") else ""
    say_field("server", loaded["base_url"], (f"  pid {loaded['pid']}{origin}", "dim"))
    requested = loaded["requested_context_length"] or "Auto"
    say_field("context", f"{loaded['context_length']}", (f"  requested: {requested}", "dim"))
    if memory := loaded.get("memory"):
        say_memory(memory)
    settings = [
        f"{name} {loaded[name]}"
        for name in ("cache_type_kv", "speculative_type", *ECHOED)
        if loaded.get(name) is not None and name != "chat_template_override"  # may be long
    ]
    say_field("settings", ", ".join(settings))
    if loaded["llama_extra_args"]:
        say_field("flags", shlex.join(loaded["llama_extra_args"]))
    say_note(loaded)
