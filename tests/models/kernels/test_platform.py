"""What kind of device a program is compiled for."""

import jax
import pytest
from jax.sharding import AbstractMesh

from acestep_jax.models.kernels.platform import compute_capability, favours_bfloat16, platform

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


INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (INTEL + "flags\t\t: fpu avx512f avx512_bf16 avx512_fp16\n", False),
        (INTEL + "flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", True),
        (INTEL + "flags\t\t: fpu avx2\n", False),
        (AMD + "flags\t\t: fpu avx512f avx512_bf16\n", True),
        (AMD + "flags\t\t: fpu avx2\n", False),
        ("CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16\n", True),
    ],
)
def test_processors_that_multiply_bfloat16_faster(cpuinfo, expected):
    assert favours_bfloat16(cpuinfo) is expected
