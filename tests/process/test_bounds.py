"""What callers ask for without end is not kept without end."""

from __future__ import annotations

import contextlib
import gc

from orchestrator import LoadRequest
from orchestrator.errors import Busy
from tests.kit.process.support import Fake, Make

ASKED = 3000
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
    assert len(kept) < 500
    assert len(orch.history(256)) <= 256
    assert orch.cancel(generation=orch.status().generation)
    with contextlib.suppress(Exception):
        orch.unload()
