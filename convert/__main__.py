"""`python -m convert`: the same as `acestep-jax convert`, in a clone."""

import sys

from acestep_jax import cli


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status, see `acestep_jax.cli.main`."""
    return cli.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
