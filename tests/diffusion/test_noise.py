"""PyTorch's GPU noise against vectors that others published, and Philox against its authors' answers."""

import numpy as np
import pytest

from acestep_jax.diffusion.noise import COMMON_THREADS, GPU_THREADS, cuda_normal, gpu_threads, philox4x32
from acestep_jax.errors import InputError

pytestmark = pytest.mark.unit

# torch.manual_seed(0); torch.randn(12, device="cuda")
SEED_0 = [-0.92466259, -0.42534414, -2.64384580, 0.14518388, -0.12086648, -0.57972562]
SEED_0 += [-0.62285119, -0.32838708, -1.07454228, -0.36314407, -1.67105067, 2.26550508]


def test_published_numbers():
    np.testing.assert_allclose(cuda_normal(0, 12), SEED_0, atol=2e-6)


# The known answers of Random123: counter, key, result.
ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, result", ANSWERS)
def test_philox(counter, key, result):
    found = philox4x32([np.array([word], np.uint64) for word in counter], tuple(key))
    assert [int(word[0]) for word in found] == result


def one_thread(seed, thread, calls):
    """The normal numbers of one thread of the GPU, four for each call, in double precision."""
    numbers = []
    for call in range(calls):
        words = [int(w) for w in philox4x32([np.uint64(n) for n in (call, 0, thread, 0)], (seed, 0))]
        for a, b in (words[:2], words[2:]):
            radius, angle = np.sqrt(-2 * np.log((a + 0.5) / 2**32)), 2 * np.pi * (b + 0.5) / 2**32
            numbers += [radius * np.sin(angle), radius * np.cos(angle)]
    return numbers


def test_more_numbers_than_threads():
    """Each thread writes its numbers as many places apart as there are threads."""
    threads = 512
    numbers = cuda_normal(7, 5 * threads + 3, threads)
    for thread in (0, 2, 3, 511):
        expected = one_thread(7, thread, 2)[: 6 if thread < 3 else 5]
        np.testing.assert_allclose(numbers[thread::threads], expected, atol=1e-5)
    np.testing.assert_array_equal(cuda_normal(7, 100, threads), numbers[:100])


def test_distribution():
    numbers = cuda_normal(3, 100_000, GPU_THREADS["A100"]).astype(np.float64)
    assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01
    assert not np.array_equal(cuda_normal(3, 10), cuda_normal(3 + 2**32, 10))  # both halves of the seed count


def test_names_of_gpus():
    assert gpu_threads("torch") is None and gpu_threads("torch:A100") == 221_184 and gpu_threads("torch:6144") == 6144
    assert gpu_threads("torch:T4") == COMMON_THREADS <= min(GPU_THREADS.values())
    for kind, message in (
        ("cuda", "expected jax, torch or torch:GPU"),
        ("torch:GTX", "expected one of A100"),
        ("torch:1", "A100"),
    ):
        with pytest.raises(InputError, match=message):
            gpu_threads(kind)
    with pytest.raises(InputError, match="depend on the GPU; name it: torch:A100"):
        cuda_normal(0, COMMON_THREADS + 1)


def test_matches_the_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch for it")
    properties = torch.cuda.get_device_properties(0)
    threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    for seed, count in ((0, 1000), (42, 96_000), (2**32 - 1, 3 * threads + 5)):
        theirs = torch.randn(count, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        np.testing.assert_allclose(cuda_normal(seed, count, threads), theirs.cpu().numpy(), atol=1e-5)
