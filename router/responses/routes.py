"""The routes of the Responses API: make one, get one again, delete it.

1. `create` finds the response before, if there is one, and lets chat's own path generate.
2. What came of it is kept under its tenant, unless it is not to be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import Response

from engine.errors import InvalidRequest, SteelyardError
from router.answer import Answer, Generation
from router.body import read_body
from router.config import RouterConfig
from router.errors import shown
from router.keyed import caller_of
from router.metrics import Metrics
from router.openapi import OF_GENERATION, route_docs
from router.responses.body import InputItem, ResponseBody
from router.responses.records import RESPONSE_EVENTS, DeletedResponse, ResponseReply
from router.responses.replies import ResponseReplies
from router.responses.store import ResponseStore, StoredResponse
from router.responses.translate import chat_body, input_items, renamed
from router.schema import ChatBody

Begin = Callable[[HttpRequest, ChatBody], Awaitable[Generation]]


class ResponseNotFound(SteelyardError):
    """Nothing of this id is kept for this tenant."""

    code = "response_not_found"
    status = 404


@dataclass(frozen=True, slots=True)
class Responses:
    """`begin` is chat's own way to a generation."""

    begin: Begin
    metrics: Metrics
    config: RouterConfig
    store: ResponseStore
    wall_clock: Callable[[], float]

    async def create(self, http: HttpRequest) -> Response:
        body = await read_body(http, ResponseBody, self.config.max_body_bytes)
        tenant = caller_of(http).tenant.name
        items = (*self._history(tenant, body), *body.input)
        asked = chat_body(body, items)
        try:
            generation = await self.begin(http, asked)
        except InvalidRequest as error:
            raise renamed(error) from None

        def keep(reply: ResponseReply, data: bytes) -> None:
            if body.is_kept:
                self.store.put(tenant, reply.id, StoredResponse(data, (*items, *input_items(reply.output))))

        replies = ResponseReplies(body, generation.request.request_id, self.wall_clock, keep)
        return Answer(generation, replies, self.metrics, stream=bool(body.stream))

    def get(self, http: HttpRequest, response_id: str) -> Response:
        for field in http.query_params:
            raise InvalidRequest(f"'{shown(field)}': This parameter is not supported yet", param=shown(field))
        found = self.store.get(caller_of(http).tenant.name, response_id)
        if found is None:
            raise ResponseNotFound(f"No response '{shown(response_id)}' is kept here", param="response_id")
        return Response(found.reply, media_type="application/json")

    def delete(self, http: HttpRequest, response_id: str) -> DeletedResponse:
        if not self.store.delete(caller_of(http).tenant.name, response_id):
            raise ResponseNotFound(f"No response '{shown(response_id)}' is kept here", param="response_id")
        return DeletedResponse(id=response_id)

    def _history(self, tenant: str, body: ResponseBody) -> tuple[InputItem, ...]:
        if body.previous_response_id is None:
            return ()
        found = self.store.get(tenant, body.previous_response_id)
        if found is None:
            words = f"no response '{shown(body.previous_response_id)}' is kept here"
            raise InvalidRequest(f"'previous_response_id': {words}", param="previous_response_id")
        return found.items


def add_response_routes(app: FastAPI, responses: Responses) -> None:
    @app.post("/v1/responses", **route_docs(ResponseReply, OF_GENERATION, "ResponseBody", RESPONSE_EVENTS))
    async def create_response(request: HttpRequest) -> Response:
        """Generates an answer, and keeps it in this gateway's memory unless `store` is false."""
        return await responses.create(request)

    @app.get("/v1/responses/{response_id}", **route_docs(ResponseReply, (400, 404)))
    async def get_response(request: HttpRequest, response_id: str) -> Response:
        """An answer that is kept here: not for long, and not after a restart."""
        return responses.get(request, response_id)

    @app.delete("/v1/responses/{response_id}", **route_docs(DeletedResponse, (404,)))
    async def delete_response(request: HttpRequest, response_id: str) -> DeletedResponse:
        return responses.delete(request, response_id)
