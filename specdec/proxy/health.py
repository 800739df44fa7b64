"""`/health`: what an operator or a load balancer asks."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from specdec.proxy.forwarder import Forwarder
from specdec.proxy.recorder import Recorder
from specdec.proxy.upstream import Upstream


class Health:
    """Answers 200 while requests can be served, and 503 while the upstream cannot be reached."""

    def __init__(self, upstream: Upstream, recorder: Recorder, forwarder: Forwarder) -> None:
        self._upstream = upstream
        self._recorder = recorder
        self._forwarder = forwarder

    async def answer(self, request: Request) -> JSONResponse:
        """The state of serving and of recording."""
        upstream = await self._upstream.health()
        state = self._state(upstream)
        return JSONResponse(state, 200 if upstream["reachable"] else 503)

    def _state(self, upstream: dict[str, Any]) -> dict[str, Any]:
        recorder = self._recorder
        status = "not recording" if recorder.trouble else "ok"
        return {
            "status": status if upstream["reachable"] else "upstream unreachable",
            "upstream": upstream,
            "recording": not recorder.trouble,
            "why_not": recorder.trouble or None,
            "recorded": recorder.recorded,
            "skipped": dict(recorder.budget.skipped),
            "bytes": recorder.total_bytes,
            "file": recorder.file_name,
            "running": self._forwarder.running,
            "held_bytes": recorder.budget.held_bytes,
            "last_error": recorder.last_error or None,
        }
