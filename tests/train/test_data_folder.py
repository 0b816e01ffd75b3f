"""The folder of training data: round trips, atomic writes, errors for damaged files."""

import dataclasses
import json
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.train.data_folder import (
    Index,
    IndexEntry,
    crop_durations,
    decode_record,
    encode_record,
    fingerprint,
    read_index,
    read_records,
    text_key,
    write_index,
    write_shard,
)
from tests.parity import normal

RECORD = dict(
    mean=normal(30, 8),
    std=np.abs(normal(30, 8)),
    lyric_ids=np.arange(5, dtype=np.int32),
    **{text_key("cover", 1): normal(7, 48).astype(ml_dtypes.bfloat16), text_key("cover", 2): normal(7, 48)},
)
SHARD = "songs-00000.array_record"


def song(row):
    return IndexEntry(
        source=f"a/{row}.wav",
        sha256="0" * 64,
        size=1,
        mtime_ns=2**60 + 1,
        text_sha256="1" * 64,
        seconds=1.2345678901234,
        frames=30,
        caption="ça",
        lyrics="la\nla",
        language="fr",
        bpm=None,
        keyscale="C major",
        timesignature=None,
        repeat=1,
        prompt_tokens=7,
        lyric_tokens=5,
        shard=SHARD,
        row=row,
    )


INDEX = Index(
    checkpoint="2" * 64,
    dtype="bfloat16",
    latents_per_second=25.0,
    latent_channels=8,
    crop_seconds=(1.0, 60.0),
    songs=(song(0), song(1)),
    skipped=(("b.wav", "silent"),),
    complete=True,
)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder / SHARD, [encode_record(RECORD), encode_record(RECORD | {"mean": RECORD["mean"] + 1})])
    write_index(folder, INDEX)
    return folder


@pytest.mark.unit
def test_what_is_written_is_read(data):
    assert read_index(data) == INDEX
    assert sorted(path.name for path in data.iterdir()) == ["index.json", SHARD]
    second, first = read_records(data / SHARD, [1, 0])
    assert first.keys() == RECORD.keys()
    for name, array in RECORD.items():
        assert first[name].dtype == array.dtype and np.array_equal(first[name], array)
    assert np.array_equal(second["mean"], RECORD["mean"] + 1)


def test_a_record_is_a_safetensors_file():
    """Also to others: torch's reader knows bfloat16."""
    from safetensors.torch import load

    theirs, ours = load(encode_record(RECORD)), decode_record(encode_record(RECORD))
    assert all(np.array_equal(theirs[name].float().numpy(), ours[name].astype(np.float32)) for name in RECORD)
    assert str(theirs[text_key("cover", 1)].dtype) == "torch.bfloat16"


@pytest.mark.unit
def test_crop_durations():
    assert crop_durations(200.7, (60.0, 30.5)) == [30, 60]
    assert crop_durations(45.9, (60.0, 30.0, 120.0)) == [30, 45]


def replace(**values):
    return lambda data: write_index(data, dataclasses.replace(INDEX, **values))


def write(name, text):
    return lambda data: (data / name).write_text(text)


def remove(name):
    return lambda data: (data / name).unlink()


INDEXES = {
    "none": (remove("index.json"), "data: no index.json here, so this is not a folder of training data"),
    "no folder": (shutil.rmtree, "data: no such folder"),
    "garbage": (write("index.json", "{"), "index.json: damaged"),
    "a list": (write("index.json", "[]"), "index.json: damaged"),
    "other schema": (replace(schema_version=99), "schema_version 99, but this version .* reads 1; update"),
    "no songs": (write("index.json", '{"schema_version": 1}'), "index.json: damaged .*songs"),
    "other keys": (write("index.json", '{"schema_version": 1, "songs": [{"a": 1}]}'), "index.json: damaged"),
    "not complete": (replace(complete=False), "data: preprocessing was interrupted; .* resumes it"),
    "no shard": (remove(SHARD), f"{SHARD}: missing; remove .*index.json"),
}


@pytest.mark.unit
@pytest.mark.parametrize("case", INDEXES)
def test_damaged_index(data, case):
    damage, message = INDEXES[case]
    damage(data)
    with pytest.raises(InputError, match=message):
        read_index(data)


@pytest.mark.unit
@pytest.mark.parametrize("content", [b"", b"garbage" * 9999, None])
def test_damaged_shard(data, content):
    shard = data / SHARD
    shard.write_bytes(shard.read_bytes()[:-70000] if content is None else content)
    with pytest.raises(InputError, match=f"{SHARD}: damaged .*; remove the data folder and preprocess again"):
        list(read_records(shard, [0, 1]))


@pytest.mark.unit
def test_missing_record(data):
    with pytest.raises(InputError, match=f"{SHARD}: damaged"):
        list(read_records(data / SHARD, [2]))


@pytest.mark.unit
def test_full_disk(data):
    """Really so: no file may grow beyond 500 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(InputError, match="index.json: the disk is full; free some space and run the same command"):
            write_index(data, dataclasses.replace(INDEX, songs=(song(0),)))
        with pytest.raises(InputError, match="songs-00001.array_record: the disk is full"):
            write_shard(data / "songs-00001.array_record", [encode_record(RECORD)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_index(data) == INDEX and sorted(path.name for path in data.iterdir()) == ["index.json", SHARD]


def test_fingerprint(tiny, tiny_base, tmp_path):
    """It depends on what the data depend on, and only on that."""
    first = fingerprint(tiny[1])
    assert first == fingerprint(tiny[1]) and len(first) == 64
    assert fingerprint(tiny_base[1]) == first, "the variants have the same autoencoder and text encoder"
    copy = tmp_path / "copy"
    shutil.copytree(tiny[1], copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(json.dumps(json.loads(config) | {"dtypes": {"vae": "bfloat16"}}))
    assert fingerprint(copy) == first
    (copy / "config.json").write_text(config.replace('"sampling_rate": 48000', '"sampling_rate": 44100'))
    assert fingerprint(copy) != first
    (copy / "config.json").write_text(config)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert fingerprint(copy) != first
