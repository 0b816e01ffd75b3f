"""What is seen of a run: a progress bar, `metrics.jsonl`, TensorBoard, and `loss.png` at the end."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from acestep_jax.train.step import Metrics
from tensorboardX import SummaryWriter
from tqdm import tqdm

from acestep_jax.io import audio

TIME_BUCKETS = 5  # equal parts of [0, 1] whose losses are reported apart

METRICS = "metrics.jsonl"


class Log:
    """The files of a run and its progress bar. Of one process; those but the first write nothing.

    Args:
        folder: of the run.
        step: the one that the run goes on from; lines of later ones are removed.
        log_every: steps that a line sums up.
    """

    def __init__(self, folder: Path, step: int, steps: int, log_every: int):
        self.folder, self.log_every = folder, log_every
        self.writes = jax.process_index() == 0
        self._since = time.perf_counter()
        if not self.writes:
            return
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
        temporary = folder / f".{METRICS}"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None)

    def panels(self) -> list["Panel"]:
        """What `loss.png` shows."""
        raise NotImplementedError

    def advance(self, loss: float) -> None:
        """The bar, by a step."""
        self._bar.update()
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within does not count as training time."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds of training since the last call, or the beginning."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Draws `loss.png`; if the run failed, then as far as the disk allows, so that its error is the one told."""
        if self.writes:
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._bar.close()
                self._file.close()
                self._board.close()
                draw(self.folder, self.panels())

    def write(self, step: int, row: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`, and the same in TensorBoard."""
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)


class Report(Log):
    """Of fine-tuning; the arguments are those of `Log`."""

    def __init__(self, folder: Path, step: int, steps: int, log_every: int, latents_per_second: float):
        super().__init__(folder, step, steps, log_every)
        self.rate = latents_per_second
        self._losses: list[tuple[float, float]] = []  # of steps since the last line: loss, gradient norm
        self._errors: list[np.ndarray] = []  # of their examples: t, error
        self._frames, self._bad = 0.0, 0

    def add(self, step: int, metrics: Metrics, learning_rate: Callable[[int], float]) -> None:
        """One step more; `learning_rate` by how many updates were made before."""
        loss = float(metrics.loss)
        self._losses.append((loss, float(metrics.grad_norm)))
        self._errors.append(np.stack([np.asarray(metrics.t), np.asarray(metrics.errors)]))
        self._frames += float(metrics.frames)
        self._bad += int(metrics.bad_steps) > 0
        if not self.writes:
            return
        self.advance(loss)
        if step % self.log_every:
            return
        seconds = self.lap()
        # A step that is left out must not make the line of all others no number.
        loss, norm = np.array([pair for pair in self._losses if math.isfinite(sum(pair))] or [(math.nan,) * 2]).mean(0)
        rate = float(learning_rate(int(metrics.updates)))
        row = {"loss": float(loss), "gradient_norm": float(norm), "learning_rate": rate}
        t, errors = np.concatenate(self._errors, axis=1)
        for i in range(TIME_BUCKETS):
            low, high = i / TIME_BUCKETS, (i + 1) / TIME_BUCKETS
            if len(inside := errors[(t >= low) & (t < high) & np.isfinite(errors)]):
                row[f"loss_t_{low:.1f}_{high:.1f}"] = float(inside.mean())
        row |= {
            "bad_steps": self._bad,
            "audio_seconds_per_second": self._frames / self.rate / seconds,
            "memory_gb": memory_gb(),
        }
        self.write(step, row)
        self._losses, self._errors, self._frames, self._bad = [], [], 0.0, 0

    def validation(self, step: int, loss: float, times: np.ndarray, by_time: np.ndarray) -> None:
        """The mean loss of held-out songs, and the loss at each of the times."""
        if self.writes:
            named = {f"validation_loss_t_{t:.3f}": float(value) for t, value in zip(times, by_time, strict=True)}
            self.write(step, {"validation_loss": loss} | named)

    def sample(self, step: int, i: int, prompt: str, song: np.ndarray, sample_rate: int) -> None:
        """A sample [channels, samples], as `samples/step-000100-0.wav` and in TensorBoard."""
        if self.writes:
            folder = self.folder / "samples"
            folder.mkdir(exist_ok=True)
            audio.write(folder / f"step-{step:06}-{i}.wav", song, sample_rate, overwrite=True)
            self._board.add_audio(f"sample {i}: {prompt[:60]}", song.T, step, sample_rate)

    def panels(self) -> list["Panel"]:
        times = [(i / TIME_BUCKETS, (i + 1) / TIME_BUCKETS) for i in range(TIME_BUCKETS)]
        by_time = {f"loss_t_{low:.1f}_{high:.1f}": f"{low:.1f} to {high:.1f}" for low, high in times}
        label = "mean squared error of the velocity"
        return [
            Panel(label, {"loss": "training", "validation_loss": "held-out songs"}),
            Panel(label, by_time, "training, by time t"),
        ]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that a kill has cut short is left out."""
    rows = []
    if (folder / METRICS).is_file():
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def memory_gb() -> float:
    """Peak memory in GB of the first device or, where the backend does not tell, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Panel(NamedTuple):
    """Metrics in one pair of axes; those of held-out songs with dots."""

    label: str
    lines: dict[str, str]  # name of the metric to what it is called
    title: str = ""
    scale: str = "log"


def draw(folder: Path, panels: list[Panel]) -> None:
    """`loss.png`, from `metrics.jsonl`. Without pyplot, whose backend is the caller's, such as a notebook."""
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
    temporary = folder / ".loss.png"
    figure.savefig(temporary, dpi=120)
    temporary.replace(folder / "loss.png")
