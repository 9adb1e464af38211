"""The app: OpenAI's routes over an engine, and the few that every server of models has."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..errors import RequestError
from .chat import chat_routes, conversation
from .completions import completion_routes
from .generation import Client, check_model, encode, off_loop
from .limits import KNOWN_ROUTES, Gate, Guard, Limits
from .metrics import Metrics
from .replies import Json, error_body, error_response, status_response
from .schemas import DetokenizeBody, TokenizeBody


def make_app(
    client: Client, *, api_key: str | None = None, limits: Limits | None = None, gate: Gate | None = None
) -> FastAPI:
    """The ASGI app that serves `client`. Setting `gate.draining` makes it refuse new requests."""
    app = FastAPI(
        title="undistilled",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    metrics = Metrics(client.stats)
    app.include_router(completion_routes(client, metrics))
    app.include_router(chat_routes(client, metrics))
    app.include_router(model_routes(client))
    app.include_router(service_routes(client, metrics))
    app.include_router(token_routes(client))
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(UnicodeEncodeError, _on_surrogate)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(Guard, gate=gate or Gate(), limits=limits or Limits(), metrics=metrics, api_key=api_key)
    return app


def model_routes(client: Client) -> APIRouter:
    router = APIRouter()
    card = {
        "id": client.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "undistilled",
        "max_model_len": client.max_context,
    }

    @router.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [card]})

    @router.get("/v1/models/{id:path}")
    async def model(id: str) -> Response:
        check_model(id, client)
        return Json(card)

    return router


def service_routes(client: Client, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        if not client.alive:
            return status_response(503, client.trouble)
        return Json({"status": "ok"})

    @router.get("/metrics")
    async def text() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def version() -> Response:
        return Json({"version": __version__})

    return router


def token_routes(client: Client) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        check_model(body.model, client)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Give either prompt or messages.", param="prompt")
        if body.prompt is not None:
            ids = await encode(client.tokenizer, body.prompt, body.parse_special, body.add_special_tokens)
        else:
            ids = (await conversation(client, body.messages or [], None, body.add_generation_prompt)).ids
        return Json({"tokens": ids, "count": len(ids), "max_model_len": client.max_context})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        check_model(body.model, client)
        if any(not 0 <= id < client.vocab for id in body.tokens):
            raise RequestError(f"A token id is outside 0 to {client.vocab - 1}.", param="tokens")
        decode = client.tokenizer.decode
        return Json({"prompt": await off_loop(len(body.tokens), decode, body.tokens, body.skip_special_tokens)})

    return router


async def _on_request_error(request: Request, error: Any) -> Response:
    return error_response(error)


async def _on_invalid(request: Request, error: Any) -> Response:
    """The first thing that is wrong, with the parameter's name. Never echoes the input, which may be NaN or huge."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return Json(error_body("The body is not valid JSON.", code="invalid_json"), 400)
    if not where and "json" not in request.headers.get("content-type", ""):
        return Json(error_body("Send JSON, with Content-Type: application/json.", code="invalid_json"), 400)
    message = f"{'.'.join(where[:4])}: {first['msg']}." if where else "The body must be a JSON object."
    return Json(error_body(message[:500], param=where[0] if where else None, code=first["type"]), 400)


async def _on_surrogate(request: Request, error: Any) -> Response:
    return Json(error_body("A text has half of a surrogate pair.", code="invalid_json"), 400)


async def _on_http(request: Request, error: Any) -> Response:
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"There is no such route. Those that exist: {', '.join(sorted(KNOWN_ROUTES))}."
    return status_response(error.status_code, detail, error.headers)


async def _on_bug(request: Request, error: Any) -> Response:
    return status_response(500, "The server failed on this request; its log says how.")
