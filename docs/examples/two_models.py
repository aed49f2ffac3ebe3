"""Two models by name in a budget that holds one of them: each request gets the model it names.

python two_models.py first.gguf second.gguf
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from orchestrator import ModelPool

first, second = sys.argv[1:]
catalogue = {
    "pool": {"max_resident": 1, "min_resident_s": 0, "max_wait_s": 1},
    "models": {"first": {"model_path": first}, "second": {"model_path": second}},
}


def use(name: str) -> str:
    with pool.lease(name) as server:  # loads the model if it is not resident
        return f"{name}: pid {server.pid}"


with ModelPool(catalogue) as pool:
    print(use("first"))
    print(use("second"))  # there is room for one: the first, which nobody uses, is stopped
    plan = pool.plan("first")
    print(f"first: {plan.action}, would evict {plan.evict}, fits: {plan.fits}")
    with ThreadPoolExecutor() as threads:  # requests for both at once take turns
        for line in threads.map(use, ["first", "second"]):
            print(line)
    print({model.name: model.state.value for model in pool.status().models})
