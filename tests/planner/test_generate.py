"""The compiled loop with a small transformer: what a song's tokens depend on, and what the program copies."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from acestep_jax import make_mesh
from acestep_jax.distributed import variable_sharding
from acestep_jax.io import checkpoint
from acestep_jax.models.config import PlannerConfig
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.models.runtime import Runtime
from acestep_jax.planner import generate
from acestep_jax.planner.metadata import Known, Metadata
from acestep_jax.planner.sampling import Drawing, LanguageSampling
from acestep_jax.planner.tokenizer import Mark
from acestep_jax.planner.writer import Planner
from tests.planner import small

SONGS = [Known(caption="a sad song", lyrics="Rain"), Known(caption="techno " * 60, bpm=128)]
METADATA = [Metadata("soft", song.lyrics, 90, "C major", "4", 10.3 + i, "en") for i, song in enumerate(SONGS)]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def planner():
    ours = small.tokenizer()
    config = PlannerConfig(
        vocab_size=ours.first_code + 48,
        first_code=ours.first_code,
        num_codes=small.CODES,
        eos_token_id=ours.mark(Mark.END_OF_TURN),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Planner(jax.jit(lambda: Qwen3ForCausalLM(config, runtime=Runtime(), rngs=nnx.Rngs(0)))(), ours)


@pytest.fixture(scope="module")
def codes(planner):
    return planner.write_codes(SONGS, METADATA, seeds=SEEDS)


@pytest.mark.slow
def test_alone_and_in_another_bucket(planner, codes):
    """The first song's prompt fits a smaller bucket than the second's."""
    for i in range(2):
        (alone,) = planner.write_codes(SONGS[i : i + 1], METADATA[i : i + 1], seeds=SEEDS[i : i + 1])
        np.testing.assert_array_equal(alone, codes[i])
    longer = dataclasses.replace(METADATA[1], duration=60)
    long = planner.write_codes(SONGS, [METADATA[0], longer], seeds=SEEDS)
    assert len(long[1]) == 300
    np.testing.assert_array_equal(long[0], codes[0])


@pytest.fixture(scope="module")
def split(planner):
    """The planner as it is loaded on a CPU: its layers, and their cache, are arrays of their own."""
    return Planner(jax.jit(lambda model: model.split())(planner.model), planner.tokenizer)


def test_as_a_cpu_reads_it(split, codes):
    for ours, theirs in zip(split.write_codes(SONGS, METADATA, seeds=SEEDS), codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_five_songs_of_different_prompts_and_lengths(split, codes):
    """Together, in ten rows with guidance, they have the largest bucket of prompts and codes; each song is what it is
    in smaller ones: the first two with each other, the longest alone and in pieces, across the edge at which the cache
    grows, and the last two, one of which has the longest prompt, with each other."""
    songs = [*SONGS, Known(caption="rock"), Known(caption="jazz " * 200), Known(caption="folk " * 40, lyrics="La")]
    durations = [10.3, 11.3, 52.4, 20, 5]
    known = [
        dataclasses.replace(METADATA[0], lyrics=song.lyrics, duration=duration)
        for song, duration in zip(songs, durations, strict=True)
    ]
    seeds = [3, 4, 5, 6, 7]
    together = split.write_codes(songs, known, seeds=seeds)
    assert [len(one) for one in together] == [52, 57, 262, 100, 25]
    reports = []
    pieces = split.write_codes(songs[2:3], known[2:3], seeds=seeds[2:3], on_progress=lambda *now: reports.append(now))
    assert reports == [(made, 262) for made in [*range(32, 262, 32), 262]]
    pair = split.write_codes(songs[3:], known[3:], seeds=seeds[3:])
    for ours, theirs in zip([*codes, *pieces, *pair], together, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_on_a_mesh(planner, codes):
    mesh = make_mesh(data=4, tensor=2)
    leaves = checkpoint.leaves(planner.model)
    placed = {name: jax.device_put(leaf[...], variable_sharding(leaf, mesh)) for name, leaf in leaves.items()}
    model = checkpoint.assemble(checkpoint.abstract("planner", planner.model.planner), placed)
    for ours, theirs in zip(
        Planner(model, planner.tokenizer, mesh).write_codes(SONGS, METADATA, seeds=SEEDS), codes, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_negative_prompt_changes_codes(planner, codes):
    others = LanguageSampling(negative_prompt="noise and hum")
    found = planner.write_codes(SONGS, METADATA, seeds=SEEDS, sampling=others)
    assert all((ours != theirs).any() for ours, theirs in zip(found, codes, strict=True))


def test_pieces(planner, codes):
    reports = []
    again = planner.write_codes(SONGS, METADATA, seeds=SEEDS, on_progress=lambda *now: reports.append(now))
    np.testing.assert_array_equal(again[0], codes[0])
    np.testing.assert_array_equal(again[1], codes[1])
    assert reports == [(32, 57), (57, 57)]


@pytest.mark.unit
def test_windows():
    assert generate.windows(256, 512) == (512,)
    assert generate.windows(256, 1280) == (512, 1024, 1280)
    assert generate.windows(512, 1280) == (1024, 1280)
    assert generate.windows(3072, 6144) == (4096, 6144)
    for prompt in (256, 512, 1024, 2048, 3072):
        for slots in range(prompt + 256, prompt + 3328, 256):
            found = generate.windows(prompt, slots)
            assert (
                found[0] > prompt
                and found[-1] == slots
                and all((size - prompt) % generate.PIECE == 0 for size in found)
            )


@pytest.mark.slow
def test_codes_across_the_edge_of_a_window(planner):
    """Greedy codes of slots 256 to 575, of which the first window ends at 511: those of full forward passes."""
    random = np.random.default_rng(0)
    prompt, steps = random.integers(0, small.config().first_code, 256).astype(np.int32), 320
    greedy = LanguageSampling(temperature=0.0, cfg_scale=1.0)
    start = np.int32([3])
    inputs = generate.CodeInputs(
        prompts=generate.Prompts(prompt[None], start),
        targets=np.int32([steps]),
        keys=jax.random.split(jax.random.key(0), 1),
        drawing=Drawing.of(greedy, 1),
        ends_in_loop=np.array(False),
    )
    tokens, lengths = generate.write(planner.model, inputs, slots=1280)
    assert lengths[0] == steps and generate.windows(256, 1280)[0] == 512
    written = np.asarray(tokens)[0, :steps]
    read = np.concatenate([prompt, planner.model.planner.first_code + written])[None]
    hidden = jax.jit(lambda model, tokens: model.hidden_states(tokens, start))(planner.model, read)
    logits = planner.model.code_logits(hidden[0, 255:-1])[:, 1:]
    best = np.sort(logits, -1)[:, -2:]
    clear = np.asarray(best[:, 1] - best[:, 0]) > 1e-4  # not decided by rounding
    assert clear[250:260].all() and len(set(written[clear])) > 3
    np.testing.assert_array_equal(written[clear], np.argmax(logits, -1)[clear])


def test_the_cache_is_not_copied_in_the_loop(planner, monkeypatch):
    """It is updated where it is: a copy in each step would cost as much as all of the weights."""
    found = {}

    def compile_only(model, inputs, *, slots):
        found["text"] = generate.write.lower(model, inputs, slots=slots).compile().as_text()
        raise StopIteration

    monkeypatch.setattr(planner, "_write", lambda inputs, slots, *_: compile_only(planner.model, inputs, slots=slots))
    with pytest.raises(StopIteration):
        planner.write_codes(SONGS[:1], METADATA[:1], seeds=SEEDS[:1])
    cache = r"f32\[2,2,2,(?:8,512|512,8)\]"  # keys, values
    assert re.search(cache, found["text"])
    names = set(re.findall(r"body=%?([\w.\-]+)", found["text"]))
    parts = re.split(r"\n\n+", found["text"])
    bodies = [part for part in parts if part.lstrip().removeprefix("%").split(" ")[0] in names]
    assert names and len(bodies) == len(names)
    copies = [line for body in bodies for line in body.splitlines() if re.search(rf"= {cache}\S* copy\(", line)]
    assert not copies, copies[:2]
