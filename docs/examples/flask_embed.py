"""A Flask backend that owns its model.

    MODEL=model.gguf gunicorn --workers 1 --threads 8 flask_embed:app

`POST /ask` with `{"question": "..."}` loads the model when it is not there, and answers.
"""

import os
from typing import Any

import httpx
from flask import Flask, request

from orchestrator import Orchestrator, OrchestratorError

app = Flask(__name__)
orch = Orchestrator(idle_ttl_s=900)  # claims its slot with the first call, so in the worker


@app.post("/ask")
def ask() -> Any:
    orch.load(os.environ["MODEL"])  # under a millisecond when it runs already
    body = {"messages": [{"role": "user", "content": request.json["question"]}], "max_tokens": 100}
    with orch.lease() as server:
        key = {"Authorization": f"Bearer {server.api_key}"}
        url = server.base_url + "/v1/chat/completions"
        answer = httpx.post(url, json=body, headers=key, timeout=120)
    return answer.json()


@app.get("/status")
def status() -> Any:
    return orch.status().as_dict()


@app.errorhandler(OrchestratorError)
def failed(error: OrchestratorError) -> Any:
    problem = error.problem.as_dict()
    return problem, problem["status"], {"Content-Type": "application/problem+json"}
