"""A Django backend that owns its model; what a project has in four files is here in one.

    MODEL=model.gguf gunicorn --workers 1 --threads 8 django_embed:application

`POST /ask` with `{"question": "..."}` loads the model when it is not there, and answers.
"""

import json
import os
from collections.abc import Callable

import httpx
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from orchestrator import Orchestrator, OrchestratorError

# project/settings.py
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    MIDDLEWARE=["django_embed.Problems"],
    ROOT_URLCONF="django_embed",
    SECRET_KEY=os.environ.get("SECRET_KEY", "unused: no sessions, no cookies"),
)

# project/llm.py: the one module that owns the model. Making it claims nothing: management commands
# and the reloader of `runserver` do not take the slot from the process that answers requests.
orch = Orchestrator(idle_ttl_s=900)


# project/views.py
def ask(request: HttpRequest) -> HttpResponse:
    question = json.loads(request.body)["question"]
    orch.load(os.environ["MODEL"])  # under a millisecond when it runs already
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 100}
    with orch.lease() as server:
        key = {"Authorization": f"Bearer {server.api_key}"}
        url = server.base_url + "/v1/chat/completions"
        answer = httpx.post(url, json=body, headers=key, timeout=120)
    return JsonResponse(answer.json())


def status(_: HttpRequest) -> HttpResponse:
    return JsonResponse(orch.status().as_dict())


class Problems:
    """Answer with the problem itself in place of a page about an exception."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, _: HttpRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, OrchestratorError):
            return None
        problem = error.problem.as_dict()
        kind = "application/problem+json"
        return JsonResponse(problem, status=problem["status"], content_type=kind)


# project/urls.py
urlpatterns = [path("ask", ask), path("status", status)]

application = get_wsgi_application()
