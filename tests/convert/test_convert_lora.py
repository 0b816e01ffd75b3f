"""Adapters of PEFT, diffusers and ComfyUI in our network, and ours in theirs: the same output, at the same scale."""

import copy
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from acestep_jax import InputError
from acestep_jax.convert import __main__ as command_line
from acestep_jax.convert.lora import lora_from_torch, lora_to_torch
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import load_adapter, merge_adapters, save_adapter
from acestep_jax.io.checkpoint import load
from acestep_jax.io.conversion import from_torch
from acestep_jax.io.files import as_path, upload
from acestep_jax.io.native import native_folder
from tests import cloud
from tests.adapters import (
    ATTENTION,
    CONFIG,
    MLP,
    OTHERS,
    original_model,
    pair,
    peft_model,
    random_adapter,
    torch_velocity,
    velocity,
)
from tests.folders import tensors
from tests.parity import assert_close, relative_error

LIMIT = 1e-5
EVERY_LAYER = (*ATTENTION, *MLP, *OTHERS)
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def merged_velocity(folder, scale=1.0):
    return velocity(merge_adapters(pair()[1], [load_adapter(folder)], [scale]))


# Options of PEFT's LoraConfig; each changes the scaling or the rank of some layer, or leaves some out.
PEFT_CASES = {
    "alpha": {},
    "rslora": dict(use_rslora=True, r=4, lora_alpha=3),
    "patterns": dict(
        rank_pattern={"layers.2.self_attn.to_q": 2, "up_proj": 7},
        alpha_pattern={"^layers.1.cross_attn.to_k": 16, "condition_embedder": 1, "up_proj": 2.5},
    ),
    "some layers": dict(target_modules=r"layers\.(1|3)\.self_attn\.to_(q|k|v)|layers\.2\.mlp\.up_proj"),
    "dora": dict(use_dora=True),
    "dora of many ranks": dict(use_dora=True, rank_pattern={"to_v": 2}, alpha_pattern={"to_k": 2}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_adapters_of_peft(tmp_path, case):
    theirs = peft_model(**PEFT_CASES[case])
    theirs.save_pretrained(tmp_path / "peft")
    lora_from_torch(tmp_path / "peft", tmp_path / "ours")
    reference = torch_velocity(theirs)
    assert relative_error(merged_velocity(tmp_path / "ours", 0.9), reference) > 1e-3  # the error of a wrong scale
    assert_close(merged_velocity(tmp_path / "ours"), reference, LIMIT)


def test_half_precision_becomes_float32(tmp_path):
    peft_model().save_pretrained(tmp_path / "peft")
    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(tmp_path / "peft" / WEIGHTS).items()}
    save_file(halves, tmp_path / "peft" / WEIGHTS)
    lora_from_torch(tmp_path / "peft", tmp_path / "ours")
    leaf = load_adapter(tmp_path / "ours").leaves["layers.mlp.up_proj.lora_a"]
    assert leaf.dtype == np.float32
    expected = halves["base_model.model.layers.2.mlp.up_proj.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(leaf[2], expected)


def exported(tmp_path, layout, **options):
    """An adapter of ours with alpha = 2 r, and where it was written in another layout."""
    adapter = random_adapter(rank=4, alpha=8.0, **options)
    save_adapter(tmp_path / "ours", adapter)
    written = tmp_path / ("theirs.safetensors" if layout == "comfyui" else "theirs")
    lora_to_torch(tmp_path / "ours", written, layout=layout)
    return adapter, written


def assert_scale_of_one(adapter, reference):
    """Ours must give theirs, which half the scale would not."""
    network = pair()[1]
    assert relative_error(velocity(merge_adapters(network, [adapter], [0.5])), reference) > 0.01
    assert_close(velocity(merge_adapters(network, [adapter], [1.0])), reference, LIMIT)


@pytest.mark.parametrize("use_dora", [False, True])
def test_diffusers_loads_ours(tmp_path, tiny, use_dora):
    """`load_lora_weights` of its pipeline, whose network here is that of the other tests."""
    adapter, written = exported(tmp_path, "diffusers", use_dora=use_dora)
    pipeline = TorchPipeline.from_pretrained(tiny[0], transformer=copy.deepcopy(pair()[0]))
    pipeline.load_lora_weights(written)
    assert_scale_of_one(adapter, torch_velocity(pipeline.transformer))


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_loads_ours(tmp_path, use_dora):
    """As ACE-Step's own application does it, onto a network with the names of the original model."""
    adapter, written = exported(tmp_path, "peft", use_dora=use_dora)
    assert_scale_of_one(adapter, torch_velocity(PeftModel.from_pretrained(original_model(), written)))


def test_comfyui_loads_ours(tmp_path):
    """ComfyUI's rule: the weight of the name before `.lora_up` gains alpha / r times up times down."""
    adapter, written = exported(tmp_path, "comfyui")
    found, model = load_file(written), original_model()
    state = {f"diffusion_model.decoder.{name}": value for name, value in model.named_parameters()}
    names = [name.removesuffix(".alpha") for name in found if name.endswith(".alpha")]
    assert len(names) * 3 == len(found) == 3 * (11 * 4 + 3)
    for name in names:
        up, down = found[f"{name}.lora_up.weight"], found[f"{name}.lora_down.weight"]
        state[f"{name}.weight"].data += torch.from_numpy(found[f"{name}.alpha"] / len(down) * up @ down)
    assert_scale_of_one(adapter, torch_velocity(model))


ROUND_TRIPS = [("peft", False), ("peft", True), ("diffusers", False), ("diffusers", True), ("comfyui", False)]


@pytest.mark.parametrize("layout, use_dora", ROUND_TRIPS)
def test_there_and_back_keeps_every_bit(tmp_path, layout, use_dora):
    adapter = random_adapter(alpha=0.1, use_dora=use_dora)
    save_adapter(tmp_path / "ours", adapter)
    written = tmp_path / "theirs.safetensors"
    arguments = [str(tmp_path / "ours"), str(written), "--layout", layout]
    assert command_line.main(["lora-to-torch", *arguments]) == 0
    assert command_line.main(["lora-from-torch", str(written), str(tmp_path / "back")]) == 0
    back = load_adapter(tmp_path / "back")
    assert (back.config.rank, back.config.alpha, back.config.use_dora) == (4, 0.1, use_dora)
    assert set(back.config.targets) == set(EVERY_LAYER)
    assert back.config.dropout == (0.1 if layout == "peft" else 0.0)
    assert back.leaves.keys() == adapter.leaves.keys()
    for name, value in adapter.leaves.items():
        np.testing.assert_array_equal(back.leaves[name], value)


PREFIXES = [
    "",
    "base_model.model.",
    "base_model.model.decoder.",
    "transformer.",
    "diffusion_model.decoder.",
    "decoder.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_names_of_other_trainers(tmp_path, prefix, names, caplog):
    """One file without alpha: alpha = r is assumed, as diffusers and ComfyUI do, and a warning says so."""
    adapter = random_adapter(alpha=4.0, layers=ATTENTION)
    save_adapter(tmp_path / "ours", adapter)
    layout, before = {"diffusers": ("diffusers", "transformer."), "original": ("peft", "base_model.model.")}[names]
    lora_to_torch(tmp_path / "ours", tmp_path / "theirs", layout=layout)
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    renamed = {prefix + name.removeprefix(before): value for name, value in load_file(file).items()}
    (tmp_path / "folder").mkdir()
    save_file(renamed, tmp_path / "folder" / "style.safetensors")
    lora_from_torch(tmp_path / "folder", tmp_path / "back")
    back = load_adapter(tmp_path / "back")
    assert back.config.scaling == 1.0 and "alpha = rank is assumed" in caplog.text
    for name, value in adapter.leaves.items():
        np.testing.assert_array_equal(back.leaves[name], value)


def test_dora_scale(tmp_path):
    """What LyCORIS trains has lora_down, lora_up, alpha and a dora_scale [out, 1]."""
    adapter = random_adapter(use_dora=True)
    save_adapter(tmp_path / "ours", adapter)
    lora_to_torch(tmp_path / "ours", tmp_path / "theirs", layout="peft")
    renamed = {}
    for name, value in load_file(tmp_path / "theirs" / WEIGHTS).items():
        name = name.replace("base_model.model.", "diffusion_model.decoder.")
        name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        if name.endswith("lora_magnitude_vector"):
            stem = name.removesuffix("lora_magnitude_vector")
            renamed[f"{stem}dora_scale"], renamed[f"{stem}alpha"] = value[:, None], np.float32([8.0])
        else:
            renamed[name] = value
    save_file(renamed, tmp_path / "style.safetensors")
    lora_from_torch(tmp_path / "style.safetensors", tmp_path / "back")
    back = load_adapter(tmp_path / "back")
    assert back.config.use_dora and back.config.alpha == 8.0
    for name, value in adapter.leaves.items():
        np.testing.assert_array_equal(back.leaves[name], value)


def test_last_layers_left_out(tmp_path, tiny):
    """Only the checkpoint tells how many layers there are; with it, what does not fit is refused."""
    config = checkpoint.read_manifest(tiny[1]).configs["transformer"]
    adapter = random_adapter(config, ATTENTION)
    save_adapter(tmp_path / "ours", adapter)
    lora_to_torch(tmp_path / "ours", tmp_path / "theirs", layout="peft")
    file = tmp_path / "theirs" / WEIGHTS
    save_file({name: value for name, value in load_file(file).items() if ".layers.3." not in name}, file)
    source, native = str(tmp_path / "theirs"), str(tiny[1])
    assert command_line.main(["lora-from-torch", source, str(tmp_path / "short")]) == 0
    assert len(load_adapter(tmp_path / "short").leaves["layers.self_attn.to_q.lora_b"]) == 3
    assert command_line.main(["lora-from-torch", source, str(tmp_path / "full"), "--checkpoint", native]) == 0
    found = load_adapter(tmp_path / "full").leaves["layers.self_attn.to_q.lora_b"]
    np.testing.assert_array_equal(found[:3], adapter.leaves["layers.self_attn.to_q.lora_b"][:3])
    assert len(found) == 4 and not found[3].any()

    peft_model().save_pretrained(tmp_path / "peft")
    with pytest.raises(InputError, match=r"peft: .* has shape \[.*\], expected \[.*\]; the adapter is for another"):
        lora_from_torch(tmp_path / "peft", tmp_path / "other", model=tiny[1])


def edit_settings(**changes):
    def apply(folder):
        values = json.loads((folder / SETTINGS).read_text()) | changes
        (folder / SETTINGS).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return apply


def edit(change):
    def apply(folder):
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return apply


def add(name, *shape):
    return edit(lambda found: found.update({name: np.ones(shape, np.float32)}))


def alone(folder):
    """The file under another name, without its settings."""
    (folder / WEIGHTS).rename(folder / "style.safetensors")
    (folder / SETTINGS).unlink()


def two_files(folder):
    alone(folder)
    shutil.copyfile(folder / "style.safetensors", folder / "other.safetensors")


PREFIX = "base_model.model.layers.0.self_attn"
BAD = {
    "nothing": (shutil.rmtree, ["source: no such folder or file", "of an adapter"]),
    "another file": (lambda f: (shutil.rmtree(f), f.write_text("x")), ["source: expected", "another kind of file"]),
    "empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        ["source: expected adapter_config.json", "found nothing"],
    ),
    "two files": (two_files, ["expected adapter_config.json", ", other.safetensors, style.safetensors"]),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), ["found", "safe_serialization=True"]),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), [WEIGHTS, "damaged"]),
    "no tensors": (edit(dict.clear), ["holds no tensors"]),
    "settings no JSON": (lambda f: (f / SETTINGS).write_text("{"), [f"{SETTINGS}: not valid JSON"]),
    "VeRA by settings": (
        edit_settings(peft_type="VERA"),
        [f"{SETTINGS}: peft_type 'VERA'", "expected LORA, LOKR, LOHA"],
    ),
    "no rank": (edit_settings(r=None), [f"{SETTINGS}: r: expected a number above 0, found None"]),
    "no alpha": (edit_settings(lora_alpha=0), [f"{SETTINGS}: lora_alpha: expected a number above 0, found 0"]),
    "another rank": (edit_settings(r=8), ["has rank 4, but", "adapter_config.json says 8"]),
    "pattern": (edit_settings(rank_pattern={"to_q": "x"}), ["rank_pattern: expected numbers above 0"]),
    "no pattern": (edit_settings(alpha_pattern={"(": 3}), ["alpha_pattern: '(' is not a regular expression"]),
    "bias": (edit_settings(bias="all"), ["bias is 'all'; expected 'none'"]),
    "dropout": (edit_settings(lora_dropout=1.5), [f"{SETTINGS}: lora.dropout: expected a number from 0 to below 1"]),
    "modules_to_save": (edit_settings(modules_to_save=["norm_out"]), ["modules_to_save is ['norm_out']", "plain LoRA"]),
    "DoRA by settings": (edit_settings(use_dora=True), ["use_dora is True, but", "has no magnitudes"]),
    "some magnitudes": (add(f"{PREFIX}.to_q.lora_magnitude_vector", 32), ["some layers have a magnitude"]),
    "magnitude": (add(f"{PREFIX}.to_q.lora_magnitude_vector", 3), ["has shape [3], expected [32]"]),
    "inputs' norms": (add(f"{PREFIX}.to_q.dora_scale", 1, 32), ["dora_scale has shape [1, 32]; expected [out, 1]"]),
    "LoKr": (add(f"{PREFIX}.to_q.lokr_w1", 2, 2), [f"{PREFIX}.to_q is LoKr and LoRA", "expected one of them"]),
    "LoHa": (add(f"{PREFIX}.to_q.hada_w1_a", 2, 2), [f"{PREFIX}.to_q is LoHa and LoRA", "expected one of them"]),
    "LoRA bias": (add(f"{PREFIX}.to_q.lora_B.bias", 32), ["belongs to the bias of an adapter (lora_bias)"]),
    "whole layer": (
        add("base_model.model.norm_out.weight", 32),
        ["found base_model.model.norm_out.weight", "linear layers only"],
    ),
    "half a pair": (
        edit(lambda f: f.pop(f"{PREFIX}.to_q.lora_B.weight")),
        ["to_q has no lora_B", "expected all factors"],
    ),
    "other half": (
        edit(lambda f: f.pop(f"{PREFIX}.to_q.lora_A.weight")),
        ["to_q has no lora_A", "expected all factors"],
    ),
    "three axes": (add(f"{PREFIX}.to_q.lora_A.weight", 4, 32, 1), ["has shape [4, 32, 1], expected two axes"]),
    "two ranks": (add(f"{PREFIX}.to_q.lora_A.weight", 3, 32), ["have ranks 3 and 4"]),
    "two widths": (add(f"{PREFIX}.to_q.lora_A.weight", 4, 31), ["layers.self_attn.to_q has shapes"]),
    "text encoder": (add("text_encoder.layers.0.self_attn.q_proj.lora_A.weight", 4, 32), ["is not a linear layer"]),
    "convolution": (add("base_model.model.proj_in_conv.lora_A.weight", 4, 32), ["proj_in_conv is not a linear layer"]),
    "a norm": (add(f"{PREFIX}.norm_q.lora_A.weight", 4, 32), ["norm_q is not a linear layer"]),
    "twice": (
        edit(lambda f: f.update({k.replace("to_q", "q_proj"): v for k, v in f.items() if "to_q" in k})),
        ["twice, also under another name"],
    ),
    "both names": (add(f"{PREFIX}.to_q.lora_down.weight", 4, 32), ["twice, also under another name"]),
    "other alpha": (add(f"{PREFIX}.to_q.alpha"), ["to_q.alpha is 1.0, but", "says 8.0"]),
    "many alphas": (add(f"{PREFIX}.to_q.alpha", 2), ["to_q.alpha has shape [2], expected one number"]),
    "no settings": (lambda f: (f / SETTINGS).unlink(), [f"{SETTINGS}: missing; it holds the adapter's rank and alpha"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    peft_model(target_modules=["to_q", "to_k"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input(saved, tmp_path, capsys, case):
    """One message, nothing left behind."""
    damage, words = BAD[case]
    shutil.copytree(saved, tmp_path / "source")
    damage(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    source = tmp_path / "source" / WEIGHTS if case == "no settings" else tmp_path / "source"
    assert command_line.main(["lora-from-torch", str(source), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in [f": {tmp_path / 'source'}", *words]:
        assert word in message
    assert message.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_dora_needs_every_layer(tmp_path):
    peft_model(use_dora=True, target_modules=r"layers\.(0|3)\.self_attn\.to_q").save_pretrained(tmp_path / "peft")
    with pytest.raises(InputError, match="a DoRA adapter without layer 1, 2 of layers.self_attn.to_q; expected all 4"):
        lora_from_torch(tmp_path / "peft", tmp_path / "out")


def test_bad_header(saved, tmp_path):
    found = load_file(saved / WEIGHTS)
    for i, (text, message) in enumerate({"{": "is damaged", "[]": "expected a JSON object"}.items()):
        save_file(found, tmp_path / f"{i}.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(InputError, match=f"{i}.safetensors: lora_adapter_metadata in the header.*{message}"):
            lora_from_torch(tmp_path / f"{i}.safetensors", tmp_path / "out")


def test_bad_output(saved, tmp_path):
    save_adapter(tmp_path / "ours", random_adapter(layers=ATTENTION))
    save_adapter(tmp_path / "dora", random_adapter(layers=ATTENTION, use_dora=True))
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (tmp_path / "ours", "taken", "peft", "taken: already exists"),
        (tmp_path / "ours", "absent/out", "peft", "absent does not exist; create it first"),
        (tmp_path / "ours", "out", "kohya", "--layout: expected peft, diffusers, comfyui, found 'kohya'"),
        (tmp_path / "ours", "out", "comfyui", "out: the layout comfyui is one file; expected a name that ends in .saf"),
        (tmp_path / "dora", "out.safetensors", "comfyui", "dora: a DoRA adapter, which ComfyUI would distort"),
        (saved, "out", "peft", "expected adapter.json of an acestep-jax adapter"),
    ]
    for source, name, layout, message in cases:
        with pytest.raises(InputError, match=message):
            lora_to_torch(source, tmp_path / name, layout=layout)
    with pytest.raises(InputError, match="taken: already exists"):
        lora_from_torch(saved, tmp_path / "taken")
    with pytest.raises(InputError, match="ours: is an acestep-jax adapter already"):
        lora_from_torch(tmp_path / "ours", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_merge_lora(tiny, tmp_path, capsys):
    """The checkpoint is what `merge_adapters` gives; all but the adapted weights stays bit for bit, in torch too."""
    source, merged = str(tiny[1]), tmp_path / "merged"
    config = checkpoint.read_manifest(tiny[1]).configs["transformer"]
    save_adapter(tmp_path / "a", random_adapter(config, ATTENTION))
    save_adapter(tmp_path / "b", random_adapter(config, MLP, seed=1))
    arguments = ["merge-lora", source, str(merged), "--lora", str(tmp_path / "a"), "--lora-scale", "0.5"]
    assert command_line.main([*arguments, "--lora", str(tmp_path / "b"), "--lora-scale", "1"]) == 0
    adapters = [load_adapter(tmp_path / name) for name in "ab"]
    transformer = merge_adapters(load(tiny[1], names=["transformer"])["transformer"], adapters, [0.5, 1.0])
    expected, found = checkpoint.leaves(transformer), checkpoint.leaves(load(merged)["transformer"])
    for name, variable in expected.items():
        np.testing.assert_array_equal(found[name][...], variable[...])
    assert checkpoint.read_manifest(merged) == checkpoint.read_manifest(tiny[1])
    to_torch(merged, tmp_path / "torch", layout="diffusers")
    theirs, before = tensors(tmp_path / "torch"), tensors(tiny[0])
    changed = {name for name in before if theirs[name] != before[name]}
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj")
    assert changed == {f"transformer/{n}.weight" for n in linear_modules(before) if n.endswith(adapted)}

    capsys.readouterr()
    assert command_line.main(arguments) == 2
    assert "merged: already exists" in capsys.readouterr().err
    save_adapter(tmp_path / "other", random_adapter(CONFIG, ATTENTION))
    arguments = ["merge-lora", source, str(tmp_path / "x"), "--lora", str(tmp_path / "other")]
    assert command_line.main(arguments) == 2
    assert "the adapter is for another model" in capsys.readouterr().err and not (tmp_path / "x").exists()


def linear_modules(state):
    prefix, suffix = "transformer/", ".weight"
    return [n.removeprefix(prefix).removesuffix(suffix) for n in state if n.startswith(prefix) and n.endswith(suffix)]


@pytest.mark.parametrize("layout", ["peft", "diffusers", "comfyui"])
def test_adapters_of_pytorch_in_cloud_storage(tmp_path, monkeypatch, layout):
    """Are read and converted there; what is wrong with one is said of its own path, and none is written there."""
    cloud.use(monkeypatch)
    adapter, name = random_adapter(), "adapter.safetensors" if layout == "comfyui" else "adapter"
    save_adapter(tmp_path / "ours", adapter)
    lora_to_torch(tmp_path / "ours", tmp_path / name, layout=layout)
    written = [tmp_path / name] if layout == "comfyui" else sorted((tmp_path / name).iterdir())
    for file in written:
        upload(file, as_path("gs://music") / file.relative_to(tmp_path).as_posix())
    lora_from_torch(f"gs://music/{name}", "gs://music/ours")
    for source in (f"gs://music/{name}", "gs://music/ours"):
        found = load_adapter(source)
        assert found.leaves.keys() == adapter.leaves.keys() and found.config.scaling == adapter.config.scaling
        assert all(np.array_equal(value, adapter.leaves[leaf]) for leaf, value in found.leaves.items())
    with pytest.raises(InputError, match="gs://music/torch: files of PyTorch are read and written on this machine"):
        lora_to_torch("gs://music/ours", "gs://music/torch", layout=layout)
    weights = next(file for file in written if file.suffix == ".safetensors")
    place = as_path("gs://music") / weights.relative_to(tmp_path).as_posix()
    place.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=f"^{place}: "):
        load_adapter(f"gs://music/{name}")


def test_checkpoints_of_pytorch_in_cloud_storage(tiny, tmp_path, monkeypatch):
    """Those of PyTorch are refused, with what to do, before anything is written."""
    bucket = cloud.use(monkeypatch)
    for attempt in (
        lambda: to_torch(tiny[1], "gs://music/torch", layout="diffusers"),
        lambda: from_torch("gs://music/torch", tmp_path / "native"),
        lambda: from_torch("gs://music/torch", "gs://music/native"),
        lambda: native_folder("gs://music/torch"),
    ):
        with pytest.raises(InputError, match="gs://music/torch: (files of PyTorch|no checkpoint of acestep-jax here)"):
            attempt()
    assert not bucket and not (tmp_path / "native").exists()
