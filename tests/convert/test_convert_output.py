"""What is written appears whole or not at all, and what cannot be written is refused."""

import resource
import shutil
import sys

import pytest
from orbax.checkpoint import v1 as ocp

from acestep_jax.convert.to_torch import to_torch
from acestep_jax.io import checkpoint
from acestep_jax.io.conversion import WEIGHT_NORM, from_torch
from tests.folders import assert_refused, edit, edit_json, remove, write

DIFFUSERS = {"layout": "diffusers"}
CONVERSIONS = {"from torch": (from_torch, 0, {}), "to torch": (to_torch, 1, DIFFUSERS)}
DESTINATIONS = {
    "exists": ("there", ["there: already exists", "choose another name"]),
    "in no folder": ("absent/made", ["absent/made: the folder ", "does not exist; create it first"]),
}


@pytest.fixture(params=CONVERSIONS)
def conversion(request, standard):
    """A conversion, its source, which is large enough to fill a disk, and its options."""
    convert, which, options = CONVERSIONS[request.param]
    return convert, standard[which], options


@pytest.mark.parametrize("case", DESTINATIONS)
def test_destination(conversion, tmp_path, case):
    """Found before the source is looked for, which may be a download of many gigabytes."""
    convert, _, options = conversion
    name, words = DESTINATIONS[case]
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "no source", tmp_path / name, **options)
    assert all(word in str(error.value) for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_disk_is_full_midway(conversion, tmp_path, monkeypatch, capfd):
    """Really so: no file may grow beyond 200 kB. Writes that fail later than the first one are not heard of."""
    convert, source, options = conversion
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        assert_refused(convert, source, tmp_path / "made", ["made: the disk is full", "make room"], **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not heard and not capfd.readouterr().err


def test_disk_has_no_room(conversion, tmp_path, monkeypatch):
    """Found before anything is written."""
    convert, source, options = conversion
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_000_000))
    words = ["made: 0.0", "GB to write, but the disk has 0.01 GB free"]
    assert_refused(convert, source, tmp_path / "made", words, **options)


def test_interrupted(tiny, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.partial, "finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_torch(tiny[0], tmp_path / "made")
    assert not list(tmp_path.iterdir())


NATIVE = {
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer.json: missing"]),
    "tokenizer garbage": (write("tokenizer.json", b"\xff"), ["tokenizer.json: not a tokenizer"]),
    "factors damaged": (write(WEIGHT_NORM, b"garbage"), [f"{WEIGHT_NORM}: damaged", "remove it"]),
    "other config": (edit("config.json", audio_tokenizer=None), ["audio_tokenizer.", "belongs to no network"]),
}


@pytest.mark.parametrize("case", NATIVE)
def test_native_source(tiny, tmp_path, case):
    damage, words = NATIVE[case]
    shutil.copytree(tiny[1], tmp_path / "source")
    damage(tmp_path / "source")
    assert_refused(to_torch, tmp_path / "source", tmp_path / "made", words, **DIFFUSERS)


def test_torch_source(tiny, tmp_path):
    words = ["no config.json here", "acestep-jax convert from-torch"]
    assert_refused(to_torch, tiny[0], tmp_path / "made", words, **DIFFUSERS)


def test_original_layout_has_one_value_for_all(tiny, tmp_path):
    """What differs between networks there cannot be written, and is not dropped in silence."""
    shutil.copytree(tiny[1], tmp_path / "source")
    encoder = checkpoint.read_manifest(tiny[1]).configs["condition_encoder"]
    edit_json(tmp_path / "source" / "config.json", condition_encoder=vars(encoder) | {"rope_theta": 5.0})
    words = ["condition_encoder: rope_theta is 5.0", "1000000.0", "use the layout diffusers"]
    assert_refused(to_torch, tmp_path / "source", tmp_path / "made", words, layout="original")
