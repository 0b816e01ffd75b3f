"""Every bad input is one clear message, and nothing is left behind."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from acestep_jax.convert import __main__ as command_line
from acestep_jax.io.conversion import from_torch
from tests.folders import (
    MODEL,
    SILENCE,
    TEXT_ENCODER,
    VAE,
    assert_refused,
    edit,
    edit_tensors,
    remove,
    truncate,
    write,
    write_original,
    write_shards,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
TABLE = "layers.1.scale_shift_table"


@pytest.fixture(scope="module")
def tiny(standard):
    """Return the checkpoint with the layers and blocks that the original layout takes for given."""
    return standard


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """The tiny checkpoint in the original layout: the folder above the model's."""
    folder = tmp_path_factory.mktemp("original")
    write_original(tiny[0], folder)
    return folder


def change(path, name, function):
    """Replaces a tensor, or removes it if `function` gives None."""

    def apply(state):
        value = function(state.pop(name, None))
        return state if value is None else state | {name: value}

    return lambda folder: edit_tensors(folder / path, apply)


def shard(damage):
    """Splits the transformer into two files, then damages one of them or the index."""

    def apply(folder):
        state = load_file(folder / "transformer" / WEIGHTS)
        (folder / "transformer" / WEIGHTS).unlink()
        write_shards(state, folder / "transformer", "diffusion_pytorch_model", 2)
        damage(folder / "transformer")

    return apply


def dropped(state):
    """All but one tensor."""
    return dict(list(state.items())[1:])


SHARD, SHARD_INDEX = "diffusion_pytorch_model-00002-of-00002.safetensors", f"{WEIGHTS}.index.json"
DIFFUSERS = {
    "no folder": (lambda folder: shutil.rmtree(folder), ["source: no such folder", "expected a PyTorch checkpoint"]),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), ["source: a file of an unknown kind"]),
    "no checkpoint": (remove("model_index.json"), ["source: not a PyTorch checkpoint", "model_index.json"]),
    "component": (remove("vae"), ["the folder vae/ is missing"]),
    "no config": (remove("vae/config.json"), ["vae/config.json: missing"]),
    "config not JSON": (write("vae/config.json", b'{"a": '), ["vae/config.json: not valid JSON"]),
    "config not text": (write("vae/config.json", b"\xff\xfe\x00"), ["vae/config.json: not valid JSON"]),
    "config a list": (write("vae/config.json", b"[]"), ["vae/config.json: expected a JSON object"]),
    "unknown key": (edit("transformer/config.json", foo=1), ["transformer/config.json: unknown key(s) foo", "knows"]),
    "bad value": (edit("transformer/config.json", head_dim="x"), ["head_dim: expected a positive integer, found 'x'"]),
    "few layer types": (
        edit("condition_encoder/config.json", layer_types=["full_attention"]),
        ["ConditionEncoderConfig.layer_types: 2 layers need as many entries, found 1"],
    ),
    "activation": (edit("text_encoder/config.json", hidden_act="gelu"), ["hidden_act: expected 'silu', found 'gelu'"]),
    "no weights": (remove(f"transformer/{WEIGHTS}"), ["transformer: no weights; expected", WEIGHTS]),
    "truncated": (truncate(f"transformer/{WEIGHTS}"), [f"transformer/{WEIGHTS}: damaged or truncated", "download"]),
    "empty": (write(f"transformer/{WEIGHTS}", b""), [f"transformer/{WEIGHTS}: damaged or truncated"]),
    "garbage": (write(f"transformer/{WEIGHTS}", b"garbage" * 99), [f"transformer/{WEIGHTS}: damaged or truncated"]),
    "missing tensor": (change(f"transformer/{WEIGHTS}", TABLE, lambda x: None), [f"missing: {TABLE} [1, 6, 64]"]),
    "unexpected tensor": (
        change(f"transformer/{WEIGHTS}", "layers.9.foo.weight", lambda x: torch.zeros(2)),
        ["transformer: ", "unexpected: layers.9.foo.weight [2]"],
    ),
    "misshapen tensor": (
        change(f"transformer/{WEIGHTS}", TABLE, lambda x: x[..., :63]),
        [f"misshapen: {TABLE} is [1, 6, 63], expected [1, 6, 64]"],
    ),
    "other size": (edit("transformer/config.json", num_hidden_layers=6), ["missing: layers.4.", " and ", " more"]),
    "integers": (change(f"vae/{WEIGHTS}", "encoder.conv1.bias", lambda x: x.int()), ["encoder.conv1.bias is I32"]),
    "no g": (change(f"vae/{WEIGHTS}", "encoder.conv1.weight_g", lambda x: None), ["encoder.conv1.weight_g"]),
    "no v": (change(f"vae/{WEIGHTS}", "encoder.conv1.weight_v", lambda x: None), ["encoder.conv1.weight_g has no"]),
    "shape of g": (change(f"vae/{WEIGHTS}", "encoder.conv1.weight_g", lambda x: x[1:]), ["conv1.weight_g has shape"]),
    "no shard": (shard(remove(SHARD)), [f"{SHARD}: missing", "download"]),
    "shard without a tensor": (shard(lambda folder: edit_tensors(folder / SHARD, dropped)), [f"{SHARD}: ", "promises"]),
    "shard truncated": (shard(truncate(SHARD)), [f"{SHARD}: damaged or truncated"]),
    "no weight map": (shard(write(SHARD_INDEX, b"{}")), [f"{SHARD_INDEX}: no weight_map"]),
    "index not JSON": (shard(write(SHARD_INDEX, b"{")), [f"{SHARD_INDEX}: not valid JSON"]),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), ["tokenizer: no tokenizer.json", "AutoTokenizer"]),
    "no tokenizer folder": (remove("tokenizer"), ["tokenizer: no tokenizer.json"]),
    "tokenizer garbage": (write("tokenizer/tokenizer.json", b"\xff{"), ["tokenizer.json: not a tokenizer"]),
}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_diffusers_source(tiny, tmp_path, case):
    damage, words = DIFFUSERS[case]
    shutil.copytree(tiny[0], tmp_path / "source")
    damage(tmp_path / "source")
    assert_refused(from_torch, tmp_path / "source", tmp_path / "made", words)


MODEL_WEIGHTS, MODEL_CONFIG = f"{MODEL}/model.safetensors", f"{MODEL}/config.json"
ORIGINAL = {
    "unknown key": (edit(MODEL_CONFIG, foo=1), ["config.json: unknown key(s) foo"]),
    "activation": (edit(MODEL_CONFIG, hidden_act="gelu"), ["hidden_act: expected 'silu', found 'gelu'"]),
    "scaled rotary": (edit(MODEL_CONFIG, rope_scaling={"type": "yarn"}), ["rotary embeddings are not supported"]),
    "scaled rotary, new form": (edit(MODEL_CONFIG, rope_parameters={"rope_type": "yarn"}), ["not supported", "yarn"]),
    "no windows": (edit(MODEL_CONFIG, use_sliding_window=False), ["use_sliding_window: expected true"]),
    "config not JSON": (write(MODEL_CONFIG, b"{"), [f"{MODEL_CONFIG}: not valid JSON"]),
    "several models": (lambda folder: shutil.copytree(folder / MODEL, folder / "b"), ["several models", MODEL, "b"]),
    "no vae": (remove(VAE), ["vae: no such folder", "--vae"]),
    "no text encoder": (remove(TEXT_ENCODER), [f"{TEXT_ENCODER}: no such folder", "--text-encoder"]),
    "no silence": (remove(SILENCE), ["source: not a PyTorch checkpoint", "silence_latent.pt"]),
    "silence garbage": (write(SILENCE, b"garbage"), [f"{SILENCE}: not a tensor saved by torch"]),
    "silence truncated": (truncate(SILENCE), [f"{SILENCE}: not a tensor saved by torch"]),
    "silence a list": (
        lambda folder: torch.save([1], folder / SILENCE),
        [f"{SILENCE}: refused, because it is more than a tensor"],
    ),
    "silence misshapen": (
        lambda folder: torch.save(torch.zeros(1, 8, 100), folder / SILENCE),
        ["misshapen: silence_latent is [1, 100, 8], expected [1, 15000, 8]"],
    ),
    "no weights": (remove(MODEL_WEIGHTS), [f"{MODEL}: no weights"]),
    "truncated": (truncate(MODEL_WEIGHTS), [f"{MODEL_WEIGHTS}: damaged or truncated"]),
    "foreign tensor": (
        change(MODEL_WEIGHTS, "foo.weight", lambda x: torch.zeros(1)),
        ["unexpected tensor(s) foo.weight"],
    ),
    "missing tensor": (change(MODEL_WEIGHTS, "null_condition_emb", lambda x: None), ["missing: null_condition_emb"]),
    "no tokenizer": (remove(f"{TEXT_ENCODER}/tokenizer.json"), [f"{TEXT_ENCODER}: no tokenizer.json"]),
}


@pytest.mark.parametrize("case", ORIGINAL)
def test_original_source(original, tmp_path, case):
    damage, words = ORIGINAL[case]
    shutil.copytree(original, tmp_path / "source")
    damage(tmp_path / "source")
    assert_refused(from_torch, tmp_path / "source", tmp_path / "made", words)


def test_options_of_the_other_layout(tiny, tmp_path):
    assert_refused(from_torch, tiny[0], tmp_path / "made", ["--vae and --text-encoder"], vae=tiny[0] / "vae")


def test_native_source(tiny, tmp_path):
    assert_refused(from_torch, tiny[1], tmp_path / "made", ["native: not a PyTorch checkpoint"])


COMMANDS = {
    "dtype": (
        ["from-torch", "{torch}", "{made}", "--dtype", "int4"],
        "--dtype: 'int4' is no",
    ),
    "layout": (
        ["to-torch", "{native}", "{made}", "--layout", "foo"],
        "--layout: expected diffusers or original, found 'foo'",
    ),
    "source": (["from-torch", "{tmp}/absent", "{made}"], "absent: no such folder"),
    "hub": (["from-torch", "no-such/repository", "{made}"], "no-such/repository: incomplete in the cache, and"),
    "verify": (["verify", "{native}"], "not a PyTorch checkpoint"),
    "random": (["random-torch", "{tmp}"], "already exists"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_errors_of_the_command_line_are_one_line(tiny, tmp_path, capsys, case):
    arguments, message = COMMANDS[case]
    names = dict(torch=tiny[0], native=tiny[1], tmp=tmp_path, made=tmp_path / "made")
    assert command_line.main([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert f": {message}" in captured.err or f"/{message}" in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_installed_command(tmp_path):
    command = [sys.executable, "-m", "convert", "from-torch", str(tmp_path), str(tmp_path / "x"), "--dtype", "int4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "--dtype: 'int4' is no" in done.stderr
