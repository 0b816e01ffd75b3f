"""Files of this machine and of Cloud Storage, which is in memory here."""

import errno
import tempfile

import fsspec
import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.io import audio, files
from acestep_jax.io.adapter import Adapter, load_adapter, save_adapter
from acestep_jax.io.files import check_new, check_writable, publish_file
from acestep_jax.models.config import LoRAConfig
from tests import cloud

pytestmark = pytest.mark.unit


@pytest.fixture
def bucket(monkeypatch):
    return cloud.use(monkeypatch)


@pytest.fixture(params=["disk", "cloud"])
def folder(request, tmp_path, monkeypatch):
    """A folder of each kind, that does not exist in Cloud Storage until something is in it."""
    if request.param == "disk":
        return tmp_path
    cloud.use(monkeypatch)
    return files.as_path("gs://music/a")


def test_a_file_is_written_whole_or_not_at_all(folder):
    path = folder / "b.txt"
    with files.publish_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(ValueError, match="stop"):
        with files.publish_file(path) as temporary:
            temporary.write_text("two")
            raise ValueError("stop")
    assert files.read_text(path) == "one" and [file.name for file in folder.iterdir()] == ["b.txt"]


def test_what_is_below_a_folder(folder):
    for name in ("x.txt", "more/y.txt"):
        if not files.is_remote(folder):
            (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    assert files.files_below(folder) == ["more/y.txt", "x.txt"]
    size, time = files.size_and_time(folder / "x.txt")
    assert size == 5 and time % 10**9 * files.is_remote(folder) == 0
    files.remove_tree(folder / "more")
    files.remove_tree(folder / "more")
    assert files.files_below(folder) == ["x.txt"]


def test_copies_are_those_of_the_object_as_it_is(bucket, tmp_path):
    local = tmp_path / "x"
    local.write_text("here")
    assert files.local_copy(local) is local
    path = files.as_path("gs://music/x")
    path.write_text("one")
    copy = files.local_copy(path)
    assert copy.read_text() == "one" and files.local_copy(path) == copy
    path.write_text("three")
    assert files.local_copy(path).read_text() == "three"


def test_paths():
    assert files.as_path("a//b").as_posix() == "a/b" and files.identity("a/../b") == files.identity("b")
    for name in ("s3://music/x", "http://music/x"):
        with pytest.raises(InputError, match=f"{name}: expected a path of this machine or one that begins with gs://"):
            files.as_path(name)


def test_a_missing_package_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError("gcsfs")

    files._file_system.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=r"gs://... needs gcsfs; run pip install 'acestep-jax\[gcs\]'"):
        files.as_path("gs://music/x")


def test_sound(bucket):
    sound = np.random.default_rng(0).uniform(-1, 1, (2, 4800)).astype(np.float32)
    audio.write("gs://music/songs/a.flac", sound, 48_000)
    assert [*bucket] == ["/music/songs/a.flac"]
    np.testing.assert_allclose(audio.read("gs://music/songs/a.flac", 48_000), sound, atol=2**-23)
    with pytest.raises(InputError, match="gs://music/songs/a.flac: already exists"):
        audio.check_output("gs://music/songs/a.flac")
    with pytest.raises(FileNotFoundError):
        audio.read("gs://music/songs/b.flac", 48_000)


def test_adapters(bucket, monkeypatch):
    """What is read first is written last, so that an adapter that was cut short is none."""
    leaves = {"proj.lora_a": np.ones((4, 2), np.float32), "proj.lora_b": np.ones((2, 4), np.float32)}
    save_adapter("gs://music/run/adapter", Adapter(LoRAConfig(rank=2), leaves))
    assert [*bucket] == ["/music/run/adapter/adapter.safetensors", "/music/run/adapter/adapter.json"]
    found = load_adapter("gs://music/run/adapter")
    assert found.config.rank == 2 and np.array_equal(found.leaves["proj.lora_b"], leaves["proj.lora_b"])
    with pytest.raises(InputError, match="gs://music/run/adapter: already exists"):
        save_adapter("gs://music/run/adapter", found)
    del bucket["/music/run/adapter/adapter.json"]
    with pytest.raises(InputError, match="gs://music/run/adapter: expected adapter.json"):
        load_adapter("gs://music/run/adapter")


def test_a_probe_leaves_nothing(tmp_path):
    check_writable(tmp_path / ("n" * 250 + ".wav"))
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["n" * 256, "half \ud83d", "nul\0"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of a file"):
        check_writable(tmp_path / name)


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system", "/somewhere/.temporary-x7")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    for check in (check_writable, check_new):
        with pytest.raises(InputError, match="out: cannot be written, .* takes no new file .Read-only file system"):
            check(tmp_path / "out")
    with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path / 'out'}'"), publish_file(tmp_path / "out"):
        pass


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "out.txt").mkdir()
    with pytest.raises(OSError, match="out.txt") as error, publish_file(tmp_path / "out.txt") as temporary:
        temporary.write_text("x")
    assert ".acestep-" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    with pytest.raises(OSError, match="gone.txt") as error, publish_file(tmp_path / "gone.txt") as temporary:
        temporary.unlink()
    assert ".acestep-" not in str(error.value)
