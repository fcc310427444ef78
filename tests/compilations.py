"""What a call compiles."""

from collections.abc import Callable
from typing import Any

import jax


def compilations(call: Callable[[], Any]) -> int:
    """How many programs a call compiles, or finds on disk."""
    found = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)
