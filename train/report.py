"""The reports of a run: a progress bar, `metrics.jsonl`, TensorBoard, and `loss.png` at the end."""

import contextlib
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from acestep_jax.io import audio
from acestep_jax.io.files import files_below, is_remote, publish_file, upload
from acestep_jax.train.adamw import learning_rate
from acestep_jax.train.config import Config
from acestep_jax.train.step import Metrics

METRICS = "metrics.jsonl"


class Panel(NamedTuple):
    """Metrics drawn in one pair of axes; metrics of held-out songs have dots."""

    label: str
    lines: dict[str, str]  # from the name of each metric to its label
    title: str = ""
    scale: str = "log"


class Report:
    """The files of a run and its progress bar. With several processes, only the first writes.

    For a run in Cloud Storage, where files cannot be appended to, they are written to the local disk and copied by
    `publish` and at the end.

    Args:
        folder: folder of the run.
        step: step that the run resumes from; lines of later steps are removed.
        config: settings of the run.
        rate: latent frames per second.
        summarise: function from the `Metrics.details` of several steps to the values of a line.
        panels: panels of `loss.png`.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        config: Config,
        rate: float,
        summarise: Callable[[list[dict[str, Any]]], dict[str, float]],
        panels: Sequence[Panel],
    ):
        self.folder, self.log_every = folder, config.report.log_every
        self.rate, self.summarise, self.panels = rate, summarise, panels
        self.learning_rate = learning_rate(config.optimizer, config.steps)
        self.writes = jax.process_index() == 0
        self._since = time.perf_counter()
        self._steps: list[Metrics] = []  # since the last line
        if not self.writes:
            return
        self._disk = Path(tempfile.mkdtemp(prefix="acestep-jax-run-")) if is_remote(folder) else folder
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
        with publish_file(self._disk / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._file = (self._disk / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._disk / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=config.steps, initial=step, unit="step", disable=None)

    def add(self, step: int, metrics: Metrics) -> None:
        """Report a step; write a line every `log_every` steps."""
        if not self.writes:
            return
        self._steps.append(jax.tree.map(np.asarray, metrics))
        self._bar.update()
        self._bar.set_postfix(loss=f"{float(metrics.loss):.4f}", refresh=False)
        if step % self.log_every:
            return
        made, self._steps = self._steps, []
        # Skipped steps must not make the means non-finite.
        good = [one for one in made if np.isfinite(one.loss + one.grad_norm)] or made
        before, self._since = self._since, time.perf_counter()
        row = {
            "loss": float(np.mean([one.loss for one in good])),
            "gradient_norm": float(np.mean([one.grad_norm for one in good])),
            "learning_rate": float(np.asarray(self.learning_rate(int(metrics.updates)))),
            "bad_steps": sum(int(one.bad_steps) > 0 for one in made),
            "audio_seconds_per_second": float(sum(one.frames for one in made)) / self.rate / (self._since - before),
            "memory_gb": memory_gb(),
        }
        self.write(step, row | self.summarise([one.details for one in made]))

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write a line to `metrics.jsonl` and the same values to TensorBoard; do nothing if `row` is empty."""
        if not self.writes or not row:
            return
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def sample(self, step: int, i: int, prompt: str, song: np.ndarray, sample_rate: int) -> None:
        """Write a sample [channels, samples] to `samples/step-000100-0.wav` and to TensorBoard."""
        if self.writes:
            folder = self.folder / "samples"
            folder.mkdir(parents=is_remote(folder), exist_ok=True)
            audio.write(folder / f"step-{step:06}-{i}.wav", song, sample_rate, overwrite=True)
            self._board.add_audio(f"sample {i}: {prompt[:60]}", song.T, step, sample_rate)

    def publish(self) -> None:
        """Copy the files to the folder of the run, unless they are written there directly."""
        if self.writes and self._disk != self.folder:
            self._board.flush()
            for name in files_below(self._disk):
                upload(self._disk / name, self.folder / name)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside from the training time."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Draw `loss.png`. If the run failed, ignore disk errors here, so that the original error is reported."""
        if self.writes:
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._bar.close()
                self._file.close()
                self._board.close()
                draw(self._disk, self.panels)
                self.publish()
            if self._disk != self.folder:
                shutil.rmtree(self._disk, ignore_errors=True)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`; skip a line that was truncated when the process was killed."""
    rows = []
    if (folder / METRICS).is_file():
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def memory_gb() -> float:
    """Return the peak memory in GB of the first device or, if the backend does not report it, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def draw(folder: Path, panels: Sequence[Panel]) -> None:
    """Draw `loss.png` from `metrics.jsonl`, without pyplot, whose backend may be in use (such as a notebook's)."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for name, label in panel.lines.items():
            if points := [(row["step"], row[name]) for row in rows if row.get(name) is not None]:
                marker = "o" if name.startswith("validation_") else ""
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, linewidth=1)
        axes.set(xlabel="step", ylabel=panel.label, title=panel.title, yscale=panel.scale)
        if axes.lines:
            axes.legend()
    with publish_file(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
