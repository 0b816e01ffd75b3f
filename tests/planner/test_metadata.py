"""What the user gave of a song is checked and brought into the form that the model knows."""

import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.planner.metadata import Known, count_codes

pytestmark = pytest.mark.unit


def test_values_are_normalised():
    known = Known("a\r\nb", bpm=119.7, keyscale="f#m", timesignature="6/8", language="English", codes=np.int32([1, 2]))
    assert known == Known("a\nb", bpm=120, keyscale="F# minor", timesignature="6", language="en", codes=(1, 2))
    assert Known(language="unknown").language is None
    assert Known(instrumental=True).lyrics == "[Instrumental]"
    assert Known(instrumental=True, lyrics="la").lyrics == "la"


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(caption=3), "caption: expected text, found 3"),
        (dict(caption="\ud800"), "caption: not valid text"),
        (dict(bpm=999), "bpm: expected 30 to 300"),
        (dict(keyscale="H major"), "keyscale: expected A to G"),
        (dict(timesignature=5), "timesignature: expected one of 2, 3, 4, 6"),
        (dict(duration=9.9), "duration: expected 10 to 600 s, found 9.9"),
        (dict(duration=601), "duration: expected 10 to 600 s, found 601"),
        (dict(duration="30"), "duration: expected a number"),
        (dict(language="klingon"), "vocal_language: expected one of"),
        (
            dict(codes=[5, 64000]),
            "codes: expected whole numbers from 0 to 63999, the size of the codebook, found 64000",
        ),
        (dict(codes=[-1]), "codes: .* found -1"),
        (dict(codes=[1.5]), "codes: expected a whole number"),
    ],
)
def test_bad_input(values, message):
    with pytest.raises(InputError, match=message):
        Known(**values)


def test_number_of_codes():
    """Enough for every duration, and none too many."""
    for tenths in range(100, 6001):
        count = count_codes(tenths / 10)
        assert count / 5 >= tenths / 10 - 1e-9 and (count - 1) / 5 < tenths / 10
    assert count_codes(600) == 3000 and count_codes(30) == 150 and count_codes(30.1) == 151
