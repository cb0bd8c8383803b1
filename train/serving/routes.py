"""The paths of the server, as a FastAPI application around a service that may still be loading."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from train.serving.engine import QueueFullError, StoppingError
from train.serving.errors import ApiError, internal, loading, stopping
from train.serving.guard import Guard, Limits
from train.serving.mailbox import HungUpError, Inbox, Mailbox
from train.serving.metrics import Metrics
from train.serving.replies import EventReply, Reply, hang_up
from train.serving.schema import ChatBody, CompletionBody
from train.serving.service import Service

ERROR = {
    "description": "An error in OpenAI's form",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 503)
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(STATUSES, ERROR)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer"}
}


class State:
    """What the routes share. service: None while it is being loaded."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.service: Service | None = None
        self.encoder = ThreadPoolExecutor(1, "encoder")  # long prompts are encoded beside the event loop
        self._mailbox: Mailbox | None = None

    def ready(self, service: Service) -> None:
        self.metrics.watch(service.engine)
        self.service = service

    def get(self) -> Service:
        """Raises ApiError (503) before it is loaded, and when it takes no more requests."""
        if self.service is None:
            raise loading()
        if reason := self.service.engine.refusal:
            raise stopping(reason)
        return self.service

    @property
    def mailbox(self) -> Mailbox:
        """That of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox


class ErrorResponse(JSONResponse):
    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, headers=error.headers)


async def answer(state: State, body: ChatBody | CompletionBody, request: Request) -> Any:
    """The reply to a body: JSON or events."""
    service, mailbox = state.get(), state.mailbox
    read: Any = service.chat if isinstance(body, ChatBody) else service.completion
    requests = await asyncio.get_running_loop().run_in_executor(state.encoder, read, body, mailbox.deliver)
    try:
        inbox = Inbox(mailbox, service.engine, requests)
    except QueueFullError:
        raise ApiError(
            429, "as many requests wait as may. Try again later.", code="queue_full", retry_after=1
        ) from None
    except StoppingError as error:
        raise stopping(str(error)) from None
    reply = Reply(body, inbox, service.tokens, state.metrics)
    if body.stream:
        return EventReply(reply)
    gone = asyncio.create_task(hang_up(inbox, request.receive))
    try:
        return JSONResponse(await reply.whole())
    except HungUpError:
        return Response(status_code=499)  # nobody reads it
    finally:
        gone.cancel()
        inbox.close()


def application(state: State) -> Guard:
    """The ASGI application."""
    app = FastAPI(title="qwen-finetune", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _add_errors(app)

    @app.get("/health", responses={503: ERROR})
    async def health() -> dict[str, str]:
        state.get()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: ERROR})
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses={401: ERROR, 403: ERROR, 503: ERROR})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card.as_json() for card in state.get().cards.values()]}

    @app.get("/v1/models/{name:path}", responses={401: ERROR, 403: ERROR, 404: ERROR, 503: ERROR})
    async def model(name: str) -> dict[str, Any]:
        return state.get().card(name).as_json()

    @app.post("/v1/chat/completions", responses={**ERRORS, **STREAM}, response_model=None)
    async def chat(body: ChatBody, request: Request) -> Any:
        return await answer(state, body, request)

    @app.post("/v1/completions", responses={**ERRORS, **STREAM}, response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Any:
        return await answer(state, body, request)

    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return Guard(app, state.limits, state.metrics)  # type: ignore[arg-type]


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> ErrorResponse:
        return ErrorResponse(error)

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> ErrorResponse:
        return ErrorResponse(in_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> ErrorResponse:
        known = {404: "there is nothing at this path.", 405: "this path takes another method."}
        response = ErrorResponse(ApiError(error.status_code, known.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def of_us(request: Request, error: Exception) -> ErrorResponse:
        return ErrorResponse(internal())


def in_body(mistakes: Sequence[Any]) -> ApiError:
    """The first mistake of a body, and how many more there are."""
    first = mistakes[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return ApiError(400, f"{place or 'body'}: {str(first['msg'])[:300]}{more}", place or None, str(first["type"]))


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own form of errors."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema
