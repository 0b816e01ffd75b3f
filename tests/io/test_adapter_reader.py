"""Adapters of other trainers, read without a conversion: every kind and spelling gives what theirs gives."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from acestep_jax import InputError
from acestep_jax.io.adapter import LoadedAdapters, load_adapter, merge_adapters, save_adapter
from acestep_jax.io.adapter_names import find_layer, linear_layers
from tests.adapters import PEFT_TARGETS, pair, peft_model, random_adapter, torch_velocity, velocity
from tests.parity import assert_close, relative_error

LIMIT = 1e-5
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def randomise(parameters, seed=0):
    """Fill tensors in place so that the change of a layer's weights is about a fifth of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters:
            value.copy_(0.35 * torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.25)


def peft_product(config):
    model = get_peft_model(copy.deepcopy(pair()[0]), config).eval()
    randomise(value for name, value in model.named_parameters() if "lokr_" in name or "hada_" in name)
    return model


PRODUCTS = {
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=PEFT_TARGETS),
    "lokr of two low ranks": LoKrConfig(
        r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=PEFT_TARGETS
    ),
    "lokr of whole matrices": LoKrConfig(r=64, alpha=32, target_modules=PEFT_TARGETS),
    "loha": LoHaConfig(r=3, alpha=2, target_modules=PEFT_TARGETS),
    "loha of many ranks": LoHaConfig(
        r=3, alpha=2, rank_pattern={"to_v": 2}, alpha_pattern={"up_proj": 4}, target_modules=PEFT_TARGETS
    ),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_of_peft(tmp_path, case):
    """Read as they are, merged, saved in our format, and beside other adapters at any scale."""
    theirs = peft_product(PRODUCTS[case])
    theirs.save_pretrained(tmp_path / "peft")
    reference, base = torch_velocity(theirs), pair()[1]
    adapter = load_adapter(tmp_path / "peft")
    assert relative_error(velocity(base), reference) > 0.01
    assert_close(velocity(merge_adapters(base, [adapter], [1.0])), reference, LIMIT)
    save_adapter(tmp_path / "ours", adapter)
    again = load_adapter(tmp_path / "ours")
    assert again.config == adapter.config and again.leaves.keys() == adapter.leaves.keys()

    loaded = LoadedAdapters.none(base).load(tmp_path / "ours", 0.5)
    assert_close(velocity(loaded.set({"ours": 1.0}).network), reference, LIMIT)
    assert_close(velocity(loaded.set({"ours": 0.0}).network), velocity(base), 0.0)
    if case == "lokr":
        both = loaded.load(random_adapter(), 0.7, "style")
        expected = merge_adapters(base, [adapter, random_adapter()], [0.5, 0.7])
        assert_close(velocity(both.network), velocity(expected), LIMIT)
        with pytest.raises(InputError, match="changed by a DoRA adapter and by a LoKr or LoHa adapter"):
            loaded.load(random_adapter(use_dora=True), 1.0, "dora")


LYCORIS = {
    "lokr": dict(algo="lokr", linear_dim=2, linear_alpha=3),
    "lokr of the original trainer": dict(algo="lokr", linear_dim=2, linear_alpha=4, factor=-1, decompose_both=True),
    "lokr of whole matrices": dict(algo="lokr", linear_dim=2, linear_alpha=4, full_matrix=True, rs_lora=True),
    "loha": dict(algo="loha", linear_dim=3, linear_alpha=2, rs_lora=True),
    "locon": dict(algo="lora", linear_dim=3, linear_alpha=2),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_products_of_lycoris(tmp_path, case, monkeypatch):
    """With the flattened names and the scaling of the library that ACE-Step's own trainer uses."""
    lycoris = pytest.importorskip("lycoris", reason="pip install lycoris-lora")
    theirs = copy.deepcopy(pair()[0]).eval()
    targets = dict.fromkeys(("unet_target_name", "target_name"), [r".*to_[qkv]", r".*_proj"])
    lycoris.LycorisNetwork.apply_preset(targets | {"unet_target_module": [], "target_module": []})
    network = lycoris.create_lycoris(theirs, 1.0, **LYCORIS[case])
    network.apply_to()
    randomise((p for p in network.parameters() if p.requires_grad), seed=1)
    header = {"lokr_config": json.dumps(LYCORIS[case])}
    network.save_weights(str(tmp_path / "lokr_weights.safetensors"), torch.float32, header)
    (tmp_path / "training_state.pt").write_bytes(b"")
    assert any(name.startswith("lycoris_layers_0_") for name in load_file(tmp_path / "lokr_weights.safetensors"))
    reference = torch_velocity(theirs)
    assert relative_error(velocity(pair()[1]), reference) > 0.01
    assert_close(velocity(merge_adapters(pair()[1], [load_adapter(tmp_path)], [1.0])), reference, LIMIT)


def test_trainers_folder_holds_the_adapter(tmp_path):
    theirs = peft_model()
    theirs.save_pretrained(tmp_path / "checkpoint" / "adapter")
    (tmp_path / "checkpoint" / "training_state.pt").write_bytes(b"")
    adapter = load_adapter(tmp_path / "checkpoint")
    assert_close(velocity(merge_adapters(pair()[1], [adapter], [1.0])), torch_velocity(theirs), LIMIT)


def dotted(prefix, original):
    names = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "o_proj"} if original else {}
    return lambda name: (
        prefix + names.get(name, next((name.replace(a, b) for a, b in names.items() if a in name), name))
    )


SPELLINGS = {
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "lycoris": lambda name: "lycoris_" + name.replace(".", "_"),
    "lycoris on the whole model": lambda name: "lycoris_decoder_" + dotted("", True)(name).replace(".", "_"),
    "lora_transformer": lambda name: "lora_transformer_" + dotted("", True)(name).replace(".", "_"),
    "torch.compile": dotted("_orig_mod.", False),
    "torch.compile in PEFT": dotted("base_model.model._orig_mod.", True),
    "torch.compile of each layer": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "torch.compile, flattened": lambda name: "lycoris__orig_mod_" + name.replace(".", "_"),
    "data parallel": dotted("module.decoder.", True),
    "plain model": dotted("model.diffusion_model.decoder.", True),
}


@pytest.mark.parametrize(
    ("case", "part"),
    [
        *((case, "lora_A.default.weight") for case in SPELLINGS),
        *(("kohya", part) for part in ("lora_A.weight", "lora_down.weight", "lora.down.weight")),
    ],
)
def test_names_in_the_wild(tmp_path, case, part):
    peft_model().save_pretrained(tmp_path / "peft")
    expected = load_adapter(tmp_path / "peft").leaves
    found = {}
    for name, value in load_file(tmp_path / "peft" / WEIGHTS).items():
        module, _, own = name.removeprefix("base_model.model.").partition(".lora_")
        own = part if own == "A.weight" else part.replace("A", "B").replace("down", "up")
        found[f"{SPELLINGS[case](module)}.{own}"] = value
        found[f"{SPELLINGS[case](module)}.alpha"] = np.array(8, np.float32)
    save_file(found, tmp_path / "style.safetensors")
    adapter = load_adapter(tmp_path / "style.safetensors")
    assert adapter.config.scaling == 2.0 and adapter.leaves.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(adapter.leaves[name], value)


@pytest.mark.parametrize("prefix", ["text_encoder.", "lora_te_", "encoder.lyric_encoder.", "vae.", "lora_te1_model_"])
def test_layers_of_other_networks_are_not_taken_for_ours(prefix):
    assert find_layer(f"{prefix}layers.0.self_attn.q_proj") is None
    assert find_layer("layers.self_attn.q_proj") is find_layer("layers.0.condition_embedder") is None
    assert find_layer("layers.17.cross_attn.o_proj") == ("layers.cross_attn.to_out", 17)
    assert find_layer("time_embed_r.linear_1") == ("time_embed_r.linear_1", None)
    assert len(linear_layers()) == 18


def peft_folder(folder, **options):
    peft_model(**options).save_pretrained(folder)
    return json.loads((folder / SETTINGS).read_text())


# What PEFT writes of an adapter that is relative to changed weights, or that has more than its factors.
REFUSED = {
    "PiSSA": dict(init_lora_weights="pissa"),
    "PiSSA by iterations": dict(init_lora_weights="pissa_niter_4"),
    "OLoRA": dict(init_lora_weights="olora"),
    "CorDA": dict(init_lora_weights="corda"),
    "LoftQ": dict(init_lora_weights="loftq"),
    "LoRA-GA": dict(init_lora_weights="lora_ga"),
    "a new one": dict(init_lora_weights="something_of_2027"),
    "a new setting": dict(use_something_of_2027=True),
    "block-diagonal": dict(use_bdlora={"nblocks": 2}),
    "fan in": dict(fan_in_fan_out=True),
    "VeRA": dict(peft_type="VERA"),
    "biases": dict(bias="lora_only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_known_are_refused_by_name(tmp_path, case):
    values = peft_folder(tmp_path / "peft", target_modules=["to_q"]) | REFUSED[case]
    (tmp_path / "peft" / SETTINGS).write_text(json.dumps(values))
    ((key, value),) = REFUSED[case].items()
    with pytest.raises(InputError, match=key) as error:
        load_adapter(tmp_path / "peft")
    assert repr(value) in str(error.value) and SETTINGS in str(error.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_weights_alone_are_read(tmp_path, start):
    values = peft_folder(tmp_path / "peft", target_modules=["to_q"]) | dict(init_lora_weights=start)
    (tmp_path / "peft" / SETTINGS).write_text(json.dumps(values))
    assert load_adapter(tmp_path / "peft").config.rank == 4


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_makes_plain_is_read(tmp_path, start):
    """The way out that the refusal names: the adapter as it was before training makes a plain LoRA of the later one."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "up_proj"], init_lora_weights=start)
    model = get_peft_model(copy.deepcopy(pair()[0]), config).eval()
    model.peft_config["default"].init_lora_weights = True  # as its documentation has it
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                value.mul_(1.3)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(InputError, match=f"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "trained")
    reference = torch_velocity(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = load_adapter(tmp_path / "plain")
    assert relative_error(velocity(pair()[1]), reference) > 0.01
    assert_close(velocity(merge_adapters(pair()[1], [adapter], [1.0])), reference, 10 * LIMIT)


def product_file(file, kind, **more):
    layer = "lycoris_layers_0_self_attn_q_proj"
    parts = {
        "lokr": {"lokr_w1": (4, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)},
        "loha": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
    }[kind]
    save_file({f"{layer}.{name}": np.ones(shape, np.float32) for name, shape in (parts | more).items()}, file)


KINDS = {
    "lokr with decomposed weights": ("lokr", dict(dora_scale=(32, 1)), "is a LoKr adapter with weight decomposition"),
    "loha with decomposed weights": ("loha", dict(dora_scale=(1, 32)), "is a LoHa adapter with weight decomposition"),
    "tucker": ("lokr", dict(lokr_t2=(2, 2, 3, 3)), "lokr_t2 belongs to a Tucker decomposition"),
    "whole": ("lokr", dict(diff=(32, 32)), "diff belongs to a difference of whole weights"),
    "oft": ("loha", dict(oft_blocks=(2, 4, 4)), "oft_blocks belongs to an OFT adapter"),
    "two kinds": ("lokr", {"hada_w1_a": (32, 2)}, "is LoHa and LoKr"),
    "ranks": ("lokr", dict(lokr_w2_b=(3, 4)), "has ranks 2 and 3, expected one rank"),
    "three axes": ("lokr", dict(lokr_w1=(4, 8, 1)), "has shape .4, 8, 1., expected two axes"),
    "shapes": ("loha", dict(hada_w2_a=(31, 2)), "have shapes .32, 2., .2, 32., .31, 2."),
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds_are_told_before_shapes(tmp_path, case):
    kind, more, message = KINDS[case]
    product_file(tmp_path / "style.safetensors", kind, **more)
    with pytest.raises(InputError, match=rf"style.safetensors: .*{message}"):
        load_adapter(tmp_path / "style.safetensors")


def test_products_of_another_model_are_refused(tmp_path):
    product_file(tmp_path / "style.safetensors", "lokr", lokr_w1=(4, 7))
    with pytest.raises(
        InputError, match=r"factors of layers.self_attn.to_q have shapes \[7, 4\] and \[4, 8\].*another"
    ):
        LoadedAdapters.none(pair()[1]).load(tmp_path / "style.safetensors")


def test_several_adapters_in_a_file_are_named(tmp_path):
    ones = np.ones((4, 32), np.float32)
    names = ("layers.0.self_attn.q_proj.lora_A.one.weight", "layers.0.self_attn.q_proj.lora_A.two.weight")
    save_file(
        dict.fromkeys(names, ones) | {"layers.0.self_attn.q_proj.lora_B.one.weight": ones.T.copy()},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(InputError, match="holds several adapters, one, two"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    peft_model(target_modules=["to_q"]).save_pretrained(tmp_path / "peft")
    found = load_file(tmp_path / "peft" / WEIGHTS)
    next(iter(found.values()))[0, 0] = value
    save_file(found, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(InputError, match="to_q.lora_[ab] holds NaN or infinities"):
        load_adapter(tmp_path / "peft")
