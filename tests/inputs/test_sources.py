"""What is checked of the songs that were made, and what is kept from one to the next."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax import InputError, Request
from acestep_jax.inputs import sources
from acestep_jax.inputs.sources import check_songs

pytestmark = pytest.mark.unit


def test_a_song_that_is_not_finite_is_named():
    """By its index in a batch, by which songs of one prompt differ; alone by its prompt."""
    jobs = [SimpleNamespace(request=Request("piano"))] * 3
    values = [np.zeros(4), np.zeros(4), np.array([1, np.nan, np.inf, 0])]
    with pytest.raises(InputError, match=r"^songs\[2\] 'piano', seed 7: 2 of 4 values of it are NaN or infinite"):
        check_songs(jobs, [5, 6, 7], values, "of it")
    with pytest.raises(InputError, match="^song 'piano': 2 of 4 values"):
        check_songs(jobs[:1], [None], values[2:], "of it")
    check_songs(jobs[:2], [5, 6], values, "of it")


def test_silence_is_encoded_once_for_the_same_weights(monkeypatch):
    """A module may be another one, or be changed in place; its arrays tell."""
    encoded = []
    monkeypatch.setattr(sources.programs, "encode_timbres", lambda encoder: encoded.append(encoder) or len(encoded))
    silent, placed = sources.SilentTimbre(), {"condition_encoder": "on the device"}
    weights = {"x": jnp.ones(3), "y": jnp.zeros(2)}
    assert silent.token({"condition_encoder": weights}, placed) == 1
    assert silent.token({"condition_encoder": dict(weights)}, placed) == 1
    weights["x"] = jnp.ones(3)
    assert silent.token({"condition_encoder": weights}, placed) == 2
    assert silent.token({"condition_encoder": weights}, placed) == 2
    assert encoded == ["on the device"] * 2
