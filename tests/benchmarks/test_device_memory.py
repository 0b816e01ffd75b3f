"""The table of what fits where is that of the figures which the library uses."""

from acestep_jax import memory
from benchmarks.device_memory import table
from tests.imports import ROOT


def test_table_of_the_documentation():
    page = (ROOT / "docs/devices.md").read_text(encoding="utf-8")
    for line in table():
        assert line in page, f"run `python -m benchmarks.device_memory --table` again: {line}"
    assert all(figure > 0 for programs in memory.WORKING.values() for row in programs.values() for figure in row)
