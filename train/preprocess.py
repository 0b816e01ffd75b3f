"""`acestep-jax train preprocess`: encode songs with the autoencoder and their texts with the text encoder, once.

No work is repeated: an interrupted run resumes after its last shard, and a later run encodes only what changed.
With several processes, each encodes some of the songs into its own folder `part-N`; then the first process goes over
all songs as if it were the only one, and takes the records from these folders.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from acestep_jax import preemption
from acestep_jax.distributed import all_succeed
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import pad_tokens
from acestep_jax.inputs.prompt import CUT_RULE, lyric_text, prompt_text, tokenize
from acestep_jax.inputs.settings import defaults_of
from acestep_jax.io import audio
from acestep_jax.io import checkpoint as checkpoints
from acestep_jax.io.files import (
    as_path,
    check_parent,
    check_writable,
    is_remote,
    remove_tree,
    size_and_time,
)
from acestep_jax.io.manifest import check_unquantized, default_dtype
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.runtime import check_dtype
from acestep_jax.request import MAX_LYRIC_TOKENS, MAX_PROMPT_TOKENS, Sampling
from acestep_jax.settings import with_own_settings
from acestep_jax.train import data_folder
from acestep_jax.train.audio_files import find_files
from acestep_jax.train.config import TASKS
from acestep_jax.train.data_folder import Index, IndexEntry
from acestep_jax.train.records import PART, ExistingRecords, ShardWriter, remove_leftovers
from acestep_jax.train.sidecars import INSTRUMENTAL, Sidecars, Texts

MIN_SECONDS, MIN_PEAK = 1.0, 1e-4
MAX_CROP_SECONDS = 600.0
MOST_LINES = 20  # length of a list in the summary


@with_own_settings
def preprocess(
    audio_dir: str | Path,
    data_dir: str | Path,
    *,
    checkpoint: str | Path,
    crop_seconds: Sequence[float] = (60.0,),
    dtype: str | None = None,
) -> Index:
    """Bring a data folder up to date with a folder of songs, and print a summary.

    A song is identified by its size and modification time, else by its bytes, so it is encoded once even if it is
    moved. If only the texts or crop lengths changed, only the text is encoded again. Songs that no longer exist are
    removed from the index. Several processes divide the songs among them; the result is the same as with one.

    Args:
        audio_dir: folder of songs, searched with its subfolders; see `train.sidecars` for the files next to a song.
        data_dir: data folder; created if it does not exist.
        checkpoint: native checkpoint, of which the autoencoder, text encoder and tokenizer are used.
        crop_seconds: lengths of the crops to train on, in seconds, 1 to 600.
        dtype: dtype of weights and computation, one of `runtime.DTYPES`; None: as stored.

    Returns:
        The index. Files that cannot be used (unreadable, silent, shorter than a second) are in `skipped`, with reasons.

    Raises:
        InputError: if an argument is invalid, no file can be used, `data_dir` belongs to another checkpoint or dtype,
            or the disk is full; finished work is kept.
        Preempted: after SIGTERM, see `acestep_jax.preemption`; finished work is kept.
    """
    audio_dir, data_dir = as_path(audio_dir), as_path(data_dir)
    if not crop_seconds or not all(MIN_SECONDS <= crop <= MAX_CROP_SECONDS for crop in crop_seconds):
        raise InputError(f"crop_seconds: expected 1 to {MAX_CROP_SECONDS:g} seconds, found {list(crop_seconds)}")
    if dtype is not None:
        check_dtype(dtype)
    sources, others = find_files(audio_dir)
    _check_destination(data_dir)
    manifest = checkpoints.read_manifest(checkpoint)
    check_unquantized(checkpoint, manifest, "training needs")
    # Songs without a language get the same default as in generation.
    defaults = defaults_of(Sampling(), manifest.configs.get("transformer"), manifest.sampling)  # pyright: ignore[reportArgumentType]
    sidecars = Sidecars(audio_dir, sources, defaults.vocal_language)
    stored = checkpoints.network_leaves(as_path(checkpoint), manifest)["text_encoder"]
    vae: Any = manifest.configs["vae"]
    index = Index(
        checkpoint=data_folder.fingerprint(checkpoint),
        dtype=dtype or default_dtype(manifest, "text_encoder", stored),
        latents_per_second=vae.sampling_rate / vae.hop_length,
        latent_channels=vae.decoder_input_channels,
        crop_seconds=tuple(sorted({float(crop) for crop in crop_seconds})),
    )
    encoder = _Encoder(checkpoint, dtype, vae)
    with all_succeed():
        old = ExistingRecords(data_dir, index)
    process, processes = jax.process_index(), jax.process_count()
    if processes > 1:
        with all_succeed():
            part = f"{PART}{process}"
            data_dir.mkdir(parents=is_remote(data_dir), exist_ok=True)
            writer = ShardWriter(data_dir / part, index, old.parts.get(part, index).songs)
            _encode(audio_dir, data_dir, sources[process::processes], old, sidecars, encoder, writer, of_part=True)
    with all_succeed():
        if process == 0:
            old = ExistingRecords(data_dir, index) if processes > 1 else old
            writer = ShardWriter(data_dir, index, old.songs)
            done = _encode(audio_dir, data_dir, sources, old, sidecars, encoder, writer)
            if not writer.songs:
                reasons = "".join(f"\n  {source}: {reason}" for source, reason in done.skipped)
                raise InputError(f"{audio_dir}: none of {len(sources)} audio files can be used:{reasons}")
            songs: Any = tuple(writer.songs.values())
            index = dataclasses.replace(index, songs=songs, skipped=tuple(done.skipped), complete=True)
            if index == old.index:
                print(f"{data_dir}: nothing to do")
            else:
                data_folder.write_index(data_dir, index)
            remove_leftovers(data_dir, index)
            for part in old.parts:
                remove_tree(data_dir / part)
            used = {_relative(file, audio_dir) for file in sidecars.used}
            inside = f"{_relative(data_dir, audio_dir)}/"
            unused = [name for name in others if name not in used and not name.startswith(inside)]
            _report(data_dir, index, done.counts, done.fallbacks, sidecars.warnings, unused)
    return index if process == 0 else data_folder.read_index(data_dir)


class _Done(NamedTuple):
    """The songs that were processed, for the summary; the files that cannot be used, with reasons."""

    counts: Counter[str]
    fallbacks: list[str]
    skipped: list[tuple[str, str]]


def _encode(
    audio_dir: Path,
    data_dir: Path,
    sources: Sequence[str],
    old: ExistingRecords,
    sidecars: Sidecars,
    encoder: "_Encoder",
    writer: ShardWriter,
    *,
    of_part: bool = False,
) -> _Done:
    """Pass all songs to the writer, and encode what `old` lacks.

    | record in `old`        | its texts | what is done                  | counted as                          |
    |------------------------|-----------|-------------------------------|-------------------------------------|
    | none                   |           | audio and texts are encoded   | encoded                             |
    | any                    | others    | texts are encoded again       | with new texts                      |
    | of the data folder     | the same  | it stays in its shard         | as before                           |
    | of a process's folder  | the same  | it is copied to a new shard   | with new texts, if there is another |
    |                        |           |                               | in the data folder, or else encoded |

    Args:
        of_part: write only what is encoded here; records with the same texts are taken from `old` later.
    """
    done = _Done(Counter(), [], [])
    with writer:
        for source in tqdm(sources, unit="song", disable=jax.process_index() > 0):
            preemption.check()
            file, shown = audio_dir / source, source.encode(errors="backslashreplace").decode()
            try:
                if shown != source:
                    raise InputError("its name is not UTF-8; rename it")
                song = _inspect(file, source, old, sidecars, encoder, writer.index.crop_seconds)
            except MemoryError:
                raise
            except Exception as error:  # one bad song does not stop the others
                kind = "" if isinstance(error, InputError | OSError) else f"{type(error).__name__}: "
                done.skipped.append((shown, kind + str(error).removeprefix(f"{file}: ")))
                continue
            if song.has_default_texts:
                done.fallbacks.append(source)
            known = song.known
            if known is not None and known.text_sha256 == song.values["text_sha256"]:
                if not of_part:
                    done.counts[_reuse(song.values, known, old, data_dir, writer)] += 1
                continue
            before = None if known is None else _read_record(data_dir, known)
            try:
                values, record = _make_record(song, before, encoder)
            except InputError as error:
                done.skipped.append((shown, str(error).removeprefix(f"{source}: ")))
                continue
            done.counts["encoded" if known is None else "with new texts"] += 1
            writer.add(values, data_folder.encode_record(record))
    return done


class _Inspected(NamedTuple):
    """A song before anything of it is encoded.

    values: the fields of its `IndexEntry` that its files determine.
    prompts: prompts by the names of their arrays, see `data_folder.text_key`.
    words: the lyrics as the text encoder reads them.
    has_default_texts: whether there were no texts for it.
    known: the best record of its bytes, see `ExistingRecords.find`.
    sound: [channels, samples]; empty if there is such a record.
    """

    values: dict[str, Any]
    prompts: dict[str, str]
    words: str
    has_default_texts: bool
    known: IndexEntry | None
    sound: np.ndarray


def _inspect(
    file: Path,
    source: str,
    old: ExistingRecords,
    sidecars: Sidecars,
    encoder: "_Encoder",
    crop_seconds: Sequence[float],
) -> _Inspected:
    """Read the texts of a song, and its audio unless `old` has a record of the same bytes."""
    texts = sidecars.read(source)
    size, mtime_ns = size_and_time(file)
    sha256 = old.sha256(source, file, size, mtime_ns)
    known = old.find(sha256, source)
    sound = np.empty((0, 0)) if known is not None else encoder.read(file)
    seconds = sound.shape[1] / encoder.sample_rate if known is None else known.seconds
    prompts = _prompts(texts, seconds, crop_seconds)
    words = lyric_text(texts.lyrics, texts.language)
    # The rule matters only if a prompt is truncated; without it, records from before the rule stay valid.
    rule = [CUT_RULE] if encoder.cuts(prompts) else []
    text_sha256 = data_folder.text_sha256([prompts, words, *rule])
    values = dataclasses.asdict(texts)
    has_default_texts = values.pop("fallback")
    values |= dict(source=source, sha256=sha256, size=size, mtime_ns=mtime_ns, seconds=seconds, text_sha256=text_sha256)
    return _Inspected(values, prompts, words, has_default_texts, old.find(sha256, source, text_sha256), sound)


def _reuse(values: dict[str, Any], known: IndexEntry, old: ExistingRecords, data_dir: Path, writer: ShardWriter) -> str:
    """Pass a record whose texts did not change to the writer, and return what it counts as."""
    if not old.is_of_part(known):
        writer.keep(dataclasses.replace(known, **values))
        return "as before"
    counts = {name: getattr(known, name) for name in ("frames", "lyric_tokens", "prompt_tokens")}
    writer.add(values | counts, data_folder.encode_record(_read_record(data_dir, known)))
    return "with new texts" if old.has(known.sha256) else "encoded"


def _read_record(data_dir: Path, known: IndexEntry) -> dict[str, np.ndarray]:
    (record,) = data_folder.read_records(data_dir / known.shard, [known.row])
    return record


def _make_record(
    song: _Inspected, before: dict[str, np.ndarray] | None, encoder: "_Encoder"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the values and the record of a song, with encoded texts.

    Args:
        before: a record of the same audio, whose posterior is taken; None: the audio is encoded.

    Raises:
        InputError: if a network gives non-finite values.
    """
    source = song.values["source"]
    if before is not None:
        mean, std = before["mean"], before["std"]
    else:
        mean, std = encoder.posterior(song.sound)
        audio.check_finite(np.stack([mean, std]), source, "of the latents, after encoding,")
    record = dict(mean=mean, std=std, **encoder.texts(source, song.prompts, song.words))
    tokens = max(len(record[key]) for key in song.prompts)
    counts = dict(frames=len(mean), lyric_tokens=len(record["lyric_ids"]), prompt_tokens=tokens)
    return song.values | counts, record


def _load(path: str | Path, dtype: str | None, name: str) -> Any:
    return checkpoints.load(path, dtype=dtype, names=[name])[name]


class _Encoder:
    """The networks of a checkpoint, each loaded on first use."""

    def __init__(self, path: str | Path, dtype: str | None, vae: Any):
        self._load = functools.cache(lambda name: _load(path, dtype, name))
        self._tokenizer = checkpoints.load_tokenizer(path)
        self._channels, self.sample_rate = vae.audio_channels, vae.sampling_rate

    def read(self, file: Path) -> np.ndarray:
        """Return the audio of a file, [channels, samples]; raise InputError if it cannot be used."""
        return _read(file, self.sample_rate, self._channels)

    def posterior(self, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, [frames, 64] float32, of the posterior for audio [channels, samples]."""
        vae = self._load("vae")
        samples, hop = sound.shape[1], vae.hop_length
        padding = BUCKETS.frames_of(-(-samples // hop)) * hop - samples
        mean, std = _posterior(vae, np.pad(sound, ((0, 0), (0, padding)))[None], np.array([samples], np.int32))
        return np.asarray(mean)[0, : samples // hop], np.asarray(std)[0, : samples // hop]

    def cuts(self, prompts: dict[str, str]) -> bool:
        """Return whether a prompt has more than `MAX_PROMPT_TOKENS` tokens and is truncated."""
        # A token is at least one byte of UTF-8, except for the one that the tokenizer appends.
        long = [text for text in map(str, prompts.values()) if len(text.encode()) >= MAX_PROMPT_TOKENS]
        return any(len(encoding.ids) > MAX_PROMPT_TOKENS for encoding in self._tokenizer.encode_batch(long))

    def texts(self, source: str, prompts: dict[str, str], words: str) -> dict[str, np.ndarray]:
        """Return the arrays of a record except for the posterior. Warn of texts that are too long, naming `source`."""
        rows = tokenize(self._tokenizer, list(prompts.values()), max_length=MAX_PROMPT_TOKENS, what=f"{source}: prompt")
        tokens = pad_tokens(rows, BUCKETS.prompt, 0)
        hidden = np.asarray(_hidden_states(self._load("text_encoder"), tokens.ids))
        (lyric_ids,) = tokenize(self._tokenizer, [words], max_length=MAX_LYRIC_TOKENS, what=f"{source}: lyrics")
        arrays = {key: states[mask] for key, states, mask in zip(prompts, hidden, tokens.mask, strict=True)}
        for states in arrays.values():
            audio.check_finite(states, source, "of the text encoder")
        return arrays | {"lyric_ids": lyric_ids}


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _posterior(vae: AutoencoderOobleck, sound: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    posterior = vae.encode(sound, lengths)
    return posterior.mean.astype(jnp.float32), posterior.std.astype(jnp.float32)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _hidden_states(text_encoder: Qwen3Model, ids: jax.Array) -> jax.Array:
    return text_encoder(ids)


def _relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder that contains it, with "/" as separator, or the path itself if none does."""
    return str(path).removeprefix(f"{folder}/").replace("\\", "/")


def _check_destination(data_dir: Path) -> None:
    check_parent(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"{data_dir}: is a file; choose another name")
    check_writable(data_dir / data_folder.INDEX if data_dir.exists() else data_dir)


def _read(file: Path, sample_rate: int, channels: int) -> np.ndarray:
    sound = audio.read(file, sample_rate, channels)
    if (seconds := sound.shape[1] / sample_rate) < MIN_SECONDS:
        raise InputError(f"too short: {seconds:.2f} s, expected at least {MIN_SECONDS:g} s")
    if (peak := np.abs(sound).max()) < MIN_PEAK:
        raise InputError(f"silent: its peak is {peak:.1e}, expected at least {MIN_PEAK:g}")
    return sound


def _prompts(texts: Texts, seconds: float, crop_seconds: Sequence[float]) -> dict[str, str]:
    """Return the prompts of a song by their keys in a record."""
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


def _report(
    data_dir: Path, index: Index, counts: Counter, fallbacks: list[str], warnings: list[str], unused: list[str]
) -> None:
    minutes = sum(song.seconds for song in index.songs) / 60
    shards = len({song.shard for song in index.songs})
    done = ", ".join(f"{count} {what}" for what, count in counts.items())
    songs = "1 song" if len(index.songs) == 1 else f"{len(index.songs)} songs"
    print(f"{data_dir}: {songs} ({done}), {minutes:.1f} min, {shards} shard(s)")
    without = sum(song.lyrics == INSTRUMENTAL for song in index.songs)
    if without:
        print(f"{without} song(s) without lyrics, treated as instrumental")
    for title, lines in (
        (f"skipped {len(index.skipped)} file(s)", [f"{source}: {reason}" for source, reason in index.skipped]),
        (f"{len(warnings)} value(s) ignored", warnings),
        (f"no caption for {len(fallbacks)} song(s), used the file name", fallbacks),
        (f"{len(unused)} other file(s) not used", unused),
    ):
        if lines:
            more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
            print(f"{title}:", *lines[:MOST_LINES], *more, sep="\n  ")
