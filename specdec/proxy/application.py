"""The proxy as an ASGI application."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from starlette.routing import Route, Router

from specdec.proxy.forwarder import Forwarder
from specdec.proxy.guard import Guard
from specdec.proxy.health import Health
from specdec.proxy.recorder import Recorder
from specdec.proxy.upstream import Upstream

_LAST_RECORDS_S = 5.0


def build_application(
    upstream: Upstream,
    recorder: Recorder,
    say: Callable[[str], None],
    hosts: frozenset[str] | None = None,
) -> Guard:
    """`/health`, and every other path passed on; when it shuts down it closes what it was given.

    Args:
        upstream: the server behind the proxy.
        recorder: of what passes.
        say: takes what the operator has to know, a line at a time.
        hosts: values of the header Host that are answered; None for any.
    """
    forwarder = Forwarder(upstream, recorder, say)
    health = Health(upstream, recorder, forwarder)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        yield
        # Requests that the server has just cancelled still hand in what they have.
        with anyio.move_on_after(_LAST_RECORDS_S):
            while forwarder.running:
                await anyio.sleep(0.01)
        await recorder.close()
        await upstream.close()
        say(f"recorded {recorder.recorded} requests, {_skipped(recorder)}")

    routes = [Route("/health", health.answer, methods=["GET"])]
    router = Router(routes, redirect_slashes=False, default=forwarder, lifespan=lifespan)
    return Guard(router, hosts)


def _skipped(recorder: Recorder) -> str:
    counts = recorder.budget.skipped
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"left out {counts.total()}" + (f" ({reasons})" if reasons else "")
