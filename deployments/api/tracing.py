"""The middleware that gives each HTTP request its span."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.observe.tracing import RequestTracer


class TraceRequests:
    """ASGI middleware: a span for each request that asks for work.

    Args:
        app: everything inside.
        tracer: makes the spans.
    """

    def __init__(self, app: ASGIApp, tracer: RequestTracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its span in the scope's state."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        span = self._tracer.begin(scope)

        async def send_and_note_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        scope.setdefault("state", {})["span"] = span
        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            span.end()
