"""What songs take of a device, against published sizes and what programs took when they were compiled."""

import pytest

from acestep_jax import memory
from acestep_jax.memory import configs_of, needed_bytes, needed_in_turn, weight_bytes, working_bytes

pytestmark = pytest.mark.unit


@pytest.mark.heavy
def test_weights():
    """Parameters of the published models, at two bytes each."""
    weights = weight_bytes(configs_of("2B"), "bfloat16")
    assert weights["transformer"] == 2 * 1_575_458_880
    # With the embedding of no condition and the latents of silence.
    assert weights["condition_encoder"] == 2 * (608_367_616 + 2048 + 15_000 * 64)
    assert weights["audio_tokenizer"] == 2 * 105_032_198 and weights["audio_token_detokenizer"] == 2 * 105_011_776
    assert weight_bytes(configs_of("XL"), "float32")["transformer"] == 4 * 4_168_897_088


@pytest.mark.parametrize("platform, precision", memory.WORKING)
def test_working_memory(platform, precision):
    for size in memory.SIZES:
        configs, table = configs_of(size), memory.WORKING[platform, precision]
        for i, seconds in enumerate(memory.SECONDS):
            found = working_bytes(configs, precision, platform, seconds)
            expected = {"denoise": table[size][i], "decode": table["decode"][i]}
            assert found == {program: pytest.approx(figure * 1e9, abs=1) for program, figure in expected.items()}
        for program in ("denoise", "decode"):
            below, between, above = (
                working_bytes(configs, precision, platform, seconds)[program] for seconds in (60.0, 150.0, 240.0)
            )
            assert below <= between <= above
            assert working_bytes(configs, precision, platform, 150.0, rows=2)[program] == pytest.approx(
                2 * between, abs=2
            )


def test_needed():
    configs = configs_of("XL")
    weights, working = weight_bytes(configs, "bfloat16"), working_bytes(configs, "bfloat16", "tpu", 60.0)
    whole = needed_bytes(configs, "bfloat16", "tpu", 60.0)
    assert whole == sum(weights.values()) + max(working.values())
    turn = needed_in_turn(configs, "bfloat16", "tpu", 60.0)
    assert turn == weights["transformer"] + weights["condition_encoder"] + working["denoise"] < whole
