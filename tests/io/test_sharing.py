"""Models that are saved and uploaded: what is written is what is in memory, and loads again, also from the hub."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError
from acestep_jax.io import checkpoint, sharing
from acestep_jax.io.adapter import Adapter, save_adapter
from acestep_jax.io.hub import locate
from acestep_jax.io.manifest import read_manifest
from acestep_jax.models.config import LoRAConfig

unit = pytest.mark.unit

LAYER = "layers.self_attn.to_q"


@pytest.fixture(scope="module")
def loaded():
    """The small model, in half precision."""
    return AceStepPipeline.from_pretrained(dtype="bfloat16")


@pytest.fixture
def pipe(loaded):
    """A pipeline of its own for each test, of the same networks."""
    pipe = AceStepPipeline(**loaded.networks, tokenizer=loaded.tokenizer, sampling_defaults=loaded.sampling_defaults)
    pipe.loaded_from = loaded.loaded_from
    return pipe


@pytest.fixture
def adapter(pipe, tmp_path):
    """The folder of an adapter of one layer."""
    *stack, inputs, outputs = pipe.transformer.layers.self_attn.to_q.kernel.shape
    leaves = {f"{LAYER}.lora_a": np.ones((*stack, inputs, 2), np.float32)}
    leaves[f"{LAYER}.lora_b"] = np.ones((*stack, 2, outputs), np.float32)
    (tmp_path / "adapters").mkdir()
    path = tmp_path / "adapters" / "style"
    save_adapter(path, Adapter(LoRAConfig(rank=2, alpha=2.0, targets=(LAYER,)), leaves))
    return path


def assert_same(found, expected):
    """Fail unless two pipelines hold the same arrays, bit for bit, and compute in the same dtypes."""
    assert found.networks.keys() == expected.networks.keys() and found.defaults == expected.defaults
    for name, network in expected.networks.items():
        ours, theirs = checkpoint.leaves(found.networks[name]), checkpoint.leaves(network)
        assert ours.keys() == theirs.keys() and found.networks[name].runtime == network.runtime
        for leaf, variable in theirs.items():
            assert ours[leaf][...].dtype == variable[...].dtype, leaf
            np.testing.assert_array_equal(np.asarray(ours[leaf][...]), np.asarray(variable[...]), err_msg=leaf)


def test_saved_model_is_the_one_in_memory(pipe, tmp_path):
    kernel = pipe.transformer.proj_in_conv.kernel
    before = kernel[...]
    try:
        kernel[...] = (before * 2).astype(jnp.bfloat16)  # not what the folder it came from holds
        pipe.save_pretrained(tmp_path / "copy")
        found = AceStepPipeline.from_pretrained(tmp_path / "copy")
        assert_same(found, pipe)
    finally:
        kernel[...] = before
    assert (tmp_path / "copy/tokenizer.json").read_text() == (checkpoint.SMALL_MODEL / "tokenizer.json").read_text()
    assert read_manifest(tmp_path / "copy").tokenizer_config == read_manifest(checkpoint.SMALL_MODEL).tokenizer_config
    pipe.loaded_from = None  # a pipeline of networks that were read from nowhere
    pipe.save_pretrained(tmp_path / "again")
    assert found.tokenizer.encode("a b").ids == checkpoint.load_tokenizer(tmp_path / "again").encode("a b").ids


@unit
def test_existing_folder_and_missing_networks_are_refused(pipe, loaded, tmp_path):
    with pytest.raises(InputError, match="already exists"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no-such does not exist"):
        pipe.save_pretrained(tmp_path / "no-such" / "copy")
    part = AceStepPipeline(transformer=loaded.transformer)
    with pytest.raises(InputError, match="condition_encoder, text_encoder, vae: not in the pipeline"):
        part.save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@unit
def test_adapters_must_be_off(pipe, loaded, adapter, tmp_path):
    pipe.load_lora_weights(adapter, "mine")
    with pytest.raises(InputError, match="adapters: mine would be lost.*unload_lora.*merge-lora"):
        pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    pipe.set_adapters("mine", 0.0)
    pipe.save_pretrained(tmp_path / "copy")
    assert_same(AceStepPipeline.from_pretrained(tmp_path / "copy"), loaded)


@unit
def test_names_of_diffusers_for_adapters(pipe, adapter):
    base = pipe.transformer
    pipe.load_lora_weights(str(adapter))
    pipe.load_lora_weights(adapter.parent, "other", weight_name="style")
    assert pipe.adapters == {"style": 1.0, "other": 1.0}
    pipe.set_adapters(["style", "other"], adapter_weights=[0.7, None])
    assert pipe.adapters == {"style": 0.7, "other": 1.0}
    pipe.set_adapters("other", 0.5)
    assert pipe.adapters == {"style": 0.0, "other": 0.5}
    pipe.set_adapters({"style": 0.2})
    assert pipe.adapters == {"style": 0.2, "other": 0.0}
    for arguments, words in (
        ((["style", "other"], [1.0]), "adapter_weights: expected one or 2, one for each adapter, found 1"),
        (({"style": 1.0}, 2.0), "adapter_weights: the scales are given by name already"),
        ((3,), "scales: expected scales by name"),
        (("stile",), "adapters: 'stile' is unknown; did you mean 'style'"),
        (("style", "loud"), "expected a finite number such as 0.8, found 'loud'"),
    ):
        with pytest.raises(InputError, match=words):
            pipe.set_adapters(*arguments)
    pipe.unload_lora_weights()
    assert pipe.transformer is base


@unit
def test_adapter_of_the_hub(pipe, adapter, hub):
    hub.add("someone/style-lora", adapter)
    pipe.load_lora_weights("someone/style-lora")
    assert pipe.adapters == {"style-lora": 1.0}
    with pytest.raises(InputError, match="someone/style-lora: has no a.safetensors; did you mean adapter.safetensors"):
        pipe.load_lora_weights("someone/style-lora", weight_name="a.safetensors")
    with pytest.raises(InputError, match="someone/none: no such repository"):
        pipe.load_lora_weights("someone/none")
    hub.add("someone/deep", adapter.parent)
    with pytest.raises(InputError, match="no .safetensors file in its first folder; name one of style/adapter"):
        pipe.load_lora_weights("someone/deep")


def test_upload_and_download_again(pipe, loaded, hub, tmp_path):
    """Through a hub's own commit, and back through `locate`: the same model, and a card that says what it is."""
    address = pipe.push_to_hub("me/copy", token=hub.token, private=True, commit_message="First")
    (id, message, files), *more = hub.commits
    assert (id, message, more) == ("me/copy", "First", []) and address.startswith(f"{hub.endpoint}/me/copy/commit/")
    assert hub.created == [("me/copy", True)]
    for name, data in files.items():
        (tmp_path / "served" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "served" / name).write_bytes(data)
    hub.add("me/copy", tmp_path / "served", private=True)
    found = locate("me/copy", token=hub.token)
    assert_same(AceStepPipeline.from_pretrained(found.model), loaded)
    assert 'from_pretrained("me/copy")' in files["README.md"].decode() and not (found.model / "README.md").exists()
    hub.close()
    assert locate("me/copy") == found


@unit
@pytest.mark.parametrize(
    ("id", "token", "words"),
    [
        ("me/copy", "hf_wrong", "me/copy: .* refuses the upload .*give token= with the right to write"),
        ("me/copy/of/it", "hf_right", "repo_id: 'me/copy/of/it' is not the id of a repository"),
    ],
)
def test_refused_uploads(pipe, hub, id, token, words):
    with pytest.raises(InputError, match=words) as error:
        pipe.push_to_hub(id, token=token)
    assert "\n" not in str(error.value) and not hub.commits


@unit
def test_upload_without_network(pipe, hub):
    hub.close()
    with pytest.raises(InputError, match="cannot be reached"):
        pipe.push_to_hub("me/copy", token="hf_right")


@unit
def test_model_card_says_what_it_was_made_from(pipe, tmp_path):
    """What `source.json` of the checkpoint says; it stays with copies of copies."""
    source = {
        "source": "ACE-Step/Ace-Step1.5",
        "variant": "turbo",
        "key": "acestep-v15-turbo-0123",
        "dtype": "bfloat16",
    }
    folder = tmp_path / "converted"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_bytes((checkpoint.SMALL_MODEL / file).read_bytes())
    (folder / "source.json").write_text(json.dumps(source | {"files": {}}))
    pipe.loaded_from = folder
    pipe.save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy/README.md").read_text()
    assert "base_model: ACE-Step/Ace-Step1.5\n" in card and card.startswith("---\nlibrary_name: acestep-jax\n")
    assert "Made from [ACE-Step/Ace-Step1.5](https://huggingface.co/ACE-Step/Ace-Step1.5), variant turbo" in card
    assert "`acestep-v15-turbo-0123`" in card and "| transformer |" in card and "bfloat16" in card
    assert "licence" in card.lower() and f'from_pretrained("{tmp_path / "copy"}")' in card
    assert json.loads((tmp_path / "copy/source.json").read_text()) == source
    assert "base_model" not in sharing.model_card("x", pipe.networks, {"source": "./here"})
