"""What callers ask for without end is not kept without end."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any

import pytest

from orchestrator import LoadRequest
from orchestrator.errors import Busy
from orchestrator.runtime import look_up
from orchestrator.server import binaries
from orchestrator.settings.template import check_template
from tests.kit.process.support import Background, Fake, Make

ASKED = 1500
AT_ONCE = 16
TEMPLATE = "{# {number} #}" + "x" * 4096


def test_queued_loads_without_end_keep_no_requests(make: Make, fake: Fake, model_a: str) -> None:
    """Neither the history nor the queue grows with what was asked, templates least of all."""
    fake.behave(loading_s=-1)
    orch = make()
    orch.submit(model_a)
    refused = 0
    for number in range(ASKED):
        try:
            orch.submit(
                model_a,
                max_seq_length=512 + number,
                chat_template_override=TEMPLATE.replace("{number}", str(number)),
                on_busy="supersede" if number < ASKED // 2 else "queue",
            )
        except Busy:
            refused += 1
    gc.collect()
    kept = [one for one in gc.get_objects() if isinstance(one, LoadRequest)]
    assert refused > ASKED // 3
    assert len(kept) < 400
    assert len(orch.history(256)) <= 256
    assert orch.cancel(generation=orch.status().generation)
    with contextlib.suppress(Exception):
        orch.unload()


def test_look_ups_compute_one_at_a_time(
    make: Make, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of threads that parse templates leave the owner's and the event loop's no time, and
    each ran the binary for what one run answers.
    """
    arrived, guard, inside, most = threading.Semaphore(0), threading.Lock(), 0, 0
    find = look_up.LookUps.find

    def finding(*args: Any) -> Any:
        arrived.release()
        return find(*args)

    def checking(template: str, field: str) -> None:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
            is_first = most == 1
        for _ in range(AT_ONCE if is_first and not arrived_all.is_set() else 0):
            assert arrived.acquire(timeout=30)
        arrived_all.set()
        check_template(template, field)
        with guard:
            inside -= 1

    arrived_all = threading.Event()
    monkeypatch.setattr(look_up, "check_template", checking)
    monkeypatch.setattr(look_up.LookUps, "find", finding)
    runs: Any = []
    run = binaries.run
    monkeypatch.setattr(binaries, "run", lambda *args: runs.append(args) or run(*args))
    orch = make()
    plans = [
        Background(
            orch.plan,
            model_a,
            chat_template_override=TEMPLATE.replace("{number}", str(number)),
            llama_extra_args=["--top-k", str(number)],
        )
        for number in range(AT_ONCE)
    ]
    assert {plan.result().action for plan in plans} == {"load"}
    assert most == 1
    assert len(runs) == 1
