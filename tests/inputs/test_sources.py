"""What is checked of the songs that were made."""

from types import SimpleNamespace

import numpy as np
import pytest

from acestep_jax import InputError, Request
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
