"""`acestep-jax train preprocess`: songs through the autoencoder and their texts through the text encoder, once.

Work is never repeated: a run that was stopped resumes after its last shard, and a later run encodes only what changed.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import pad_tokens
from acestep_jax.inputs.prompt import lyric_text, prompt_text, tokenize
from acestep_jax.io import audio
from acestep_jax.io import checkpoint as checkpoints
from acestep_jax.io.manifest import default_dtype
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.config import check_dtype
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.request import MAX_LYRIC_TOKENS, MAX_PROMPT_TOKENS
from acestep_jax.train import data_folder
from acestep_jax.train.config import TASKS
from acestep_jax.train.data_folder import Index, Song
from acestep_jax.train.sidecars import Sidecars, Texts

# Formats that libsndfile cannot read are included, so that such files are reported.
SUFFIXES = frozenset(".wav .flac .mp3 .ogg .opus .aif .aiff .m4a .aac .mp4 .wma".split())
MIN_SECONDS, MIN_PEAK = 1.0, 1e-4
MAX_CROP_SECONDS = 600.0
SHARD_SONGS, SHARD_BYTES = 32, 128 * 2**20  # a shard ends at whichever comes first
MOST_LINES = 20  # of a list in the summary


def preprocess(
    audio_dir: str | Path,
    data_dir: str | Path,
    *,
    checkpoint: str | Path,
    crop_seconds: Sequence[float] = (60.0,),
    dtype: str | None = None,
) -> Index:
    """Update a data folder to a folder of songs, and print what was done.

    A song is recognised by its size and time of change, else by its bytes: it is encoded once, also if it is moved. New
    texts or crops encode only the text. Songs that no longer exist leave the index.

    Args:
        audio_dir: searched with its subfolders; see `train.sidecars` for the files beside a song.
        data_dir: created if it does not exist.
        checkpoint: native; its autoencoder, text encoder and tokenizer are used.
        crop_seconds: lengths of the crops to train on, in seconds, 1 to 600.
        dtype: of weights and computation, one of `config.DTYPES`; None: as stored.

    Returns:
        The index. Files that cannot be used (unreadable, silent, shorter than a second) are in `skipped`, with reasons.

    Raises:
        InputError: if no file or an argument can be used, `data_dir` is of another checkpoint or dtype, or the disk is
            full; what was done until then is kept.
    """
    audio_dir, data_dir = Path(audio_dir), Path(data_dir)
    if not crop_seconds or not all(MIN_SECONDS <= crop <= MAX_CROP_SECONDS for crop in crop_seconds):
        raise InputError(f"crop_seconds: expected 1 to {MAX_CROP_SECONDS:g} seconds, found {list(crop_seconds)}")
    if dtype is not None:
        check_dtype(dtype)
    sources = find_audio(audio_dir)
    _check_destination(data_dir)
    sidecars = Sidecars(audio_dir, sources)
    manifest = checkpoints.read_manifest(checkpoint)
    stored = checkpoints.network_leaves(Path(checkpoint), manifest)["text_encoder"]
    vae: Any = manifest.configs["vae"]
    index = Index(
        checkpoint=data_folder.fingerprint(checkpoint),
        dtype=dtype or default_dtype(manifest, "text_encoder", stored),
        latents_per_second=vae.sampling_rate / vae.hop_length,
        latent_channels=vae.decoder_input_channels,
        crop_seconds=tuple(sorted({float(crop) for crop in crop_seconds})),
    )
    old = _read_old(data_dir, index)
    by_source = {song.source: song for song in old.songs}
    by_content = {song.sha256: song for song in old.songs}
    encoder, writer = _Encoder(checkpoint, dtype), _Writer(data_dir, index, old)
    counts, fallbacks, skipped = Counter(), [], []

    with writer:
        for source in tqdm(sources, unit="song"):
            file, sound = audio_dir / source, np.empty((0, 0))
            shown = source.encode(errors="backslashreplace").decode()
            try:
                if shown != source:
                    raise InputError("its name is not UTF-8; rename it")
                texts = sidecars.read(source)
                stat = file.stat()
                known = by_source.get(source)
                if known is None or (known.size, known.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                    sha256 = data_folder.file_sha256(file)
                    known = by_content.get(sha256)
                else:
                    sha256 = known.sha256
                if known is None:
                    sound = _read(file, vae.sampling_rate, vae.audio_channels)
                seconds = sound.shape[1] / vae.sampling_rate if known is None else known.seconds
            except (InputError, OSError) as error:
                skipped.append((shown, str(error).removeprefix(f"{file}: ")))
                continue
            prompts, words = _prompts(texts, seconds, index.crop_seconds), lyric_text(texts.lyrics, texts.language)
            values = dataclasses.asdict(texts)
            if values.pop("fallback"):
                fallbacks.append(source)
            values |= dict(source=source, sha256=sha256, size=stat.st_size, mtime_ns=stat.st_mtime_ns, seconds=seconds)
            values |= dict(text_sha256=data_folder.text_sha256([prompts, words]))
            if known is not None and known.text_sha256 == values["text_sha256"]:
                counts["as before"] += 1
                writer.keep(dataclasses.replace(known, **values))
                continue
            if known is not None:
                counts["with new texts"] += 1
                (record,) = data_folder.read_records(data_dir / known.shard, [known.row])
                mean, std = record["mean"], record["std"]
            else:
                counts["encoded"] += 1
                mean, std = encoder.posterior(sound)
            record = dict(mean=mean, std=std, **encoder.texts(source, prompts, words))
            values |= dict(frames=len(mean), lyric_tokens=len(record["lyric_ids"]))
            values |= dict(prompt_tokens=max(len(record[key]) for key in prompts))
            writer.add(values, data_folder.encode_record(record))

    if not writer.songs:
        reasons = "".join(f"\n  {source}: {reason}" for source, reason in skipped)
        raise InputError(f"{audio_dir}: none of {len(sources)} audio files can be used:{reasons}")
    index = dataclasses.replace(index, songs=tuple(writer.songs.values()), skipped=tuple(skipped), complete=True)
    if index == old:
        print(f"{data_dir}: nothing to do")
    else:
        data_folder.write_index(data_dir, index)
    _remove_leftovers(data_dir, index)
    _report(data_dir, index, counts, fallbacks, sidecars.warnings)
    return index


def _load(path: str | Path, dtype: str | None, name: str) -> Any:
    return checkpoints.load(path, dtype=dtype, names=[name])[name]


class _Encoder:
    """The networks of a checkpoint, each loaded when it is first needed."""

    def __init__(self, path: str | Path, dtype: str | None):
        self._load = functools.cache(lambda name: _load(path, dtype, name))
        self._tokenizer = checkpoints.load_tokenizer(path)

    def posterior(self, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and standard deviation, [frames, 64] float32, of the posterior of [channels, samples]."""
        vae = self._load("vae")
        samples, hop = sound.shape[1], vae.hop_length
        padding = BUCKETS.frames_of(-(-samples // hop)) * hop - samples
        mean, std = _posterior(vae, np.pad(sound, ((0, 0), (0, padding)))[None], np.array([samples], np.int32))
        return np.asarray(mean)[0, : samples // hop], np.asarray(std)[0, : samples // hop]

    def texts(self, source: str, prompts: dict[str, str], words: str) -> dict[str, np.ndarray]:
        """Return the arrays of a record other than the posterior. Warn of texts that are too long, naming `source`."""
        rows = tokenize(self._tokenizer, list(prompts.values()), max_length=MAX_PROMPT_TOKENS, what=f"{source}: prompt")
        tokens = pad_tokens(rows, BUCKETS.prompt, 0)
        hidden = np.asarray(_hidden_states(self._load("text_encoder"), tokens.ids))
        (lyric_ids,) = tokenize(self._tokenizer, [words], max_length=MAX_LYRIC_TOKENS, what=f"{source}: lyrics")
        arrays = {key: states[mask] for key, states, mask in zip(prompts, hidden, tokens.mask, strict=True)}
        return arrays | {"lyric_ids": lyric_ids}


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _posterior(vae: AutoencoderOobleck, sound: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    posterior = vae.encode(sound, lengths)
    return posterior.mean.astype(jnp.float32), posterior.std.astype(jnp.float32)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _hidden_states(text_encoder: Qwen3Model, ids: jax.Array) -> jax.Array:
    return text_encoder(ids)


class _Writer:
    """Gathers records into shards. After each shard, the index lists the finished songs and those of the old index that
    were not checked yet: they may be needed if this run is stopped.

    songs: finished songs, in order, by source.
    """

    def __init__(self, folder: Path, index: Index, old: Index):
        self._folder, self._index, self._old = folder, index, old
        self.songs: dict[str, Song | None] = {}
        self._pending: list[tuple[dict, bytes]] = []
        self._next = 1 + max((int(shard[6:11]) for shard in _shards(folder)), default=-1)

    def keep(self, song: Song) -> None:
        """Add a song whose record exists already."""
        self.songs[song.source] = song

    def add(self, values: dict, record: bytes) -> None:
        """Add a song, except for its place in a shard, and its record."""
        self.songs[values["source"]] = None  # reserves its place in the order
        self._pending.append((values, record))
        if len(self._pending) >= SHARD_SONGS or sum(len(record) for _, record in self._pending) >= SHARD_BYTES:
            self.flush()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # Also after a failure of another kind, such as too little memory for one song: the others are finished.
        if kind is None or not issubclass(kind, InputError):
            self.flush()

    def flush(self) -> None:
        """Write the gathered records as a shard, and the index."""
        if not self._pending:
            return
        self._folder.mkdir(exist_ok=True)
        shard = f"songs-{self._next:05d}.array_record"
        data_folder.write_shard(self._folder / shard, [record for _, record in self._pending])
        for row, (values, _) in enumerate(self._pending):
            self.songs[values["source"]] = Song(**values, shard=shard, row=row)
        self._pending, self._next = [], self._next + 1
        rest = [song for song in self._old.songs if song.source not in self.songs]
        data_folder.write_index(
            self._folder, dataclasses.replace(self._index, songs=(*self.songs.values(), *rest), complete=False)
        )


def find_audio(audio_dir: Path) -> list[str]:
    """Return the audio files below a folder, as relative paths, sorted; raise InputError if there are none."""
    if not audio_dir.is_dir():
        raise InputError(f"{audio_dir}: no such folder; expected one with songs")
    files = (file for file in audio_dir.rglob("*") if file.suffix.lower() in SUFFIXES)
    sources = [file.relative_to(audio_dir).as_posix() for file in files if file.is_file() and file.name[0] != "."]
    if not sources:
        raise InputError(f"{audio_dir}: no audio files here or below; expected {', '.join(sorted(SUFFIXES))}")
    return sorted(sources)


def _check_destination(data_dir: Path) -> None:
    if not data_dir.absolute().parent.is_dir():
        raise InputError(f"{data_dir}: the folder {data_dir.absolute().parent} does not exist; create it first")
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"{data_dir}: is a file; choose another name")


def _read_old(data_dir: Path, index: Index) -> Index:
    """Read the index of the data folder; return `index` if there is none. Raise InputError if it is of another
    checkpoint or dtype."""
    if not (data_dir / data_folder.INDEX).exists():
        return index
    old = data_folder.read_index(data_dir, unfinished=True)
    for name in ("checkpoint", "dtype"):
        theirs, ours = getattr(old, name)[:12], getattr(index, name)[:12]
        if getattr(old, name) != getattr(index, name):
            raise InputError(
                f"{data_dir}: holds data of {name} {theirs}, but {name} is now {ours}; give the same {name} or another "
                "DATA_DIR"
            )
    _remove_leftovers(data_dir, old)
    return old


def _read(file: Path, sample_rate: int, channels: int) -> np.ndarray:
    sound = audio.read(file, sample_rate, channels)
    if (seconds := sound.shape[1] / sample_rate) < MIN_SECONDS:
        raise InputError(f"too short: {seconds:.2f} s, expected at least {MIN_SECONDS:g} s")
    if (peak := np.abs(sound).max()) < MIN_PEAK:
        raise InputError(f"silent: its peak is {peak:.1e}, expected at least {MIN_PEAK:g}")
    return sound


def _prompts(texts: Texts, seconds: float, crop_seconds: Sequence[float]) -> dict[str, str]:
    """Return the prompts of a song, by their names in a record."""
    return {
        data_folder.text_key(task, duration): prompt_text(
            texts.caption,
            audio_duration=duration,
            bpm=texts.bpm,
            keyscale=texts.keyscale,
            timesignature=texts.timesignature,
            instruction=tasks.instruction(task),
        )
        for duration in data_folder.crop_durations(seconds, crop_seconds)
        for task in TASKS
    }


def _shards(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("songs-*") if re.fullmatch(r"songs-\d{5}\.array_record", file.name)]


def _remove_leftovers(folder: Path, index: Index) -> None:
    """Delete shards without songs, and files that a killed run has not completed."""
    used = {song.shard for song in index.songs}
    begun = [file.name for kind in ("songs-*.array_record", data_folder.INDEX) for file in folder.glob(f".*-{kind}")]
    for name in [*begun, *(shard for shard in _shards(folder) if shard not in used)]:
        (folder / name).unlink(missing_ok=True)


def _report(data_dir: Path, index: Index, counts: Counter, fallbacks: list[str], warnings: list[str]) -> None:
    minutes = sum(song.seconds for song in index.songs) / 60
    shards = len({song.shard for song in index.songs})
    done = ", ".join(f"{count} {what}" for what, count in counts.items())
    songs = "1 song" if len(index.songs) == 1 else f"{len(index.songs)} songs"
    print(f"{data_dir}: {songs} ({done}), {minutes:.1f} min, {shards} shard(s)")
    for title, lines in (
        (f"skipped {len(index.skipped)} file(s)", [f"{source}: {reason}" for source, reason in index.skipped]),
        (f"{len(warnings)} value(s) ignored", warnings),
        (f"no caption for {len(fallbacks)} song(s), used the file name", fallbacks),
    ):
        if lines:
            more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
            print(f"{title}:", *lines[:MOST_LINES], *more, sep="\n  ")
