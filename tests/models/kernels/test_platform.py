"""What kind of device a program is compiled for."""

import jax
import pytest
from jax.sharding import AbstractMesh

from acestep_jax.models.kernels.platform import compute_capability, platform

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 9.0),
        ("NVIDIA A100-SXM4-40GB", 8.0),
        ("NVIDIA A10G", 8.6),
        ("NVIDIA L4", 8.9),
        ("Tesla T4", 7.5),
        ("NVIDIA B200", 10.0),
        ("another", 0.0),
    ],
)
def test_the_mesh_is_asked(kind, expected):
    """Not the device that is attached, which is a CPU here."""
    device = jax.sharding.AbstractDevice(kind, None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert platform() == "gpu"
        assert compute_capability() == expected


def test_without_a_mesh_the_attached_device_is_asked():
    assert compute_capability() == 0.0
