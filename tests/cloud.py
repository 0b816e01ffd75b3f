"""Cloud Storage in memory: the interface of gcsfs, with its lack of folders, renames and appended bytes."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


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
