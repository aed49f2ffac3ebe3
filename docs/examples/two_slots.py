"""Two models at once on one host: a slot each, because a slot holds one server.

python two_slots.py large.gguf small.gguf
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from orchestrator import Orchestrator, SlotOwned

large, small = sys.argv[1:]

with (
    Orchestrator(slot="answers") as answers,
    Orchestrator(slot="titles") as titles,
    ThreadPoolExecutor() as pool,
):
    for outcome in pool.map(Orchestrator.load, (answers, titles), (large, small)):
        print(f"{outcome.status}: {outcome.model_path} at {outcome.base_url}")

    answers.unload()  # the other slot does not notice
    print(f"answers: {answers.status().state}, titles: {titles.status().state}")

    try:
        Orchestrator(slot="titles").start()
    except SlotOwned as error:  # also from another process, and also after a crash
        print(error)
