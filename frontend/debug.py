"""Endpoints that only `--enable-debug-endpoints` opens: looking into a running engine.

Called by the HTTP server. A frontend that joined from elsewhere has no view of the engine's memory and none of these.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from litestar import Request, Response, post
from litestar.params import Parameter

from ipc.trace import Trace, record_for

MAX_TRACE_S: Final = 60.0


@post("/debug/trace", status_code=200)
async def trace(
    request: Request[Any, Any, Any], seconds: Annotated[float, Parameter(gt=0, le=MAX_TRACE_S)] = 5.0
) -> Response[bytes]:
    """Record every process for some seconds, then answer the trace, for ui.perfetto.dev or plot_timeline.py."""
    memory: Trace = request.app.state.trace
    start_ns = record_for(memory, seconds)
    await asyncio.sleep(seconds)
    found = await asyncio.to_thread(memory.chrome, start_ns)
    return Response(content=found, media_type="application/json")
