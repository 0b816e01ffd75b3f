"""The envelope of responses in the authors' protocol."""

import time
from typing import Any


def envelope(data: Any, code: int = 200, error: str | None = None) -> dict[str, Any]:
    """Return `data` in the envelope of the authors' server."""
    return dict(data=data, code=code, error=error, timestamp=int(1000 * time.time()), extra=None)
