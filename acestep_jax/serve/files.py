"""Responses with files of the server, whose record may be removed at any time: then they are 404, like later ones."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send


@contextlib.contextmanager
def found_or_404(missing: str) -> Iterator[None]:
    """Raise HTTPException 404 with the message `missing` for a file that is not there any more."""
    try:
        yield
    except FileNotFoundError:
        raise HTTPException(404, missing) from None


class StoredFile(FileResponse):
    """A file response that is 404 if the file has been removed since it was looked up.

    Args:
        missing: the message of the 404.
        options: see `FileResponse`.
    """

    def __init__(self, path: str | os.PathLike[str], *, missing: str, **options: Any):
        super().__init__(path, **options)
        self.missing = missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: list[Message] = []

        async def send_late(message: Message) -> None:
            """Send the head only with the first part of the body: the file is opened in between."""
            if message["type"] == "http.response.start":
                head.append(message)
                return
            while head:
                await send(head.pop())
            await send(message)

        with found_or_404(self.missing):
            self.stat_result = await run_in_threadpool(os.stat, self.path)  # otherwise FileResponse raises RuntimeError
            self.set_stat_headers(self.stat_result)
            await super().__call__(scope, receive, send_late)
