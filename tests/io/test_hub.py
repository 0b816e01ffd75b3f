"""Models by name: which files are downloaded and where they lie; what is refused; resume, hashes and the cache."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from acestep_jax.errors import InputError
from acestep_jax.io import download
from acestep_jax.io.companions import fetch_companion
from acestep_jax.io.hub import locate
from acestep_jax.io.original import MODEL_PREFIX, TEXT_ENCODER, VARIANTS
from acestep_jax.io.original import REPOSITORY as UNIFIED

unit = pytest.mark.unit

WEIGHTS = b"\1\2\3\4" * 10_000


def write(folder, *names, salt=b""):
    """Write files with some content: large ones where the name is that of weights."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        large = name.endswith((".safetensors", ".gguf", ".bin"))
        path.write_bytes(salt + name.encode() + (WEIGHTS if large else b"{}"))
    return folder


MODEL = ["config.json", "model.safetensors", "silence_latent.pt"]
REST = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"] + [
    f"Qwen3-Embedding-0.6B/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
]
NOTES = ["README.md", ".gitattributes", "assets/picture.png"]
UNIFIED_FILES = [f"acestep-v15-turbo/{name}" for name in MODEL] + REST
SHARDS = ["config.json", "silence_latent.pt", "model.safetensors.index.json"] + [
    f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
]
DIFFUSERS = [
    "model_index.json",
    "tokenizer/tokenizer.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
]
DIFFUSERS += [
    f"{network}/{name}"
    for network in ("transformer", "condition_encoder", "vae")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
]
NATIVE = ["config.json", "tokenizer.json", "weights/d/0.bin", "weights/manifest.ocdbt"]
PLANNER = [f"acestep-5Hz-lm-1.7B/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")]


@pytest.fixture
def official(hub, tmp_path):
    """Serve repositories that hold what ACE-Step's do, with small files."""
    hub.add(UNIFIED, write(tmp_path / "unified", *UNIFIED_FILES, *PLANNER, *NOTES, "acestep-v15-turbo/modeling.py"))
    for name in ("base", "sft"):
        hub.add(VARIANTS[name], write(tmp_path / name, *MODEL, *NOTES, "modeling_acestep.py", salt=name.encode()))
    index = json.dumps({"weight_map": dict(zip("ab", SHARDS[3:], strict=True))})
    xl = write(tmp_path / "xl", *SHARDS, *NOTES)
    (xl / SHARDS[2]).write_text(index)
    hub.add(VARIANTS["xl-turbo"], xl)
    whole = write(tmp_path / "whole", *DIFFUSERS, *NOTES, "vae/diffusion_pytorch_model.fp16.safetensors")
    hub.add("ACE-Step/acestep-v15-xl-turbo-diffusers", whole)
    hub.add("someone/native", write(tmp_path / "native", *NATIVE, *NOTES))
    return hub


def names(folder):
    """Return the paths of the files under a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@unit
@pytest.mark.parametrize(
    ("source", "variant", "repository", "model", "files"),
    [
        (UNIFIED, None, UNIFIED, "acestep-v15-turbo", UNIFIED_FILES),
        (UNIFIED, "turbo", UNIFIED, "acestep-v15-turbo", UNIFIED_FILES),
        ("ace-step/ace-step1.5", None, UNIFIED, "acestep-v15-turbo", UNIFIED_FILES),
        ("turbo", None, UNIFIED, "acestep-v15-turbo", UNIFIED_FILES),
        ("acestep-v15-turbo", None, UNIFIED, "acestep-v15-turbo", UNIFIED_FILES),
        ("ACE-Step/acestep-v15-base", None, VARIANTS["base"], "", MODEL),
        (UNIFIED, "sft", VARIANTS["sft"], "", MODEL),
        (UNIFIED, "xl-turbo", VARIANTS["xl-turbo"], "", SHARDS),
        ("xl-turbo", None, VARIANTS["xl-turbo"], "", SHARDS),
        ("ACE-Step/acestep-v15-xl-turbo-diffusers", None, "ACE-Step/acestep-v15-xl-turbo-diffusers", "", DIFFUSERS),
        ("someone/native", None, "someone/native", "", NATIVE),
    ],
)
def test_names_are_completed_and_only_needed_files_come(official, source, variant, repository, model, files):
    found = locate(source, variant)
    served = official.repositories[repository]
    root = download.repository_folder(official.cache, repository) / "snapshots" / served.commit
    assert found.model == root / model and names(root) == sorted(files)
    for name in files:
        assert (root / name).read_bytes() == (served.folder / name).read_bytes()
    unified = official.repositories[UNIFIED]
    rest = download.repository_folder(official.cache, UNIFIED) / "snapshots" / unified.commit
    if files in (DIFFUSERS, NATIVE):
        assert found.vae is None and found.text_encoder is None and not rest.exists()
        assert found.repositories == {repository: served.commit}
    else:
        assert found.vae == rest / "vae" and found.text_encoder == rest / "Qwen3-Embedding-0.6B"
        assert set(REST) <= set(names(rest)) and not set(PLANNER) & set(names(rest))
        assert found.repositories == {repository: served.commit, UNIFIED: unified.commit}
    assert all(commit in found.key for commit in found.repositories.values())
    assert not set(found.key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@unit
def test_second_start_downloads_nothing_and_works_without_network(official):
    first = locate("xl-turbo")
    official.downloads.clear()
    assert locate("xl-turbo") == first and locate("xl-turbo", local_files_only=True) == first
    official.close()
    assert locate("xl-turbo") == first and not official.downloads


@unit
def test_offline_mode_of_the_hub_is_respected(official, monkeypatch):
    from huggingface_hub import constants

    first = locate("base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(official.downloads)
    assert locate("base") == first and len(official.downloads) == asked
    with pytest.raises(InputError, match="offline mode.*holds ACE-Step/acestep-v15-base"):
        locate("sft")


@unit
def test_new_commit_is_downloaded_and_shares_equal_files(official, tmp_path):
    first = locate("base")
    changed = write(tmp_path / "base", "config.json", salt=b"new")
    official.add(VARIANTS["base"], changed)
    official.downloads.clear()
    second = locate("base")
    assert second.key != first.key and [name for name, _ in official.downloads] == ["config.json"]
    assert (second.model / "config.json").read_bytes() != (first.model / "config.json").read_bytes()
    assert locate("base", revision=official.repositories[VARIANTS["base"]].commit) == second


@unit
def test_one_file_of_a_repository(official, tmp_path):
    folder = write(tmp_path / "comfy", "split/vae.safetensors", "checkpoints/ace_turbo_aio.safetensors", "a.gguf")
    official.add("Comfy-Org/files", folder)
    found = locate("Comfy-Org/files/checkpoints/ace_turbo_aio.safetensors")
    assert found.model.name == "ace_turbo_aio.safetensors" and found.vae is None
    assert [name for name, _ in official.downloads] == ["checkpoints/ace_turbo_aio.safetensors"]
    with pytest.raises(
        InputError, match="has no checkpoints/ace_turbo.safetensors; did you mean checkpoints/ace_turbo_aio"
    ):
        locate("Comfy-Org/files/checkpoints/ace_turbo.safetensors")
    with pytest.raises(InputError, match="single file, name it: Comfy-Org/files/checkpoints/ace_turbo_aio.safetensors"):
        locate("Comfy-Org/files")


@unit
def test_mirror_with_several_models(official, tmp_path):
    folders = [f"acestep-v15-{variant}/{name}" for variant in ("turbo", "base") for name in MODEL]
    official.add("someone/mirror", write(tmp_path / "mirror", *folders, *REST))
    assert locate("someone/mirror", "base").model.name == "acestep-v15-base"
    assert locate("someone/mirror").model.name == "acestep-v15-turbo"
    assert locate("someone/mirror").key != locate("someone/mirror", "base").key
    with pytest.raises(InputError, match="variant: someone/mirror has no 'bass'; did you mean base"):
        locate("someone/mirror", "bass")


@unit
@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("xl-turbi", {}, "xl-turbi: no such folder, and no model of this name; did you mean xl-turbo"),
        (UNIFIED, {"variant": "xl-trubo"}, "variant: 'xl-trubo' is unknown; did you mean xl-turbo"),
        ("turbo", {"variant": "base"}, "variant: turbo is not base"),
        (VARIANTS["base"], {"variant": "sft"}, "variant: .*base is not sft; use 'ACE-Step/acestep-v15-sft'"),
        (UNIFIED, {"variant": "base", "revision": "v1"}, "revision: base is in a repository of its own"),
        ("someone/native", {"variant": "base"}, "variant: someone/native holds one model only"),
        ("./no/such/folder", {}, "no such folder or file, and no id of a repository"),
        ("someone/has--dashes", {}, "not the id of a repository"),
        ("ACE-Step/acestep-v15-bass", {}, "no such repository .*did you mean ACE-Step/acestep-v15-base.*token="),
        ("someone/private", {}, "no such repository at .*or a private one; .*HF_TOKEN"),
        ("someone/private", {"token": "hf_wrong"}, "no such repository at .*or a private one"),
        ("someone/gated", {}, "someone/gated: a gated repository; accept its conditions at .*someone/gated.*HF_TOKEN"),
        ("someone/gated", {"token": "hf_wrong"}, "a gated repository"),
        (
            VARIANTS["base"],
            {"revision": "v0.gone"},
            "revision: .* has no 'v0.gone'; expected a branch, a tag or a commit",
        ),
        ("someone/empty", {}, "someone/empty: holds no weights that can be read here; found README.md"),
        ("someone/pickle", {}, "someone/pickle: holds no weights; expected .*safetensors.* found .*pytorch_model.bin"),
        ("someone/quantised", {}, "holds no weights that can be read here; found model-Q8_0.gguf"),
        ("someone/bare", {}, "someone/bare: has no config.json"),
    ],
)
def test_bad_names_and_repositories_are_one_line(official, tmp_path, source, options, words):
    official.add("someone/private", write(tmp_path / "private", *UNIFIED_FILES), private=True)
    official.add("someone/gated", write(tmp_path / "gated", *MODEL), gated=True)
    official.add("someone/empty", write(tmp_path / "empty", "README.md"))
    official.add("someone/pickle", write(tmp_path / "pickle", "config.json", "silence_latent.pt", "pytorch_model.bin"))
    official.add("someone/quantised", write(tmp_path / "quantised", "model-Q8_0.gguf"))
    official.add("someone/bare", write(tmp_path / "bare", "model.safetensors", "silence_latent.pt"))
    with pytest.raises(InputError, match=words) as error:
        locate(source, **options)
    assert "\n" not in str(error.value)
    assert not [path for path in official.cache.glob("models--someone*/**/*.partial")]


@unit
def test_token_opens_private_and_gated_repositories(official, tmp_path, monkeypatch):
    official.add("someone/private", write(tmp_path / "private", *UNIFIED_FILES), private=True, gated=True)
    assert locate("someone/private", token="hf_right").vae.is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    shutil.rmtree(official.cache)
    assert locate("someone/private").vae.is_dir()


@unit
def test_no_network_says_what_is_in_the_cache(official):
    locate("base")
    official.close()
    with pytest.raises(InputError) as error:
        locate("xl-turbo")
    assert "cannot be reached" in str(error.value) and "holds ACE-Step/acestep-v15-base." in str(error.value)
    shutil.rmtree(official.cache)
    with pytest.raises(InputError, match="holds no model"):
        locate("base")
    with pytest.raises(InputError, match="holds no model"):
        locate("base", local_files_only=True)


@unit
def test_hub_that_is_down_counts_as_no_network(official):
    first = locate("base")
    official.broken = True
    assert locate("base") == first
    with pytest.raises(InputError, match="cannot be reached"):
        locate("sft")


@unit
def test_download_that_is_cut_ten_times_resumes(official):
    """Each connection breaks off at a random byte; no byte that arrived is asked for again."""
    official.cuts = 10
    found = locate("base")
    assert official.cuts == 0
    served = official.repositories[VARIANTS["base"]].folder
    assert (found.model / "model.safetensors").read_bytes() == (served / "model.safetensors").read_bytes()
    starts = [start for name, start in official.downloads if name == "model.safetensors"]
    assert len(official.downloads) == 10 + 3 + 6 and any(start > 0 for start in starts)


@unit
def test_interrupted_process_is_resumed_by_the_next(official, monkeypatch):
    """Ten processes in a row that are ended at a random byte, and one that is not."""
    monkeypatch.setattr(download, "ATTEMPTS", 0)  # the first failure, with bytes or without, ends the call
    monkeypatch.setattr(download, "WORKERS", 1)
    kept, endings = 0, 0
    while True:
        official.cuts, official.downloads[:] = (1 if endings < 10 else 0), []
        try:
            locate("base")
            break
        except InputError as error:
            assert "resumes" in str(error)
            endings += 1
        now = sum(path.stat().st_size for path in official.cache.rglob("*.partial"))
        now += sum(path.stat().st_size for path in (official.cache).glob("*/blobs/*") if path.suffix != ".partial")
        assert now > kept
        kept = now
    assert endings == 10
    assert (locate("base").model / "model.safetensors").read_bytes().startswith(b"basemodel")


@unit
def test_wrong_bytes_are_an_error_and_not_kept(official):
    official.change = lambda name, data: data[:-1] + b"!" if name == "model.safetensors" else data
    with pytest.raises(
        InputError, match="model.safetensors of .*base: the bytes that arrived have the hash .* promised"
    ):
        locate("base")
    assert not list(official.cache.rglob("*.partial")) and not list(
        official.cache.glob("models--ACE-Step--acestep-v15-base/**/model.safetensors")
    )
    shutil.rmtree(official.cache)
    official.change = lambda name, data: b"[]" + data[2:] if name == "config.json" else data
    with pytest.raises(InputError, match="config.json of .*: the bytes that arrived"):  # a small file, hashed as by git
        locate("base")
    official.change = None
    assert (locate("base").model / "model.safetensors").is_file()


@unit
def test_what_an_earlier_process_left_damaged_is_downloaded_anew(official):
    served = official.repositories[VARIANTS["base"]]
    digest = served.files["model.safetensors"]["lfs"]["sha256"]
    blobs = download.repository_folder(official.cache, VARIANTS["base"]) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.partial").write_bytes(b"not these bytes")
    found = locate("base")
    assert (found.model / "model.safetensors").read_bytes() == (served.folder / "model.safetensors").read_bytes()


@unit
def test_half_deleted_cache_is_repaired(official):
    found = locate("base")
    blob = (found.model / "model.safetensors").resolve()
    expected = blob.read_bytes()
    blob.unlink()  # the link stays
    os.truncate((found.vae / "diffusion_pytorch_model.safetensors").resolve(), 5)
    (found.model / "config.json").unlink()
    assert locate("base") == found and blob.read_bytes() == expected
    assert (found.vae / "diffusion_pytorch_model.safetensors").stat().st_size > 5
    blob.unlink()
    official.close()
    with pytest.raises(InputError, match="incomplete in the cache"):
        locate("base")


@unit
def test_disk_without_room_is_refused_before_the_download(official, monkeypatch):
    usage = shutil.disk_usage(official.cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB to download, but the disk has 0.00 GB free; make room"):
        locate("base")
    assert not official.downloads


@unit
def test_disk_that_fills_during_the_download(official, monkeypatch):
    """What arrived is kept, nothing that is not whole has a name, and the same call resumes."""
    link = download._link

    def full(blob, pointer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_link", full)
    with pytest.raises(InputError, match="the disk is full; make room.*resumes"):
        locate("base")
    monkeypatch.setattr(download, "_link", link)
    assert not list(official.cache.glob("*/snapshots/*/*"))
    assert (locate("base").model / "model.safetensors").is_file()


@unit
def test_cache_that_other_programs_filled_is_used(official):
    """huggingface_hub's own download and this one find each other's files."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(VARIANTS["base"], endpoint=official.endpoint)
    official.downloads.clear()
    found = locate("base")
    assert str(found.model) == folder and not {name for name, _ in official.downloads} & set(MODEL)
    again = snapshot_download(UNIFIED, allow_patterns=["vae/*"], endpoint=official.endpoint)
    assert again == str(found.vae.parent)


def test_environment_variables_of_the_hub_are_those_of_huggingface_hub(official, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN in a process of its own."""
    official.add("someone/private", write(tmp_path / "private", *UNIFIED_FILES), private=True)
    environment = official.environment | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_right"}
    del environment["HF_HUB_CACHE"]
    code = "from acestep_jax.io.hub import locate; print(locate('someone/private').vae)"
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.startswith(str(tmp_path / "home" / "hub" / "models--someone--private"))


@unit
def test_table_of_names_is_that_of_the_application():
    """SUBMODEL_REGISTRY of acestep/model_downloader.py, without its planners, and MAIN_MODEL_REPO."""
    assert VARIANTS["turbo"] == UNIFIED == "ACE-Step/Ace-Step1.5"
    assert {name: id for name, id in VARIANTS.items() if name != "turbo"} == {
        "base": "ACE-Step/acestep-v15-base",
        "sft": "ACE-Step/acestep-v15-sft",
        "turbo-shift1": "ACE-Step/acestep-v15-turbo-shift1",
        "turbo-shift3": "ACE-Step/acestep-v15-turbo-shift3",
        "turbo-continuous": "ACE-Step/acestep-v15-turbo-continuous",
        "xl-base": "ACE-Step/acestep-v15-xl-base",
        "xl-sft": "ACE-Step/acestep-v15-xl-sft",
        "xl-turbo": "ACE-Step/acestep-v15-xl-turbo",
    }


def test_small_files_that_comfyui_lacks(official):
    """Come by the same way as models: once, alone, also where the network ends midway, and later without it."""
    path = f"{TEXT_ENCODER}/tokenizer.json"
    assert fetch_companion(path).read_bytes() == (official.repositories[UNIFIED].folder / path).read_bytes()
    assert official.downloads == [(path, 0)]
    official.broken = True
    assert fetch_companion(path).name == "tokenizer.json" and official.downloads == [(path, 0)]
    assert fetch_companion(path, local_files_only=True).is_file()
    with pytest.raises(InputError, match=f"{UNIFIED}: incomplete in the cache, and .* cannot be reached"):
        fetch_companion(f"{MODEL_PREFIX}turbo/silence_latent.pt")
    official.broken = False
    with pytest.raises(InputError, match=f"^{UNIFIED}: has no absent.json"):
        fetch_companion("absent.json")


@unit
def test_an_error_names_the_repository_that_it_is_of(official, tmp_path):
    """The networks that a fine-tuned model lacks come from ACE-Step's repository."""
    official.add("someone/tuned", write(tmp_path / "tuned", *MODEL))
    official.repositories[UNIFIED].gated = True
    with pytest.raises(InputError, match=f"^{UNIFIED}: a gated repository"):
        locate("someone/tuned")
    official.repositories[UNIFIED].gated = False
    official.repositories["someone/tuned"].gated = True
    shutil.rmtree(official.cache, ignore_errors=True)
    with pytest.raises(InputError, match="^someone/tuned: a gated repository"):
        locate("someone/tuned")
