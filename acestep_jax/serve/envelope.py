"""The envelope of the authors' answers."""

import time
from typing import Any


def envelope(data: Any, code: int = 200, error: str | None = None) -> dict[str, Any]:
    """Return `data` as the authors' server answers it."""
    return dict(data=data, code=code, error=error, timestamp=int(1000 * time.time()), extra=None)
