"""The programs that a TPU would run, compiled without one."""

import pytest

from tests.processes import printed_rows

pytestmark = pytest.mark.slow


def compile_for_tpu(*arguments: str) -> dict[str, str]:
    """The one row that `benchmarks.tpu_aot` prints with these arguments, by column."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install '.[tpu]'")
    (row,) = printed_rows("benchmarks.tpu_aot", *arguments)
    return row


def counts(text: str) -> dict[str, tuple[int, int]]:
    """'all-gather 2 (16), ...': how many there are and how often they run, by kind."""
    words = [entry.rsplit(maxsplit=2) for entry in text.split(", ") if entry]
    return {kind: (int(n), int(runs.strip("()"))) for kind, n, runs in words}


def test_denoising_on_a_mesh():
    """Two layers, one with a window and one without, in eight steps, split along time."""
    arguments = "--stage denoise --size 2B --layers 2 --seconds 60 --topology v5e:2x2 --mesh sequence=4"
    row = compile_for_tpu(*arguments.split())
    # Splash attention of both layers, to themselves and to the condition, and norms with rotation of their queries and
    # keys, eight times; norms of the condition's keys.
    assert row["Pallas kernels"] == "11 (82)"
    # The window's keys and values come from the neighbours in every step, and nothing is summed over devices.
    collectives = counts(row["collectives"])
    assert collectives["collective-permute"][1] >= 8 and "all-reduce" not in collectives
    assert row["fits"] == "yes"
    assert float(row["total GB"]) < 0.6  # 0.39 of them arguments
    assert 0 < float(row["estimate s"]) < 0.1


def test_one_chip_needs_no_collectives_for_a_batch():
    arguments = "--stage denoise --size 2B --layers 2 --seconds 30 --batch 4 --topology v5e:2x2 --mesh data=4"
    row = compile_for_tpu(*arguments.split())
    assert row["Pallas kernels"] == "11 (82)"  # as above
    assert row["collectives"] == ""


def test_training_keeps_gradients_sharded():
    """All weights of four layers of the 2B width learn: 0.3 G of them, of which each of four devices holds a quarter,
    with two moments in float32."""
    arguments = "--stage train --method full --size 2B --layers 4 --seconds 30 --batch 4"
    arguments += " --topology v5e:2x2 --mesh fsdp=4"
    row = compile_for_tpu(*arguments.split())
    assert row["fits"] == "yes"
    state = 0.3 * 3 * 4 / 4
    assert state < float(row["arguments GB"]) < 2 * state
    # A whole float32 gradient on each device would alone take 1.2 GB.
    assert float(row["temporary GB"]) < 1.2
    # Products are not cut into rounds of permutations; what is left of those comes from windows of no mesh axis.
    assert "collective-permute" not in counts(row["collectives"])
