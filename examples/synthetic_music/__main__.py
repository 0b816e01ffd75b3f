"""`python -m examples.synthetic_music OUT_DIR`: compose songs, with texts for `acestep-jax train preprocess`."""

import argparse
import sys

from acestep_jax.errors import InputError
from examples.synthetic_music.styles import STYLES
from examples.synthetic_music.write import write_songs


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, 2 after an error message, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.synthetic_music", description="Compose songs.")
    add = parser.add_argument
    add("out_dir", metavar="OUT_DIR", help="New folder, or one that this command wrote: missing songs are added.")
    add("--songs", metavar="N", type=int, default=100, help="Number of songs [100].")
    add("--seconds", type=float, default=30.0, help="Length of each song [30].")
    add("--seed", type=int, default=0, help="Seed of the first song; song i has seed + i [0].")
    add("--style", choices=tuple(STYLES), metavar="NAME", help=f"Style of the songs: {', '.join(STYLES)} [all].")
    add(
        "--untold",
        metavar="FRACTION",
        type=float,
        default=0.0,
        help="Fraction of songs whose text omits tempo, key and time signature [0].",
    )
    add(
        "--brief",
        metavar="FRACTION",
        type=float,
        default=0.0,
        help="Fraction of songs whose text is only a few words [0].",
    )
    add("--workers", metavar="N", type=int, default=2, help="Number of processes [2].")
    options = parser.parse_args(arguments)
    try:
        for done in write_songs(**vars(options)):
            if done % 100 == 0 or done == options.songs:
                print(f"{options.out_dir}: {done} of {options.songs} songs", flush=True)
    except (InputError, OSError) as error:
        print(f"synthetic_music: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synthetic_music: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
