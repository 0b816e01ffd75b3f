"""From the audio, codes and texts of jobs to latents and conditions through the compiled programs, and back to songs.

The arrays of songs in a batch differ in length: rows are padded to `frames` latent frames.
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
from acestep_jax.placement import Derived

FADE = 0.025  # seconds at each end of a repainted region, over which its source fades out and in

SOURCE_NOISE, REFERENCE_NOISE = 2**31 - 1, 2**31 - 2  # beyond the numbers of steps, which solvers fold into keys

Networks = Mapping[str, Any]  # networks by their names in `models.registry`


class SilentTimbre:
    """Encodes the timbre of silence once for the weights of a condition encoder, and keeps the token."""

    def __init__(self):
        self._token: Derived[jax.Array] = Derived()

    def token(self, networks: Networks, placed: Networks) -> jax.Array:
        """Return the token, [1, D].

        Args:
            networks: networks of the model.
            placed: the same networks on the device.
        """
        if (kept := self._token.of(networks["condition_encoder"])) is not None:
            return kept
        token = jax.block_until_ready(programs.encode_timbres(placed["condition_encoder"]))  # it can still fail here
        return self._token.keep(token, networks["condition_encoder"])


def conditions(
    networks: Networks,
    batch: Batch,
    references: tuple[jax.Array | None, np.ndarray],
    silent: jax.Array | None,
    *,
    attend_to_padding: bool,
) -> tuple[Condition, Condition | None, Condition | None]:
    """Return the conditions of the songs; their conditions for text2music, if a cover is partial; and the conditions
    from the texts that describe the sources, for FlowEdit. The first two have the same number of tokens.

    Args:
        references: see `references`.
        silent: token of silence, see `SilentTimbre`; None if each song has a clip.
    """
    clips, owners = references
    timbres = silent
    if clips is not None:
        timbres = programs.encode_timbres(networks["condition_encoder"], clips, silent)
    assert timbres is not None

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
    """Return the latents of the sources, and the latents for the transformer, some after the audio tokenizer.

    Both are [B, frames, channels] float32, zero for songs without a source.

    Args:
        keys: [B], one for each song, to sample from the posterior; None: its mean.
    """
    clean = np.zeros((len(jobs), frames, channels), np.float32)
    codes = {i: job.codes for i, job in enumerate(jobs) if job.codes is not None}
    waves = {i: job.source for i, job in enumerate(jobs) if job.source is not None}
    given = [i for i, job in enumerate(jobs) if job.source_latents is not None]
    for i in given:
        clean[i, : jobs[i].frames] = _with_silence(networks, jobs[i])
    if waves:
        own = None if keys is None else _folded(keys, list(waves), SOURCE_NOISE)
        clean[list(waves)] = encode_audio(networks["vae"], list(waves.values()), frames, own)
    if rows := [i for i in (*waves, *given) if jobs[i].task.tokenized]:
        found = tokenize(networks, clean[rows], [jobs[i].frames for i in rows])
        codes |= dict(zip(rows, found, strict=True))
    source = clean.copy()
    if codes:
        made = detokenize(networks, list(codes.values()), frames)
        for i, latents in zip(codes, made, strict=True):
            source[i] = latents
            if jobs[i].codes is not None:
                clean[i] = latents
    return clean, source


def _with_silence(networks: Networks, job: Job) -> np.ndarray:
    """Return the latents that a job brings along, [frames, C], with those of silence where the song is longer."""
    assert job.source_latents is not None
    hop = networks["vae"].hop_length
    first, end = (sample // hop for sample in job.source_samples)
    if first == 0 and end == job.frames:
        return job.source_latents
    latents = np.array(on_host(networks["condition_encoder"].silence(job.frames)))[0].astype(np.float32)
    latents[first:end] = job.source_latents[first:end]
    return latents


def _folded(keys: jax.Array, rows: Sequence[int], purpose: int) -> jax.Array:
    """Return keys for one purpose, derived from the keys of the songs in `rows`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys[np.array(rows)], purpose)


def references(
    networks: Networks, jobs: Sequence[Job], keys: jax.Array | None = None
) -> tuple[jax.Array | None, np.ndarray]:
    """Return the latents of the reference clips, [N, 750, C] or None if there are none, and the index of each song's
    clip, which is N for silence.

    keys: see `source_latents`.
    """
    rows = [i for i, job in enumerate(jobs) if job.reference is not None or job.reference_latents is not None]
    owners = np.full(len(jobs), len(rows), np.int32)
    if not rows:
        return None, owners
    owners[rows] = np.arange(len(rows))
    waves = {i: wave for i in rows if (wave := jobs[i].reference) is not None}
    made = None
    if waves:
        lengths = np.full(len(waves), next(iter(waves.values())).shape[-1], np.int32)
        own = None if keys is None else _folded(keys, list(waves), REFERENCE_NOISE)
        made = programs.encode_audio(networks["vae"], np.stack(list(waves.values())), lengths, own)
        if len(waves) == len(rows):
            return made, owners
    encoded = iter(() if made is None else np.array(on_host(made)))
    clips = [next(encoded) if (own := jobs[i].reference_latents) is None else own for i in rows]
    return jnp.asarray(np.stack(clips)), owners


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


def decoded_sources(networks: Networks, jobs: Sequence[Job], clean: np.ndarray, lengths: np.ndarray) -> Any:
    """Return the audio of sources that are latents, [B, channels, samples] float32, at their own level; None if no song
    keeps such a source. `clean`: see `source_latents`."""
    if not any(job.keeps_source and job.source_latents is not None for job in jobs):
        return None
    return on_host(programs.decode(networks["vae"], clean, lengths, np.zeros(len(lengths), bool)))


def finished(job: Job, made: np.ndarray, vae: AutoencoderConfig, source: np.ndarray | None = None) -> np.ndarray:
    """Return the audio of a song, [channels, samples] float32: `made`, cut to the song's length, with the source
    outside of repainted regions.

    Args:
        source: see `decoded_sources`; None: the job has it.
    """
    made = made[:, : job.samples]
    if not job.keeps_source:
        return np.array(made)
    source = job.source if job.source is not None else source
    assert source is not None
    mask = np.zeros(job.samples, bool)
    for first, last in job.regions:
        mask[first:last] = True
    return audio.splice(source[:, : job.samples], made, mask, job.source_samples, round(FADE * vae.sampling_rate))


def _padded(condition: Condition, size: int) -> Condition:
    """Return the condition padded with invalid tokens to `size`."""
    tokens = jnp.pad(condition.tokens, ((0, 0), (0, size - condition.tokens.shape[1]), (0, 0)))
    return condition._replace(tokens=tokens)
