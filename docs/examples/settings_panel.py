"""What a settings panel does: ask what Apply would do, show it, apply it.

python settings_panel.py http://127.0.0.1:8642 model.gguf max_seq_length=4096 cache_type_kv=q8_0
"""

import json
import sys

import httpx


def value_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


url, model, *settings = sys.argv[1:]
request: dict[str, object] = {"model_path": model}
for setting in settings:
    name, _, text = setting.partition("=")
    request[name] = value_of(text)

with httpx.Client(base_url=url + "/api/inference", timeout=None) as client:
    plan = client.post("/plan", json=request)
    if plan.is_error:  # a setting that cannot be: nothing was stopped, nothing was changed
        problem = plan.json()
        sys.exit(f"{problem.get('field')}: {problem['detail']}")
    print(f"Apply would {plan.json()['action']}")
    for reason in plan.json()["reload_reasons"]:
        print(f"  {reason['field']}: {reason['running']} -> {reason['requested']}")

    answer = client.post("/load", json=request)
    if answer.is_error:
        problem = answer.json()
        sys.exit(f"{problem['category']}: {problem['detail']}")
    print(f"{answer.json()['status']}: context {answer.json()['context_length']}")
