"""The objective against numbers: the distribution of times, the mixture of tasks, masks, dropout, sampling."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from acestep_jax.distributed import make_mesh
from acestep_jax.inputs import tasks
from acestep_jax.io import checkpoint
from acestep_jax.train.config import TASKS, ObjectiveConfig
from acestep_jax.train.objective import context_latents, freeze, sample_times, velocity_losses
from tests.objective_programs import draw, encode
from tests.parity import assert_close, normal
from tests.training import random_batch

TEXT2MUSIC, REPAINT, COVER = (TASKS.index(name) for name in ("text2music", "repaint", "cover"))
MANY = 40_000
# Of sigmoid(-0.4 + max(n1, n2)): ACE-Step's own figures.
QUANTILES = {0.05: 0.239, 0.25: 0.401, 0.75: 0.670, 0.95: 0.826}


@pytest.fixture(scope="module")
def configs(tiny):
    return checkpoint.read_manifest(tiny[1]).configs


@pytest.fixture(scope="module")
def frozen(tiny):
    names = ["condition_encoder", "audio_tokenizer", "audio_token_detokenizer"]
    networks = checkpoint.load(tiny[1], names=names)
    embedding = checkpoint.load(tiny[1], names=["text_encoder"])["text_encoder"].embed_tokens.embedding[...]
    return freeze(networks, embedding, 750)


@jax.jit
def through_the_codes(frozen, x):
    quantized, _ = frozen.audio_tokenizer.tokenize(x, frozen.condition_encoder.silence_latent[...])
    return frozen.audio_token_detokenizer(quantized)


def times(kind, step_size=8, count=MANY):
    config = ObjectiveConfig(timesteps=kind)
    numbers = jnp.arange(count, dtype=jnp.uint32)
    return np.asarray(jax.jit(lambda n: sample_times(jax.random.key(3), n, step_size, config))(numbers))


@pytest.mark.unit
@pytest.mark.parametrize("kind", ["logit_normal", "stratified"])
def test_times_have_the_quantiles_of_the_original(kind):
    t = times(kind)
    assert t.dtype == np.float32
    assert abs(t.mean() - 0.535) < 0.003  # a single draw would give 0.418
    for share, value in QUANTILES.items():
        assert abs(np.quantile(t, share) - value) < 0.006


@pytest.mark.unit
def test_stratified_times_spread_over_a_step():
    """Each of a step's examples is in another eighth of the distribution; steps differ."""
    t = times("stratified", step_size=8, count=800).reshape(-1, 8)
    borders = np.quantile(times("stratified", count=MANY), np.linspace(0, 1, 9)[1:-1])
    strata = np.searchsorted(borders, t)
    share = (strata == np.arange(8)).mean()
    assert share > 0.97  # the borders are estimates
    assert np.abs(np.diff(t[:, 0])).min() > 0
    assert t.mean(1).std() < times("logit_normal", count=800).reshape(-1, 8).mean(1).std() / 4


@pytest.mark.unit
def test_turbo_times_are_the_eight_of_the_schedule():
    found, counts = np.unique(times("turbo"), return_counts=True)
    expected = [0.3, 0.5, 0.642857, 0.75, 0.833333, 0.9, 0.954545, 1.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(counts / MANY - 1 / 8).max() < 0.006


def many_examples(configs, count=4000):
    batch = random_batch(configs, frames=3, lengths=(3,) * count, tasks=(0,) * count)
    return batch, draw(batch, jax.random.key(0), 8, ObjectiveConfig())


def test_posterior_is_sampled_and_noise_is_normal(configs):
    batch, draws = many_examples(configs)
    z = (np.asarray(draws.x0) - batch.mean) / batch.std
    for sample in (z, np.asarray(draws.noise)):
        assert abs(sample.mean()) < 0.01 and abs(sample.std() - 1) < 0.01
    assert abs(np.corrcoef(z.ravel(), np.asarray(draws.noise).ravel())[0, 1]) < 0.01


def test_condition_dropout_has_its_rate(configs):
    _, draws = many_examples(configs)
    assert abs(np.asarray(draws.dropped).mean() - 0.15) < 0.02  # four standard deviations


def test_draws_belong_to_the_example_not_to_its_row(configs):
    """The same numbers in another order and batch."""
    batch = random_batch(configs, lengths=(61, 61, 61), tasks=(0, 0, 0))
    config = ObjectiveConfig()
    whole = draw(batch, jax.random.key(1), 4, config)
    part = draw(jax.tree.map(lambda x: x[[2, 0]], batch), jax.random.key(1), 4, config)
    for ours, theirs in zip(part, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[np.array([2, 0])])
    other = draw(batch, jax.random.key(2), 4, config)
    assert not np.array_equal(other.noise, whole.noise) and not np.array_equal(other.t, whole.t)


def test_loss_is_the_mean_over_valid_frames(configs, frozen):
    """A network that says nothing, so that the loss is known: the mean square of the target where there is music."""
    batch = random_batch(configs, lengths=(61, 25, 0), tasks=(0, 0, 0))
    draws = draw(batch, jax.random.key(0), 4, ObjectiveConfig())
    nothing = lambda x, *_, **__: jnp.zeros_like(x)  # noqa: E731
    losses = jax.jit(lambda *arguments: velocity_losses(nothing, *arguments))
    errors, elements = losses(frozen, batch, draws)
    channels = batch.mean.shape[-1]
    np.testing.assert_array_equal(elements, np.array([61, 25, 0]) * channels)
    target = np.asarray(draws.noise, np.float64) - np.asarray(draws.x0, np.float64)
    expected = [np.square(target[i, :n]).sum() for i, n in enumerate(batch.lengths)]
    np.testing.assert_allclose(errors, expected, rtol=1e-6)
    assert errors[2] == 0


def test_the_network_sees_x_t_and_r_equals_t(configs, frozen):
    batch = random_batch(configs)
    draws = draw(batch, jax.random.key(5), 4, ObjectiveConfig())

    @jax.jit
    def run(frozen, batch, draws):
        seen = {}

        def network(x, t, r, condition, context, *, lengths, encoder_lengths, dropout_key):
            assert dropout_key is None
            seen.update(x=x, t=t, r=r, lengths=lengths, encoder_lengths=encoder_lengths)
            return jnp.zeros_like(x)

        velocity_losses(network, frozen, batch, draws)
        return seen

    seen = run(frozen, batch, draws)
    t = np.asarray(draws.t)[:, None, None]
    np.testing.assert_allclose(seen["x"], t * draws.noise + (1 - t) * draws.x0, atol=1e-6)
    np.testing.assert_array_equal(seen["t"], draws.t)
    np.testing.assert_array_equal(seen["r"], draws.t)
    np.testing.assert_array_equal(seen["lengths"], batch.lengths)
    np.testing.assert_array_equal(seen["encoder_lengths"], [7 + 11 + 1] * 2)


def test_condition_is_that_of_the_pipeline(configs, frozen):
    """With padding in both texts; where it is dropped, every token is the null embedding."""
    batch = random_batch(configs)
    batch = batch._replace(text_lengths=np.array([7, 4], np.int32), lyric_lengths=np.array([6, 11], np.int32))
    condition, lengths = encode(frozen, batch, jnp.array([False, False]))
    encoder = frozen.condition_encoder
    reference = jnp.broadcast_to(encoder.silence(750), (2, 750, batch.mean.shape[-1]))
    masks = [np.arange(n) < np.array(valid)[:, None] for n, valid in ((7, [7, 4]), (11, [6, 11]))]
    lyrics = jnp.take(frozen.embedding, batch.lyric_ids, axis=0)
    expected, mask = jax.jit(lambda encoder, *inputs: encoder(*inputs))(
        encoder, batch.text, masks[0], lyrics, masks[1], reference, jnp.arange(2)
    )
    np.testing.assert_array_equal(lengths, mask.sum(1))
    assert lengths.tolist() == [14, 16]
    for i, n in enumerate(lengths):
        assert_close(condition[i, :n], expected[i, :n])

    dropped, lengths = encode(frozen, batch, jnp.array([True, False]))
    np.testing.assert_array_equal(lengths, mask.sum(1))
    null = np.broadcast_to(encoder.null_condition_emb[...][0], dropped[0].shape)
    np.testing.assert_array_equal(dropped[0], null)
    np.testing.assert_array_equal(dropped[1], condition[1])


def test_context_of_each_task(configs, frozen):
    frames = 23  # no multiple of the five frames of a code
    batch = random_batch(configs, frames=frames, lengths=(23, 23, 23), tasks=(TEXT2MUSIC, REPAINT, COVER))
    x0 = jnp.asarray(normal(*batch.mean.shape, seed=4))
    context = np.asarray(jax.jit(context_latents)(frozen, batch, x0))
    channels = x0.shape[-1]
    source, mask = context[..., :channels], context[..., channels:]
    silence = np.asarray(frozen.condition_encoder.silence(frames))[0]
    np.testing.assert_array_equal(source[0], silence)
    np.testing.assert_array_equal(mask[0], 1)
    window = (np.arange(frames) >= 5) & (np.arange(frames) < 20)
    np.testing.assert_array_equal(source[1], np.where(window[:, None], silence, x0[1]))
    np.testing.assert_array_equal(mask[1], np.broadcast_to(window[:, None], mask[1].shape))
    assert_close(source[2], through_the_codes(frozen, x0[2:])[0, :frames])
    np.testing.assert_array_equal(mask[2], 1)
    assert np.abs(source[2] - silence).max() > 0.1


@pytest.mark.parametrize("axes", [None, dict(data=2, fsdp=2, tensor=2)])
def test_covers_are_tokenized_in_groups(configs, frozen, axes):
    """Wherever they are in the batch; 5 of 8 are three groups of two or, split over four, two of four."""
    kinds = (TEXT2MUSIC, COVER, COVER, REPAINT, COVER, COVER, TEXT2MUSIC, COVER)
    batch = random_batch(configs, frames=10, lengths=(10,) * 8, tasks=kinds)
    x0 = jnp.asarray(normal(*batch.mean.shape, seed=4))
    expected = np.asarray(through_the_codes(frozen, x0))
    mesh = make_mesh(**axes) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        if mesh:
            rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
            batch, x0, frozen = jax.device_put((batch, x0, frozen), (rows, rows, whole))
        context = np.asarray(jax.jit(context_latents)(frozen, batch, x0))
    covers = [i for i, kind in enumerate(kinds) if kind == COVER]
    assert_close(context[covers, :, : x0.shape[-1]], expected[covers])
    np.testing.assert_array_equal(context[3, :5, : x0.shape[-1]], np.asarray(x0)[3, :5])  # before the region


def test_the_indices_of_tasks_in_data_folders_stay():
    """Stored prompts and draws depend on them; a task that training learns to draw goes to the end."""
    assert TASKS == ("text2music", "repaint", "cover")
    assert {name for name, task in tasks.TASKS.items() if task.trained} == set(TASKS)
