"""The source of a loaded model's planner, stored until the planner is needed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from acestep_jax.errors import InputError
from acestep_jax.io import cache
from acestep_jax.io.files import as_path, is_remote
from acestep_jax.io.planner import LoadedPlanner, find_local_planner, load_planner


@dataclasses.dataclass(frozen=True)
class PlannerSource:
    """The source of a planner.

    Attributes:
        source: a planner, or the model that it belongs to, see `load_planner`.
        named: whether the user named the planner, so that there must be one.
        dtype: see `load_planner`.
        hub: the options of the hub, see `native_folder`.
    """

    source: str | Path
    named: bool
    dtype: str | None = None
    hub: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, planner: str | Path | None, source: str | Path, native: Path, *, dtype: str | None, **hub: Any
    ) -> "PlannerSource":
        """Return the source of a model's planner.

        Args:
            planner: the planner given by the user, or None.
            source: source of the model, as given by the user.
            native: the folder that it was loaded from. If that is a conversion, the planner is looked up at its source.
        """
        if planner is not None:
            # The revision is of the model's repository.
            return cls(planner, True, dtype, hub | dict(revision=None))
        if (found := native / cache.SOURCE).is_file():
            source = json.loads(found.read_text(encoding="utf-8"))["source"]
        return cls(source, False, dtype, hub)

    @property
    def is_possible(self) -> bool:
        """Whether there may be a planner. For a model on the hub, this is always true: ACE-Step's planner fits all."""
        path = as_path(self.source) if is_remote(self.source) else Path(self.source).expanduser()
        if self.named or not is_remote(path) and not path.exists():
            return True
        try:
            find_local_planner(path, None)
        except InputError:
            return False
        return True

    def load(self, mesh: Mesh | None) -> LoadedPlanner:
        """Find the planner and load it, see `load_planner`."""
        return load_planner(self.source, dtype=self.dtype, mesh=mesh, **self.hub)
