"""Write the tables of arguments.md from the fields of `request.KINDS`: `python docs/arguments.py`."""

import re
from pathlib import Path

from acestep_jax.arguments import table
from acestep_jax.request import KINDS

PAGE = Path(__file__).with_suffix(".md")


def filled(text: str) -> str:
    """Return the page with the tables between its markers."""
    for kind in KINDS:
        name = kind.__name__.lower()
        pattern = rf"(<!-- arguments:{name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda found: f"{found[1]}\n{table(kind)}\n{found[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{PAGE}: expected one table of {name}, found {count}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
