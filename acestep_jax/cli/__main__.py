import sys

from acestep_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
