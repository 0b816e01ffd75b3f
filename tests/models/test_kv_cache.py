"""The planner against transformers' Qwen3ForCausalLM; its cache against full forward passes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as TorchQwen3

from acestep_jax.distributed import make_mesh, partition_spec, variable_sharding
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.config import PlannerConfig
from acestep_jax.models.kernels import rows_gpu, stack, token_gpu
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.kv_cache import AXES, KernelCache, SplitCache
from acestep_jax.models.quantization import quantize
from acestep_jax.models.runtime import Runtime
from tests.jaxprs import equations
from tests.parity import assert_close, make_pair, random_network

VOCABULARY = dict(first_code=31, num_codes=130, eos_token_id=5)
SHARED = dict(vocab_size=171, num_hidden_layers=2, tie_word_embeddings=True)
SIZES = {
    "0.6B": dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "4B": dict(hidden_size=24, intermediate_size=40, num_attention_heads=8, num_key_value_heads=2, head_dim=8),
}
SLOTS = 16
WINDOWS = (8, 12, 16)
# By default the 4B model alone, whose heads are together wider than its hidden states and share keys by fours.
BOTH = [pytest.param("0.6B", marks=pytest.mark.slow), "4B"]
START = np.int32([0, 3])
TOKENS = np.random.default_rng(0).integers(0, 171, (2, SLOTS)).astype(np.int32)
PROMPT = 6

prefill = jax.jit(lambda model, *args: model.prefill(*args))
decode = jax.jit(lambda model, *args, window: model.decode(*args, window=window), static_argnames="window")
full = jax.jit(lambda model, *args: model.hidden_states(*args))
text = jax.jit(lambda model, hidden: model.text_logits(hidden))
codes = jax.jit(lambda model, hidden: model.code_logits(hidden))


@functools.cache
def pair(size):
    theirs = TorchQwen3(Qwen3Config(**SHARED, **SIZES[size], eos_token_id=5))
    values = json.loads(theirs.config.to_json_string(use_diff=True))
    return make_pair("planner", theirs, PlannerConfig.from_hf(values | VOCABULARY))


def torch_logits(theirs, row):
    """All logits of one row, without its padding."""
    with torch.no_grad():
        return theirs(torch.from_numpy(row[None].astype(np.int64))).logits[0].numpy()


def steps(model, window_of):
    """Hidden states of every position from the last of the prompt on, through the cache."""
    hidden, cache = prefill(model, TOKENS[:, :PROMPT], START, model.init_cache(2, SLOTS, window_of(PROMPT)))
    found = [hidden]
    for position in range(PROMPT, SLOTS):
        window = window_of(position)
        cache = model.grow(cache, window)
        hidden, cache = decode(model, TOKENS[:, position], np.int32(position), START, cache, window=window)
        found.append(hidden)
    return np.stack(found, axis=1)


def smallest(position):
    return next(window for window in WINDOWS if position < window)


@pytest.mark.parametrize("size", BOTH)
def test_logits_match_torch(size):
    """Of the prompt's last token and, teacher forced, of all tokens; in rows of unequal length, padded at the left."""
    theirs, ours = pair(size)
    hidden, _ = prefill(ours, TOKENS, START, ours.init_cache(2, SLOTS))
    every = full(ours, TOKENS, START)
    first, count, end = (VOCABULARY[name] for name in ("first_code", "num_codes", "eos_token_id"))
    for row, start in enumerate(START):
        expected = torch_logits(theirs, TOKENS[row, start:])
        wanted = np.concatenate([expected[:, [end]], expected[:, first : first + count]], axis=1)
        assert_close(text(ours, every)[row, start:], expected[:, :first])
        assert_close(codes(ours, every)[row, start:, : count + 1], wanted)
        assert_close(text(ours, hidden)[row], expected[-1, :first])
        assert_close(codes(ours, hidden)[row, : count + 1], wanted[-1])


@pytest.mark.parametrize("size", BOTH)
def test_decoding_equals_a_full_forward_pass(size):
    """At every position, with windows that grow as slots fill up."""
    _, ours = pair(size)
    every = full(ours, TOKENS, START)
    assert_close(steps(ours, smallest), np.asarray(every)[:, PROMPT - 1 :])


@functools.cache
def split(size):
    """The model as a CPU reads it."""
    _, ours = pair(size)
    return jax.jit(lambda model: model.split())(ours)


@pytest.mark.parametrize("size", BOTH)
def test_weights_and_cache_that_are_split_compute_the_same(size):
    """Each matrix an array of its own, and each layer's cache, none of which is copied within the loop."""
    _, ours = pair(size)
    model = split(size)
    assert isinstance(model.layers.mlp.gate_proj.linear.kernel, nnx.List) and not isinstance(
        ours.layers.mlp.gate_proj.kernel, nnx.List
    )
    assert_close(steps(model, smallest), steps(ours, smallest), 1e-6)
    assert_close(full(model, TOKENS, START), full(ours, TOKENS, START), 1e-6)
    with pytest.raises(ValueError, match="of 8 slots is read as a whole, not 12"):
        cache = prefill(model, TOKENS[:, :PROMPT], START, model.init_cache(2, SLOTS, 8))[1]
        decode(model, TOKENS[:, PROMPT], np.int32(PROMPT), START, cache, window=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separate_layers_compute_the_same(dtype, monkeypatch):
    """As a GPU has them, with the cache in the dtype of the values. Their stacks are dropped."""
    monkeypatch.setattr(stack, "platform", lambda: "gpu")
    model = nnx.clone(pair("4B")[1])
    stacks, given = model.layers, model.layers.self_attn.to_q.kernel[...]
    model.split()
    assert isinstance(model.layers, nnx.List) and len(model.layers) == model.planner.num_hidden_layers
    assert max(leaf.size for leaf in jax.tree.leaves(nnx.state(stacks))) < given.size
    if dtype == "float32":
        assert_close(steps(model, smallest), steps(pair("4B")[1], smallest), 1e-6)
        assert_close(full(model, TOKENS, START), full(pair("4B")[1], TOKENS, START), 1e-6)
    else:
        abstract = checkpoint.abstract("planner", model.planner, Runtime.of(dtype))
        model = jax.eval_shape(lambda model: model.split(), abstract)
        cache = jax.eval_shape(lambda model: model.init_cache(2, SLOTS), model)
        _, cache = jax.eval_shape(lambda *args: args[0].prefill(*args[1:]), model, TOKENS, START, cache)
        assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("layers", ["plain", "biased", "quantised"])
def test_kernels_of_a_gpu_compute_the_same(layers, monkeypatch):
    """As a GPU has them, in interpret mode, with blocks of four slots and windows that grow."""
    ours = pair("4B")[1]
    if layers == "quantised":
        ours = jax.jit(lambda model: quantize(model, "int8"))(ours)
    elif layers == "biased":
        ours = random_network("planner", dataclasses.replace(ours.planner, attention_bias=True))
    expected = steps(ours, smallest)
    model = nnx.clone(ours)
    monkeypatch.setattr(stack, "platform", lambda: "gpu")
    monkeypatch.setattr(token_gpu, "SLOTS", 4)
    monkeypatch.setattr(token_gpu, "suits", lambda *shape: True)
    monkeypatch.setattr(token_gpu, "attend", functools.partial(token_gpu.attend, interpret=True))
    monkeypatch.setattr(rows_gpu, "TILE", 8)
    monkeypatch.setattr(rows_gpu, "suits", lambda x, rows: x.shape[:-1] in ((2, 1), (2,)) and x.dtype == rows.dtype)
    monkeypatch.setattr(rows_gpu, "multiply", functools.partial(rows_gpu.multiply, interpret=True))
    model.split()
    begin = jax.jit(lambda model, *args: model.prefill(*args))
    step = jax.jit(lambda model, *args, window: model.decode(*args, window=window), static_argnames="window")
    hidden, cache = begin(model, TOKENS[:, :PROMPT], START, model.init_cache(2, SLOTS, smallest(PROMPT)))
    assert isinstance(cache, KernelCache)
    found = [hidden]
    for position in range(PROMPT, SLOTS):
        cache = model.grow(cache, smallest(position))
        given = model, TOKENS[:, position], np.int32(position), START, cache
        hidden, cache = step(*given, window=smallest(position))
        found.append(hidden)
    assert_close(np.stack(found, axis=1), expected, 1e-5)
    kernels = equations(lambda *args: model.decode(*args, window=SLOTS), *given[1:], name="pallas_call")
    layer = 1 if layers == "quantised" else 5  # attention, and four products
    assert len(kernels) == layer * model.planner.num_hidden_layers
    assert isinstance(model.init_cache(2, SLOTS).split(jnp.dtype("float32"), plain=True), SplitCache)


@pytest.mark.parametrize("model", [pair, split])
def test_what_stands_in_padding_and_in_free_slots_does_not_matter(model):
    made = model("4B")
    ours = made[1] if model is pair else made
    other = np.where(np.arange(SLOTS) < START[:, None], 7, TOKENS)
    assert (other != TOKENS).any()
    run = lambda tokens, cache: prefill(ours, tokens[:, :PROMPT], START, cache)  # noqa: E731
    hidden, cache = run(TOKENS, ours.init_cache(2, SLOTS, 8))
    filled = jax.tree.map(lambda x: x + 3, ours.init_cache(2, SLOTS, 8))
    changed, dirty = run(other, filled)
    np.testing.assert_array_equal(changed, hidden)
    args = TOKENS[:, PROMPT], np.int32(PROMPT), START
    after, _ = decode(ours, *args, cache, window=8)
    again, _ = decode(ours, *args, dirty, window=8)
    np.testing.assert_array_equal(again, after)


def test_a_wider_window_changes_nothing():
    _, ours = pair("4B")
    assert_close(steps(ours, lambda position: SLOTS), steps(ours, smallest), 1e-6)


def test_heads_are_rows_of_the_embedding():
    """Bit for bit: end of turn, codes, and filling that is never chosen; the number of rows is a multiple of 128."""
    _, ours = pair("0.6B")
    table = np.asarray(ours.embed_tokens.embedding[...])
    head = np.asarray(ours.code_head().rows)
    first, count, end = (VOCABULARY[name] for name in ("first_code", "num_codes", "eos_token_id"))
    assert head.shape == (256, 32)
    np.testing.assert_array_equal(head[: count + 1], np.concatenate([table[[end]], table[first : first + count]]))
    hidden = np.random.default_rng(1).standard_normal((2, 32), np.float32)
    logits = np.asarray(codes(ours, hidden))
    assert logits.dtype == np.float32 and np.isneginf(logits[:, count + 1 :]).all()
    assert np.isfinite(logits[:, : count + 1]).all()
    assert text(ours, hidden).shape == (2, first)


def test_logits_of_bfloat16_weights_are_float32():
    config = PlannerConfig(**SHARED, **SIZES["0.6B"], **VOCABULARY)
    model = checkpoint.abstract("planner", config, Runtime.of("bfloat16"))
    cache = jax.eval_shape(lambda model: model.init_cache(2, SLOTS), model)
    assert cache.keys.shape == (2, 2, 2, 8, SLOTS) and cache.keys.dtype == jnp.uint16  # its bits, on a CPU
    hidden, cache = jax.eval_shape(prefill, model, TOKENS, START, cache)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(text, model, hidden).dtype == jax.eval_shape(codes, model, hidden).dtype == jnp.float32


@pytest.mark.slow
def test_weights_in_half_precision_that_are_split_compute_the_same():
    """Transposed, with sums in float32: they differ by the rounding of bfloat16. The table of the embedding is bits."""
    config = PlannerConfig(**SHARED, **SIZES["0.6B"], **VOCABULARY)

    def made():
        shapes = checkpoint.leaf_shapes("planner", config)
        random = np.random.default_rng(0)
        values = {name: random.standard_normal(leaf.shape, np.float32) * 0.2 for name, leaf in shapes.items()}
        abstract = checkpoint.abstract("planner", config, Runtime.of("bfloat16"))
        return checkpoint.assemble(abstract, {name: jnp.asarray(x, jnp.bfloat16) for name, x in values.items()})

    whole, model = made(), made().split()
    assert model.embed_tokens.embedding[...].dtype == jnp.uint16
    np.testing.assert_array_equal(model.code_head().rows, whole.code_head().rows)
    np.testing.assert_array_equal(model.text_head().rows, whole.text_head().rows)
    assert_close(steps(model, smallest).astype(np.float32), steps(whole, smallest).astype(np.float32), 0.05)


# Heads that do not divide by the mesh are in `tests/test_distributed.py`.
@pytest.mark.parametrize("axes", [dict(data=2, tensor=2, fsdp=2), pytest.param(dict(tensor=8), marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(axes):
    _, ours = pair("4B")
    expected = steps(ours, smallest)
    mesh = make_mesh(**axes)
    leaves = checkpoint.leaves(ours)
    placed = {name: jax.device_put(np.asarray(v[...]), variable_sharding(v, mesh)) for name, v in leaves.items()}
    model = checkpoint.assemble(checkpoint.abstract("planner", ours.planner), placed)
    with jax.set_mesh(mesh):
        found = steps(model, smallest)
        assert_close(codes(model, found[:, -1])[:, :131], codes(ours, expected[:, -1])[:, :131])
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "somewhere.json.*tie_word_embeddings"),
        ({"vocab_size": 151936}, "somewhere.json.*215669.*found 151936.*acestep-5Hz-lm"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled rotary"),
    ],
)
def test_config_rejects_another_model(changes, message):
    values = json.loads(Qwen3Config(**SIZES["4B"], vocab_size=217204, tie_word_embeddings=True).to_json_string())
    assert PlannerConfig.from_hf(values, "somewhere.json").first_code == 151669
    with pytest.raises(InputError, match=f"(?s){message}"):
        PlannerConfig.from_hf(values | changes, "somewhere.json")


def test_config_goes_to_transformers_and_back():
    for config in (PlannerConfig(), PlannerConfig(**SHARED, **SIZES["4B"], **VOCABULARY)):
        again = Qwen3Config(**json.loads(json.dumps(config.to_hf())))
        assert PlannerConfig.from_hf(json.loads(again.to_json_string())) == config
    assert "first_code" not in PlannerConfig().to_hf()


# In one piece and in float32, `tests/planner/test_generate.py` looks at the loop that writes songs.
@pytest.mark.parametrize(
    "dtype, is_split",
    [
        pytest.param("float32", False, marks=pytest.mark.slow),
        ("float32", True),
        ("bfloat16", False),
        ("bfloat16", True),
    ],
)
def test_the_cache_is_updated_in_place(dtype, is_split):
    """In the compiled loop over steps and layers nothing of the cache's size is copied or converted; where the cache is
    split, nothing of the size of a layer's, either."""
    config = PlannerConfig(**SHARED, **SIZES["0.6B"], **VOCABULARY)
    slots = SLOTS if is_split else SLOTS - 4
    ours = checkpoint.abstract("planner", config, Runtime.of(dtype))
    if is_split:
        ours = jax.eval_shape(lambda model: model.split(), ours)

    @functools.partial(jax.jit, static_argnames="window", compiler_options=COMPILER_OPTIONS)
    def write(model, tokens, start, *, window):
        hidden, cache = model.prefill(tokens, start, model.init_cache(2, SLOTS))
        head = model.code_head()

        def body(i, carry):
            hidden, cache = carry
            token = VOCABULARY["first_code"] + jnp.argmax(model.code_logits(hidden, head)[:, 1:], -1)
            return model.decode(token, PROMPT + i, start, cache, window=window)

        return jax.lax.fori_loop(0, window - PROMPT, body, (hidden, cache))[0]

    text = write.lower(ours, TOKENS[:, :PROMPT], START, window=slots).compile().as_text()
    shape = rf"2,2,(?:8,{SLOTS}|{SLOTS},8)\]\S* "  # keys, values
    kind = dict(float32="f32", bfloat16="u16")[dtype]
    assert len(re.findall(rf"= {kind}\[2,{shape}dynamic-update-slice", text)) >= (2 if is_split else 4)
    if is_split:
        assert len(re.findall(rf"= f32\[{shape}dynamic-update-slice", text)) >= 4
    loops = text[: text.index("\nENTRY ")]  # before them, the zeros of keys are copied for values, once
    steps = "|".join(sorted(set(re.findall(r"body=%?([\w.\-]+)", loops))))
    assert not re.findall(rf"= \w+\[2,{shape}(?:copy|copy-start|transpose|convert|bitcast-convert)\(", loops)
    bodies = [part for part in re.split(r"\n\n+", loops) if re.match(rf"%?(?:{steps}) ", part.lstrip())]
    assert bodies
    for body in bodies if is_split else []:
        made = [line for line in re.findall(rf"= \w+\[{shape}.*", body) if "get-tuple-element(" not in line]
        assert len(made) in (0, 4) and all("dynamic-update-slice_fusion" in line or "calls=" in line for line in made)


def test_a_layout_on_a_mesh_gathers_nothing(monkeypatch):
    """Of a whole array with a constraint of its layout, XLA would gather all parts on each device."""
    monkeypatch.setattr(stack, "platform", lambda: "tpu")
    x = np.arange(2 * 2 * 4 * 3 * 5, dtype=np.float32).reshape(2, 2, 4, 3, 5)
    mesh = make_mesh(data=2, tensor=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, partition_spec(AXES, x.shape, mesh)))
        program = jax.jit(lambda x: stack.row_major(2 * x, AXES)).lower(placed).compile()
        assert "all-gather" not in program.as_text()
        np.testing.assert_array_equal(program(placed), 2 * x)
