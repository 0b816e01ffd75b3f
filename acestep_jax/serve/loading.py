"""The model that is loaded: one at a time, which changes between batches."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.serve.engine import ServerError
from acestep_jax.serve.models import Model

logger = logging.getLogger(__name__)


class Loading:
    """What loads models and their adapters.

    Args:
        adapters: folders or files by name.
    """

    def __init__(self, adapters: Mapping[str, str]):
        self.adapters = adapters
        self._loaded: tuple[str, Any] | None = None

    def has(self, model: Model) -> bool:
        """Return whether a model is loaded."""
        return self._loaded is not None and self._loaded[0] == model.name

    def pipeline(self, model: Model, adapters: Sequence[tuple[str, float]] | None = None) -> Any:
        """Return the pipeline of a model with these adapters, None: any.

        Raises:
            ServerError: if it cannot be loaded; the log says why, as names of the server's files are not the client's
                business.
        """
        try:
            if not self.has(model):
                self._loaded = None  # before the next one takes its room
                self._loaded = model.name, model.load()
            assert self._loaded is not None
            pipe = self._loaded[1]
            if adapters is None:
                return pipe
            scales = dict(adapters)
            if set(pipe.adapters) != set(scales):
                pipe.unload_lora()
                for name in scales:
                    pipe.load_lora(self.adapters[name], 1.0, name=name)
            if scales and dict(pipe.adapters) != scales:
                pipe.set_adapters(scales)
        except (InputError, OSError) as error:
            logger.error("%s cannot be loaded", model.name, exc_info=error)
            raise ServerError(f"model: {model.name} cannot be loaded; the server's log has the reason") from None
        return pipe
