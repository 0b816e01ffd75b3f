"""What the training tests share: a data folder of random songs, settings of a short run, batches, the command line."""

import dataclasses

import numpy as np

import acestep_jax.train.__main__
from acestep_jax.io import checkpoint
from acestep_jax.models.config import LoRAConfig
from acestep_jax.train import data_folder
from acestep_jax.train.config import (
    TASKS,
    AdamConfig,
    AutoencoderTrainConfig,
    DataConfig,
    ObjectiveConfig,
    OobleckConfig,
    OptimizerConfig,
    ReconstructionConfig,
    ReportConfig,
    TrainConfig,
)
from acestep_jax.train.data_folder import Index, IndexEntry, crop_durations, text_key
from acestep_jax.train.objective import Batch
from tests.parity import normal

CHANNELS, TEXT_DIM, RATE = 8, 32, 25.0
# Changes of `settings` without what is not tested: three networks and a program less to compile. Runs that have these,
# and as many steps, share the compiled step, whose learning rate depends on the number of steps.
ENDLESS = dict(lora__dropout=0.1, optimizer__ema_decay=0.9, examples__cover=0.0)
SMALL = ENDLESS | dict(examples__validation_fraction=0.0)
TINY_AUTOENCODER = OobleckConfig(
    latent_channels=6,
    patch_size=4,
    downsampling_ratios=(10,),
    channel_multiples=(2,),
    encoder_channels=6,
    decoder_channels=8,
)


def write_songs(folder, native, seconds=(12, 9, 15, 7, 11), crop_seconds=(8.0, 10.0)):
    """Write random records for songs of these lengths; return the index."""
    folder.mkdir()
    songs, records = [], []
    text_dim = checkpoint.read_manifest(native).configs["condition_encoder"].text_hidden_dim
    for i, length in enumerate(seconds):
        frames = int(length * RATE)
        texts = {
            text_key(task, duration): normal(9 + i, text_dim, seed=duration + 100 * j)
            for duration in crop_durations(length, crop_seconds)
            for j, task in enumerate(TASKS)
        }
        mean, std = normal(frames, CHANNELS, seed=i), np.abs(normal(frames, CHANNELS, seed=i + 50)) / 4
        lyric_ids = np.arange(20 + 3 * i, dtype=np.int32)
        records.append(data_folder.encode_record(dict(mean=mean, std=std, lyric_ids=lyric_ids) | texts))
        song = IndexEntry(
            source=f"song-{i}.wav",
            sha256=f"{i:064x}",
            size=1,
            mtime_ns=1,
            text_sha256="0",
            seconds=float(length),
            frames=frames,
            caption=f"song {i}",
            lyrics="[Instrumental]",
            language="en",
            bpm=None,
            keyscale=None,
            timesignature=None,
            repeat=1,
            prompt_tokens=9 + i,
            lyric_tokens=len(lyric_ids),
            shard="songs-00000.array_record",
            row=i,
        )
        songs.append(song)
    data_folder.write_shard(folder / "songs-00000.array_record", records)
    index = Index(
        checkpoint=data_folder.fingerprint(native),
        dtype="float32",
        latents_per_second=RATE,
        latent_channels=CHANNELS,
        crop_seconds=crop_seconds,
        songs=tuple(songs),
        complete=True,
    )
    data_folder.write_index(folder, index)
    return index


def autoencoder_settings(data, out, **changes):
    """Return the settings of a run of a tiny autoencoder."""
    values = dict(
        steps=40,
        save_every=10,
        log_every=1,
        batch_size=2,
        crop_seconds=0.05,
        validation_fraction=0.2,
        model=TINY_AUTOENCODER,
        loss=ReconstructionConfig(windows=(256, 64)),
        optimizer=AdamConfig(learning_rate=1e-2, warmup_steps=1, ema_decay=0.5),
    )
    return AutoencoderTrainConfig(data=str(data), out=str(out), **values | changes)


def settings(data, native, out, **changes):
    """Return the settings of a run of a few steps. A key of `changes` may name a section: `lora__rank`."""
    sections = dict(
        lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.0),
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, accumulation=2),
        examples=DataConfig(batch_size=2, crop_seconds=(8.0,), validation_fraction=0.2, workers=2),
        report=ReportConfig(log_every=1, validate_every=3),
    )
    plain = dict(steps=6, save_every=2)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            sections[section] = dataclasses.replace(sections[section], **{field: value})
        else:
            (sections if name in sections else plain)[name] = value
    return TrainConfig(data=str(data), checkpoint=str(native), out=str(out), **plain, **sections)


def random_batch(config, frames=61, lengths=(61, 37), tasks=(0, 0), first_number=0, text_tokens=7, lyric_tokens=11):
    """Return a batch for the networks of a checkpoint's configs, without padding of texts."""
    size, channels = len(lengths), config["transformer"].audio_acoustic_hidden_dim
    valid = np.arange(frames) < np.array(lengths)[:, None]
    mean, std = normal(size, frames, channels), np.abs(normal(size, frames, channels, seed=1)) / 4
    return Batch(
        mean=np.where(valid[:, :, None], mean, 0.5).astype(np.float32),
        std=np.where(valid[:, :, None], std, 0.0).astype(np.float32),
        lengths=np.array(lengths, np.int32),
        text=normal(size, text_tokens, config["condition_encoder"].text_hidden_dim),
        text_lengths=np.full(size, text_tokens, np.int32),
        lyric_ids=np.arange(size * lyric_tokens, dtype=np.int32).reshape(size, lyric_tokens),
        lyric_lengths=np.full(size, lyric_tokens, np.int32),
        tasks=np.array(tasks, np.int32),
        windows=np.array([(5, 20)] * size, np.int32),
        numbers=np.arange(first_number, first_number + size, dtype=np.uint32),
    )


def run_command(*arguments):
    """Run `acestep-jax train` with these arguments; return its exit status."""
    return acestep_jax.train.__main__.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments):
    """Run a command that fails with one message; return it."""
    assert run_command(*arguments) == 2
    error = capsys.readouterr().err
    progress, found, message = error.partition("acestep-jax: ")
    assert found and "Traceback" not in error and (not progress or progress[-1] in "\n\r"), error
    return message
