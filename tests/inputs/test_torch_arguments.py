"""Generators and tensors as arguments, with stand-ins that need no PyTorch, and with PyTorch's own."""

import numpy as np
import pytest

from acestep_jax.errors import InputError
from acestep_jax.inputs.torch_arguments import array_of, from_torch


class Generator:
    def __init__(self, seed):
        self.seed = seed

    def initial_seed(self):
        return self.seed


@pytest.mark.unit
def test_generators_give_their_seeds():
    assert from_torch({"prompt": "a"}, Generator(5)) == {"prompt": "a", "seed": 5}
    assert from_torch({"prompt": ["a", "b"]}, [Generator(5), Generator(1)])["seed"] == [5, 1]
    assert from_torch({"prompt": "a", "seed": 2}, None) == {"prompt": "a", "seed": 2}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("keywords", "generator", "words"),
    [
        ({"seed": 1}, Generator(1), "generator: seed is given as well"),
        ({}, 7, "generator: expected a torch.Generator .* found 7; use seed=N"),
        ({}, [Generator(1), None], "generator: expected a torch.Generator"),
        ({}, Generator(67280421310721), r"generator: its seed is 67280421310721, expected 0 to 2\^32 - 1"),
    ],
)
def test_bad_generators(keywords, generator, words):
    with pytest.raises(InputError, match=words):
        from_torch({"prompt": "a", **keywords}, generator)


def test_tensors_become_arrays():
    import torch

    tensor = torch.arange(6.0).reshape(1, 2, 3).requires_grad_()
    np.testing.assert_array_equal(from_torch({"src_audio": tensor}, None)["src_audio"], [[0, 1, 2], [3, 4, 5]])
    both = from_torch({"reference_audio": torch.cat([tensor, tensor])}, None)["reference_audio"]
    assert len(both) == 2 and both[1].shape == (2, 3)
    half = array_of(torch.ones(2, 2, dtype=torch.bfloat16))
    assert half.dtype == np.float32 and array_of([tensor, None])[1] is None
    with pytest.raises(InputError, match="bpm: found a tensor; give a number"):
        from_torch({"prompt": "a", "bpm": torch.tensor(90)}, None)
