"""`python -m examples.synthetic_music OUT_DIR`: songs, and beside each what `python -m train preprocess` reads."""

import argparse
import sys

from acestep_jax.errors import InputError
from examples.synthetic_music.styles import STYLES
from examples.synthetic_music.write import write_songs


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after an error message, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.synthetic_music", description="Makes songs to train on.")
    add = parser.add_argument
    add("out_dir", metavar="OUT_DIR", help="a new folder, or one of this program's: what is missing there is made")
    add("--songs", metavar="N", type=int, default=100, help="[100]")
    add("--seconds", type=float, default=30.0, help="of each [30]")
    add("--seed", type=int, default=0, help="of the first; the others follow [0]")
    add("--style", choices=tuple(STYLES), metavar="NAME", help=f"{', '.join(STYLES)} [all]")
    add("--untold", metavar="SHARE", type=float, default=0.0, help="of texts without tempo, key and time signature [0]")
    add("--brief", metavar="SHARE", type=float, default=0.0, help="of texts of a few words and nothing else [0]")
    add("--workers", metavar="N", type=int, default=2, help="processes [2]")
    options = parser.parse_args(arguments)
    try:
        for done in write_songs(**vars(options)):
            if done % 100 == 0 or done == options.songs:
                print(f"{options.out_dir}: {done} of {options.songs} songs", flush=True)
    except (InputError, OSError) as error:
        print(f"synthetic_music: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synthetic_music: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
