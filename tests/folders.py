"""What the conversion tests share: reading, editing and writing PyTorch checkpoints without the converter.

PyTorch is imported where it is needed, so that tests of the native format do without it.
"""

import json
import os
import shutil

import numpy as np
import pytest

from acestep_jax import InputError

MODEL, VAE, TEXT_ENCODER = "acestep-v15-turbo", "vae", "Qwen3-Embedding-0.6B"
SILENCE = f"{MODEL}/silence_latent.pt"
PREFIXES = {
    "transformer": "decoder.",
    "condition_encoder": "encoder.",
    "audio_tokenizer": "tokenizer.",
    "audio_token_detokenizer": "detokenizer.",
}
RENAMED = {
    "proj_in_conv.": "proj_in.1.",
    "proj_out_conv.": "proj_out.1.",
    ".to_q.": ".q_proj.",
    ".to_k.": ".k_proj.",
    ".to_v.": ".v_proj.",
    ".to_out.0.": ".o_proj.",
    ".norm_q.": ".q_norm.",
    ".norm_k.": ".k_norm.",
}
# What the published config.json has beside the sizes of the networks.
NOTES = {
    "architectures": ["AceStepConditionGenerationModel"],
    "auto_map": {
        "AutoConfig": "configuration_acestep_v15.AceStepConfig",
        "AutoModel": "modeling_acestep_v15_turbo.AceStepConditionGenerationModel",
    },
    "data_proportion": 0.5,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "acestep",
    "num_audio_decoder_hidden_layers": 24,
    "rope_scaling": None,
    "timbre_fix_frame": 750,
    "timestep_mu": -0.4,
    "timestep_sigma": 1.0,
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 64003,
}
ENCODER_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def read_json(path):
    return json.loads(path.read_text())


def edit_json(path, **changes):
    """Change keys of a JSON file; None removes one."""
    values = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(path, change):
    """Rewrite a safetensors file with `change`, a function from dictionary to dictionary."""
    from safetensors.torch import load_file, save_file

    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})


def tensors(folder):
    """Return dtype, shape and bytes of every tensor under a folder by the name of its own folder and its own."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(file).items():
            assert (key := f"{file.parent.name}/{name}") not in found
            found[key] = (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def native_arrays(source, **options):
    """Return what conversion makes of a PyTorch checkpoint before it is written: name to array."""
    from acestep_jax.io.conversion import gather, open_source, plan

    opened = open_source(source, **options)
    return {
        f"{network}.{leaf}": gather(network, leaf, rows)
        for network, config in opened.configs.items()
        for leaf, rows in plan(network, config, opened.tensors[network]).items()
    }


def assert_equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_refused(convert, source, destination, words, **options):
    """Fail unless conversion raises an InputError that has all of some words and leaves every file as it was."""
    before = sorted(destination.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        convert(source, destination, **options)
    for word in words:
        assert word in str(error.value)
    assert sorted(destination.parent.rglob("*")) == before


def remove(path):
    """Return, like the next three, a function that does it in a folder."""
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def write(path, text):
    return lambda folder: (folder / path).write_bytes(text)


def truncate(path):
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size // 2)


def edit(path, **changes):
    return lambda folder: edit_json(folder / path, **changes)


def write_original(diffusers, destination, *, shards=1):
    """Write a checkpoint in diffusers' layout as ACE-Step publishes its models; return the model's folder."""
    import torch
    from safetensors.torch import load_file, save_file

    model = destination / MODEL
    model.mkdir(parents=True)
    configs = {name: read_json(diffusers / name / "config.json") for name in PREFIXES}
    values = dict(NOTES)
    for config in reversed(configs.values()):
        values |= {key: value for key, value in config.items() if not key.startswith("_")}
    del values["encoder_hidden_size"]
    if configs["transformer"]["encoder_hidden_size"]:  # XL
        values |= {f"encoder_{key}": configs["condition_encoder"][key] for key in ENCODER_KEYS}
        values["lyric_alignment_layers_config"] = {"3": [18, 27], "4": [22]}
    depth = values["num_hidden_layers"]
    values["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(depth)]
    values["fsq_input_levels"] = [8, 8, 8, 5, 5, 5]
    (model / "config.json").write_text(json.dumps(values))

    state = {}
    for name, prefix in PREFIXES.items():
        for key, value in load_file(diffusers / name / "diffusion_pytorch_model.safetensors").items():
            for ours, theirs in RENAMED.items():
                key = f".{key}".replace(ours, theirs).removeprefix(".")
            state[prefix + key] = value
    silence = state.pop("encoder.silence_latent")
    assert silence.shape[1] == 15000
    torch.save(silence.transpose(1, 2).contiguous(), model / "silence_latent.pt")
    state["null_condition_emb"] = state.pop("encoder.null_condition_emb")
    if shards == 1:
        save_file(state, model / "model.safetensors", {"format": "pt"})
    else:
        write_shards(state, model, "model", shards)

    shutil.copytree(diffusers / "vae", destination / VAE)
    shutil.copytree(diffusers / "text_encoder", destination / TEXT_ENCODER)
    shutil.copytree(diffusers / "tokenizer", destination / TEXT_ENCODER, dirs_exist_ok=True)
    return model


def write_shards(state, folder, stem, count):
    """Write some files that hold every count-th tensor each, and their index."""
    from safetensors.torch import save_file

    files = {name: f"{stem}-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file, {"format": "pt"})
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


# ComfyUI's names of the autoencoder's layers, which are Stable Audio's: of blocks, and within them.
SEQUENCE = {
    "encoder": ["conv1", "block.0", "block.1", "block.2", "block.3", "block.4", "snake1", "conv2"],
    "encoder.block": ["res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"],
    "decoder.block": ["snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"],
    "unit": ["snake1", "conv1", "snake2", "conv2"],
}
SEQUENCE["decoder"] = SEQUENCE["encoder"]


def comfyui_vae(state):
    """Return the tensors of an autoencoder of diffusers under the names and shapes that ComfyUI has them in."""
    found = {}
    for name, value in state.items():
        half, *path, last = name.split(".")
        first = ".".join(path[:2]) if path[0] == "block" else path[0]
        numbers = [SEQUENCE[half].index(first)]
        if path[0] == "block":
            numbers.append(SEQUENCE[f"{half}.block"].index(path[2]))
            numbers += [SEQUENCE["unit"].index(part) for part in path[3:]]
        layers = "".join(f".layers.{number}" for number in numbers)
        found[f"{half}{layers}.{last}"] = value.reshape(-1) if last in ("alpha", "beta") else value
    return found


def write_published(diffusers, folder):
    """Write the original layout, with what ComfyUI's files do not tell as in published models; return the folder."""
    write_original(diffusers, folder)
    edit_json(folder / MODEL / "config.json", sliding_window=128)
    return folder


def write_comfyui(original, destination, *, whole, change=None):
    """Write ComfyUI's files of a checkpoint in the original layout; return the path of the model's.

    Args:
        original: the folder above the model's.
        destination: ComfyUI's folder `models`, or its like.
        whole: all networks in one file, or a file for each.
        change: a function from the tensors of a file to others.
    """
    from safetensors.torch import load_file, save_file

    change = change or (lambda state: state)
    model = load_file(original / MODEL / "model.safetensors")
    vae = comfyui_vae(load_file(original / VAE / "diffusion_pytorch_model.safetensors"))
    text = {f"model.{name}": v for name, v in load_file(original / TEXT_ENCODER / "model.safetensors").items()}
    files = {
        "diffusion_models/acestep_v1.5_turbo.safetensors": model,
        "vae/ace_1.5_vae.safetensors": vae,
        "text_encoders/qwen_0.6b_ace15.safetensors": text,
    }
    if whole:
        parts = zip(
            ("model.diffusion_model.", "vae.", "text_encoders.qwen3_06b.transformer."), files.values(), strict=True
        )
        state = {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}
        state["text_encoders.qwen3_06b.logit_scale"] = model["null_condition_emb"].sum()
        state["text_encoders.qwen3_2b.transformer.model.norm.weight"] = model["null_condition_emb"].clone()
        files = {"checkpoints/ace_step_1.5_turbo_aio.safetensors": state}
    for name, state in files.items():
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in change(state).items()}, destination / name, {"format": "pt"})
    return destination / next(iter(files))
