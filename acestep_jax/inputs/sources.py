"""From the audio, codes and texts of jobs to latents and conditions through the compiled programs, and back to songs.

Arrays that songs share out among themselves differ in length: rows are padded to `frames` latent frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.diffusion.denoise import Condition
from acestep_jax.distributed import on_host
from acestep_jax.inputs import programs
from acestep_jax.inputs.collate import Batch, Tokens
from acestep_jax.inputs.prepare import Job
from acestep_jax.io import audio
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.config import AutoencoderConfig

FADE = 0.025  # seconds at each end of a repainted region, over which its source fades out and in

SOURCE_NOISE, REFERENCE_NOISE = 2**31 - 1, 2**31 - 2  # beyond the numbers of steps, which solvers fold into keys

Networks = Mapping[str, Any]  # by the names of `models.registry`


def conditions(
    networks: Networks, batch: Batch, references: tuple[jax.Array | None, np.ndarray], *, attend_to_padding: bool
) -> tuple[Condition, Condition | None, Condition | None]:
    """Return the condition of each song; that of text2music, if a cover is partial; and that of the texts that describe
    the source, for FlowEdit. The first two have the same number of tokens."""
    clips, owners = references
    timbres = programs.encode_timbres(networks["condition_encoder"], clips)

    def encode(tokens: Tokens[np.ndarray], lyrics: Tokens[np.ndarray] = batch.lyrics) -> Condition:
        return programs.encode(
            networks["text_encoder"],
            networks["condition_encoder"],
            tokens,
            lyrics,
            timbres,
            owners,
            attend_to_padding=attend_to_padding,
        )

    condition = encode(batch.prompt)
    if batch.edited is not None:
        return condition, None, encode(*batch.edited)
    if batch.plain is None:
        return condition, None, None
    plain = encode(batch.plain)
    size = max(condition.tokens.shape[1], plain.tokens.shape[1])  # the loop switches between them
    return _padded(condition, size), _padded(plain, size), None


def source_latents(
    networks: Networks, jobs: Sequence[Job], frames: int, channels: int, keys: jax.Array | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents of the sources, and those that the transformer gets, some after the audio tokenizer.

    Both are [B, frames, channels] float32, zero for songs without a source.

    Args:
        keys: [B], one for each song, to sample from the posterior; None: its mean.
    """
    clean = np.zeros((len(jobs), frames, channels), np.float32)
    codes = {i: job.codes for i, job in enumerate(jobs) if job.codes is not None}
    waves = {i: job.source for i, job in enumerate(jobs) if job.source is not None}
    if waves:
        own = None if keys is None else _folded(keys, list(waves), SOURCE_NOISE)
        clean[list(waves)] = encode_audio(networks["vae"], list(waves.values()), frames, own)
    if rows := [i for i in waves if jobs[i].task.tokenized]:
        found = tokenize(networks, clean[rows], [jobs[i].frames for i in rows])
        codes |= dict(zip(rows, found, strict=True))
    source = clean.copy()
    if codes:
        made = detokenize(networks, list(codes.values()), frames)
        for i, latents in zip(codes, made, strict=True):
            source[i] = latents
            if jobs[i].source is None:
                clean[i] = latents
    return clean, source


def _folded(keys: jax.Array, rows: Sequence[int], purpose: int) -> jax.Array:
    """Return keys for one purpose, derived from those of the songs in `rows`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys[np.array(rows)], purpose)


def references(
    networks: Networks, jobs: Sequence[Job], keys: jax.Array | None = None
) -> tuple[jax.Array | None, np.ndarray]:
    """Return the latents of the reference clips, [N, 750, C] or None if there are none, and the index of each song's
    clip, which is N for silence.

    keys: see `source_latents`.
    """
    waves = [job.reference for job in jobs if job.reference is not None]
    owners = np.full(len(jobs), len(waves), np.int32)
    if not waves:
        return None, owners
    owners[[job.reference is not None for job in jobs]] = np.arange(len(waves))
    lengths = np.full(len(waves), waves[0].shape[-1], np.int32)
    rows = [i for i, job in enumerate(jobs) if job.reference is not None]
    own = None if keys is None else _folded(keys, rows, REFERENCE_NOISE)
    return programs.encode_audio(networks["vae"], np.stack(waves), lengths, own), owners


def encode_audio(
    vae: AutoencoderOobleck, waves: Sequence[np.ndarray], frames: int, keys: jax.Array | None = None
) -> np.ndarray:
    """Encode songs [channels, samples]; return latents [n, frames, C] float32, zero after their last whole frame.

    keys: [n], to sample from the posterior; None: its mean.
    """
    padded = np.zeros((len(waves), vae.config.audio_channels, frames * vae.hop_length), np.float32)
    lengths = np.array([wave.shape[1] for wave in waves], np.int32)
    for row, wave in zip(padded, waves, strict=True):
        row[:, : wave.shape[1]] = wave
    latents = np.array(on_host(programs.encode_audio(vae, padded, lengths, keys)))
    for row, length in zip(latents, lengths, strict=True):
        row[length // vae.hop_length :] = 0
    return latents


def tokenize(networks: Networks, latents: np.ndarray, frames: Sequence[int]) -> list[np.ndarray]:
    """Encode latents [n, T, C]; return codes [ceil(frames / 5)] int32 of each song."""
    tokenizer = networks["audio_tokenizer"]
    lengths = np.array(frames, np.int32)
    codes = on_host(programs.tokenize(tokenizer, networks["condition_encoder"], latents, lengths))
    window = tokenizer.config.pool_window_size
    return [row[: -(-length // window)] for row, length in zip(codes, frames, strict=True)]


def detokenize(networks: Networks, codes: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """Decode codes [n] int32 of each song; return latents [songs, frames, C] float32, arbitrary after a song's end."""
    tokenizer = networks["audio_tokenizer"]
    padded = np.zeros((len(codes), -(-frames // tokenizer.config.pool_window_size)), np.int32)
    for row, numbers in zip(padded, codes, strict=True):
        row[: len(numbers)] = numbers
    return on_host(programs.detokenize(tokenizer, networks["audio_token_detokenizer"], padded))[:, :frames]


def check_songs(jobs: Sequence[Job], seeds: Sequence[int | None], values: Sequence[np.ndarray], what: str) -> None:
    """Raise InputError, naming the song and its index in a batch, if its values are not finite. `what`: see
    `audio.check_finite`."""
    for i, (job, seed, own) in enumerate(zip(jobs, seeds, values, strict=False)):
        name = f"{'song' if len(jobs) == 1 else f'songs[{i}]'} {job.request.prompt[:40]!r}"
        audio.check_finite(own, name if seed is None else f"{name}, seed {seed}", what)


def finished(job: Job, made: np.ndarray, vae: AutoencoderConfig) -> np.ndarray:
    """Return the audio of a song, [channels, samples] float32: `made`, cut to the song's length, with the source
    outside of repainted regions."""
    made = made[:, : job.samples]
    if not job.keeps_source:
        return np.array(made)
    assert job.source is not None
    mask = np.zeros(job.samples, bool)
    for first, last in job.regions:
        mask[first:last] = True
    source = job.source[:, : job.samples]
    return audio.splice(source, made, mask, job.source_samples, round(FADE * vae.sampling_rate))


def _padded(condition: Condition, size: int) -> Condition:
    """Return the condition padded with invalid tokens to `size`."""
    tokens = jnp.pad(condition.tokens, ((0, 0), (0, size - condition.tokens.shape[1]), (0, 0)))
    return condition._replace(tokens=tokens)
