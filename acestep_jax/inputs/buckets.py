"""Buckets: arrays are padded to a small set of lengths, so that few programs are compiled. Padding is masked."""

from dataclasses import dataclass


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Buckets:
    """Multiples that lengths are rounded up to.

    Attributes:
        frames: latent frames; coarser for long songs, see `frames_of`.
        prompt, lyrics: tokens.
    """

    frames: int = 256
    prompt: int = 64
    lyrics: int = 256

    def frames_of(self, n: int) -> int:
        """Return n rounded up to a multiple of `frames`, or of an eighth of the power of two below: at most an eighth
        more than n beyond 2048 frames, and 31 sizes up to 600 s."""
        return _round_up(n, max(self.frames, 2 ** (n - 1).bit_length() // 16))

    def prompt_of(self, n: int) -> int:
        """Return n rounded up to a multiple of `prompt`."""
        return _round_up(n, self.prompt)

    def lyrics_of(self, n: int) -> int:
        """Return n rounded up to a multiple of `lyrics`."""
        return _round_up(n, self.lyrics)


BUCKETS = Buckets()
