"""How much one request may send: a body is refused before it fills the memory."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1 << 20


class BodyLimit:
    """Answers 413 to a request whose stated or actual body is over `MAX_BODY_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body as it arrives."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if not stated.isdigit() or int(stated) > MAX_BODY_BYTES:
            await _refuse(scope, receive, send)
            return
        body = bytearray()
        message: Message = {"more_body": True}
        while message.get("more_body") and message.get("type") != "http.disconnect":
            message = await receive()
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                await _refuse(scope, receive, send)
                return

        sent: list[bool] = []

        async def replay() -> Message:
            if not sent:
                sent.append(True)
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    answer = JSONResponse({"detail": f"the body is over {MAX_BODY_BYTES} bytes"}, 413, {"Connection": "close"})
    await answer(scope, receive, send)
