"""Models of the OpenAPI document that only a pool has; see `orchestrator/http/schemas.py`."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, Field

from orchestrator.http.schemas import Body, body_of_settings
from orchestrator.pool.by_hand import ByHand
from orchestrator.pool.schema import of_added

ByHandBody: Final = body_of_settings("ByHandBody", *ByHand.__dataclass_fields__)
ENTRY_BODY: Final[dict[str, Any]] = of_added()


class NoBody(Body):
    """Nothing, or an empty object."""


class StopBody(Body):
    cut: bool = Field(default=False, description="wait for no request that uses the server")


class PinBody(Body):
    pinned: bool = Field(default=True, description="false unpins it")


class WithdrawBody(Body):
    load_request_id: str | None = Field(
        None, description="cancel only the load with this id; null = whoever wants this model"
    )


class RouterBody(Body):
    model: str = Field(description="a name of a model, or an alias")


class Done(BaseModel):
    success: Literal[True] = True


class ListedStatus(BaseModel):
    value: Literal["loaded", "loading", "unloaded", "failed"]


class Listed(BaseModel):
    """A name that requests may use."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    status: ListedStatus


class Listing(BaseModel):
    object: Literal["list"] = "list"
    data: list[Listed]
