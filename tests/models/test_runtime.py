"""What a runtime refuses, by name of the field."""

import pytest

from acestep_jax import InputError
from acestep_jax.models.runtime import Runtime

pytestmark = pytest.mark.unit

REFUSED = {
    "remat": (dict(remat="all"), "Runtime.remat: expected one of none, dots, full, found 'all'"),
    "dtype": (dict(dtype="float64"), "Runtime.dtype: 'float64' is not a dtype"),
    "param dtype": (dict(param_dtype="int8"), "Runtime.param_dtype: 'int8' is not a dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        Runtime(**values)
    assert message in str(error.value)
