"""Cloud Storage in memory, or in a folder for several processes: the interface of gcsfs, with its lack of folders,
renames and appended bytes."""

import os
import urllib.parse
from collections.abc import MutableMapping
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Buckets(MemoryFileSystem):
    """Objects by name. Folders are what the names of objects say."""

    protocol = ("gs", "gcs")
    store = {}
    pseudo_dirs = [""]
    cachable = False

    def __init__(self, *arguments, finalize_on_close=True, use_listings_cache=True, **options):  # options of gcsfs
        assert not use_listings_cache, "what other processes write would not be seen"
        super().__init__(*arguments, **options)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")
        return f"/{path}" if path else ""

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def mv(self, *arguments, **options):
        raise AssertionError("a rename copies every object")

    rename = move = mv

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), f"objects are read or written whole, not opened with {mode!r}"
        return super()._open(path, mode, **options)


def use(monkeypatch):
    """Replace Cloud Storage by empty buckets in memory; return the objects by name."""
    from etils.epath import backend, gpath

    from acestep_jax.io import files

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Buckets, clobber=True)
    for cached in (files._file_system, files._copy):
        cached.cache_clear()
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    Buckets.store.clear()
    return Buckets.store


class Objects(MutableMapping):
    """The objects of a bucket by name, each a file of one folder, which appears when all of it is written."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _file(self, name):
        return self.folder / urllib.parse.quote(name, safe="")

    def __getitem__(self, name):
        try:
            return MemoryFile(None, name, self._file(name).read_bytes())
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name, written):
        temporary = self.folder / f".{os.getpid()}"
        temporary.write_bytes(written.getvalue())
        temporary.replace(self._file(name))

    def __delitem__(self, name):
        try:
            self._file(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self):
        names = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
        return iter([urllib.parse.unquote(name) for name in names])

    def __len__(self):
        return sum(1 for _ in self)

    def __contains__(self, name):
        return self._file(name).is_file()


class Upload(MemoryFile):
    """An object that is written, and appears when it is closed."""

    def close(self):
        self.fs.store[self.path] = self


class SharedBuckets(Buckets):
    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            return Upload(self, self._strip_protocol(path))
        return super()._open(path, mode, **options)


def share(folder):
    """Replace Cloud Storage of this process by the objects in a folder, which other processes may have, too."""
    from etils.epath import gpath

    gpath._is_tf_installed = lambda: False
    SharedBuckets.store = Objects(folder)
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, SharedBuckets, clobber=True)
    return SharedBuckets.store


# The command line with the buckets in the folder that its first argument names.
SHARED_COMMAND = """
import sys
from tests import cloud
from acestep_jax.cli import main
cloud.share(sys.argv.pop(1))
sys.exit(main(sys.argv[1:]))
"""
