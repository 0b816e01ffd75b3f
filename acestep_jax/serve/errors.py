"""Error responses in the format of the path's protocol."""

from typing import Any

from acestep_jax.serve.submission import field_of

CPP = ("/lm", "/synth", "/understand", "/vae", "/job", "/props")
CHAT = ("/v1/chat/", "/v1/audio/music/", "/v1/models")
KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def error_body(path: str, status: int, detail: str) -> dict[str, Any]:
    """Return the body of an error: text for acestep.cpp, an object for OpenAI, else a `detail` as in FastAPI."""
    if path in CPP:
        return dict(error=detail)
    body: dict[str, Any] = dict(detail=detail)
    if path.startswith(CHAT):
        body["error"] = dict(message=detail, type=KINDS.get(status, "server_error"), code=status)
    if field := field_of(detail):
        body["field"] = field
    return body
