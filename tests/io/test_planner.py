"""Planners: found beside a model, by name or on the hub; converted from and to PyTorch; bad ones refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from acestep_jax.convert.from_torch import from_torch
from acestep_jax.convert.random_checkpoint import randomise
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.conversion import open_source
from acestep_jax.io.planner import load_planner, planner_folder
from acestep_jax.io.planner_files import choose_planner

UNIFIED = "ACE-Step/Ace-Step1.5"
SMALL = dict(
    vocab_size=171,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    first_code=31,
    num_codes=130,
    eos_token_id=5,
)


def write_planner(folder, seed=0):
    """Write a planner as ACE-Step publishes it: bfloat16, names without the prefix, the tokenizer's files beside."""
    network = randomise(Qwen3ForCausalLM(Qwen3Config(**SMALL)), seed).to(torch.bfloat16)
    network.save_pretrained(folder)
    file = folder / "model.safetensors"
    rewrite(file, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def rewrite(file, change):
    save_file({name: np.ascontiguousarray(t) for name, t in change(load_file(file)).items()}, file, {"format": "pt"})


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    return write_planner(tmp_path_factory.mktemp("planner") / "acestep-5Hz-lm-1.7B")


@pytest.fixture
def planner(published, tmp_path):
    return shutil.copytree(published, tmp_path / "models" / "acestep-5Hz-lm-1.7B")


def same_weights(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value.view(np.uint16), second[name].view(np.uint16), name)


def test_from_torch_and_back_is_bit_exact(planner, tmp_path):
    from_torch(planner, tmp_path / "native")
    to_torch(tmp_path / "native", tmp_path / "again", layout="original")
    same_weights(planner, tmp_path / "again")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (planner / name).read_bytes()
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "again")
    assert theirs.config.vocab_size == 171 and theirs.dtype == torch.bfloat16
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


def test_names_with_a_prefix_the_head_and_shards_are_read(planner, tmp_path):
    expected = load_planner(planner, dtype="bfloat16", cache_dir=tmp_path / "a").network
    prefixed = lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()}  # noqa: E731
    head = lambda tensors: prefixed(tensors) | {"lm_head.weight": tensors["embed_tokens.weight"]}  # noqa: E731
    for change in (head, None):
        if change is not None:
            rewrite(planner / "model.safetensors", change)
        else:
            split(planner)
        found = load_planner(planner, dtype="bfloat16", cache_dir=tmp_path / "b").network
        assert checkpoint.leaves(found).keys() == checkpoint.leaves(expected).keys()
        for name, leaf in checkpoint.leaves(expected).items():
            np.testing.assert_array_equal(checkpoint.leaves(found)[name][...], leaf[...], name)


def split(folder):
    """Replace the one file of weights by two and an index."""
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for part, some in enumerate((names[:7], names[7:]), start=1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_it_is_found_beside_a_model_and_converted_once(planner, tiny, tmp_path):
    model = tmp_path / "models" / "acestep-v15-turbo"
    model.mkdir()
    (model / "config.json").write_text("{}")
    folder = planner_folder(model, cache_dir=tmp_path / "cache")
    for source in (planner, planner.parent, str(model)):
        assert planner_folder(source, cache_dir=tmp_path / "cache") == folder
    network, tokenizer = load_planner(planner.parent, cache_dir=tmp_path / "cache")
    assert network.config.vocab_size == 171 and network.runtime.dtype == "float32"  # which suits a CPU
    assert (tokenizer / "merges.txt").is_file()
    # A native one lies in the folder of a model's native checkpoint, whose own networks are loaded without it.
    native = shutil.copytree(tiny[1], tmp_path / "native")
    shutil.copytree(folder, native / "planner")
    assert planner_folder(native) == native / "planner"
    assert planner_folder(native / "planner") == native / "planner"
    assert "planner" not in checkpoint.read_manifest(native).configs


def test_the_default_of_several_is_the_1_7b():
    names = ["acestep-5Hz-lm-0.6B", "acestep-5Hz-lm-1.7B", "vae"]
    assert choose_planner(names, None, "here") == names[1]
    assert choose_planner(names, "0.6B", "here") == names[0]
    assert choose_planner(names[:1], None, "here") == names[0]
    assert choose_planner(["vae"], "4B", "here") is None
    with pytest.raises(InputError, match="several planners.*0.6B, 4B"):
        choose_planner(["acestep-5Hz-lm-0.6B", "acestep-5Hz-lm-4B"], None, "here")
    with pytest.raises(InputError, match="here has no acestep-5Hz-lm-4B"):
        choose_planner(names, "4B", "here")


def test_planners_of_the_hub(hub, published, tmp_path):
    """The main repository holds 1.7B beside the model; the others are repositories of their own."""
    unified = tmp_path / "unified"
    shutil.copytree(published, unified / "acestep-5Hz-lm-1.7B")
    for name in ("acestep-v15-turbo", "vae"):
        (unified / name).mkdir()
        (unified / name / "config.json").write_text("{}")
    hub.add(UNIFIED, unified)
    hub.add("ACE-Step/acestep-5Hz-lm-4B", write_planner(tmp_path / "4B", seed=1))
    cache = tmp_path / "cache"
    main = planner_folder(UNIFIED, cache_dir=cache)
    assert not any("acestep-v15" in str(path) or "vae" in str(path) for path in hub.downloads)
    for source in ("acestep-5Hz-lm-1.7B", "ACE-Step/acestep-5Hz-lm-1.7B", "turbo"):
        assert planner_folder(source, cache_dir=cache) == main
    other = planner_folder("ACE-Step/acestep-5Hz-lm-4B", cache_dir=cache)
    assert other != main and planner_folder(UNIFIED, "4B", cache_dir=cache) == other
    # Without network, what was downloaded is used.
    assert planner_folder(UNIFIED, cache_dir=cache, local_files_only=True) == main
    with pytest.raises(InputError, match="planner: acestep-5Hz-lm-4B is not 0.6B"):
        planner_folder("acestep-5Hz-lm-4B", "0.6B", cache_dir=cache)


def remove(name):
    return lambda folder: (folder / name).unlink()


def configured(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change):
    return lambda folder: rewrite(folder / "model.safetensors", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("merges.txt"), "no tokenizer; expected vocab.json and merges.txt, or tokenizer.json"),
        (remove("model.safetensors"), "no weights"),
        (configured(vocab_size=160), "config.json: PlannerConfig.vocab_size: expected at least 161"),
        (configured(num_codes=64000), "config.json: PlannerConfig.vocab_size.*audio codes, found 171"),
        (configured(tie_word_embeddings=False), "tie_word_embeddings: expected true"),
        (configured(hidden_size=32), "misshapen: embed_tokens.weight"),
        (tensors(lambda t: {n: v for n, v in t.items() if n != "norm.weight"}), "missing: norm.weight"),
        (tensors(lambda t: t | {"extra.weight": t["norm.weight"]}), "unexpected: extra.weight"),
        (tensors(lambda t: t | {"model.norm.weight": t["norm.weight"]}), "with and without the prefix"),
        (
            tensors(lambda t: t | {"lm_head.weight": t["embed_tokens.weight"] + t["embed_tokens.weight"][:1]}),
            "lm_head.weight differs from embed_tokens.weight",
        ),
    ],
)
def test_bad_planners_are_refused(planner, tmp_path, change, message):
    change(planner)
    with pytest.raises(InputError, match=f"(?s)planner.*{message}"):
        planner_folder(planner, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_where_planners_are_is_said(tiny, tmp_path):
    for source in tiny:
        with pytest.raises(InputError, match="no planner.*Ace-Step1.5.*acestep-5Hz-lm-0.6B"):
            load_planner(source, cache_dir=tmp_path)
    with pytest.raises(InputError, match="no such folder.*ACE-Step/acestep-5Hz-lm-4B"):
        load_planner("./nothing")
    with pytest.raises(InputError, match="revision"):
        load_planner(tiny[0], revision="main")


def test_a_planner_is_no_model(planner, tmp_path):
    configured(vocab_size=217204)(planner)
    with pytest.raises(InputError, match="5 Hz language model"):
        open_source(planner)
    with pytest.raises(InputError, match="--vae: .*planner"):
        from_torch(planner, tmp_path / "native", vae=planner)
    with pytest.raises(InputError, match="--layout: .*original"):
        to_torch(
            planner_folder(write_planner(tmp_path / "other"), cache_dir=tmp_path), tmp_path / "x", layout="diffusers"
        )
