"""The planner: a language model and its tokenizer, which complete the metadata of songs and write their audio codes."""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from acestep_jax.diffusion import noise
from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.inputs import fields
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.planner import generate, parsing, prompts
from acestep_jax.planner.grammar import Grammar
from acestep_jax.planner.loops import Loop, find_loop
from acestep_jax.planner.metadata import Known, Metadata, count_codes
from acestep_jax.planner.sampling import Drawing, LanguageSampling
from acestep_jax.planner.tokenizer import Mark, Pieces, PlannerTokenizer
from acestep_jax.settings import with_own_settings

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[int, int], object]  # (steps so far, maximum number of steps)

PROMPT_BUCKETS = (256, 512, 1024, 2048, 3072)  # tokens
TEXT_BUCKETS = (768, 1024, 2048, 3072)  # tokens to write
CODE_BUCKETS = (256, 512, 768, 1024, 1536, 2048, 3072)
_TEXT, _CODES = 1, 2  # folded into a song's key, for metadata and for audio codes


class Planner:
    """Writes metadata, captions, lyrics and audio codes. The result for a song depends only on the song and its seed,
    not on the batch, the mesh or the bucket. This is exact in float32; in bfloat16, rounding depends on the shape of
    the batch and may change the choice between two tokens that are nearly equally likely.

    Args:
        model: the language model, already on the mesh if there is one.
        tokenizer: tokenizer with the same vocabulary.
        mesh: mesh that songs are split over.

    Raises:
        InputError: if model and tokenizer have different vocabularies.
    """

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PlannerTokenizer, mesh: Mesh | None = None):
        config = model.planner
        theirs = config.first_code, config.eos_token_id
        ours = tokenizer.first_code, tokenizer.mark(Mark.END_OF_TURN)
        if theirs != ours:
            raise InputError(
                f"planner: its config has the first audio code at id {theirs[0]} and the end of a turn at {theirs[1]}, "
                f"its tokenizer at {ours[0]} and {ours[1]}; they belong to different checkpoints; "
                "use model and tokenizer of the same folder or repository"
            )
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh

    @functools.cached_property
    def grammar(self) -> Grammar:
        """The grammar of the tokenizer, compiled on first use."""
        return Grammar(self.tokenizer)

    @with_own_settings
    def write_metadata(
        self,
        known: Sequence[Known],
        *,
        mode: str = "generate",
        seeds: Sequence[int],
        sampling: LanguageSampling | None = None,
        rewrite_caption: bool = True,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Metadata]:
        """Return the metadata of songs. Given values of bpm, keyscale, timesignature, duration and language are kept,
        and the rest is written to match.

        Args:
            mode: `generate` writes metadata for a caption and lyrics, `inspire` a song for a query, `format` a new
                caption and lyrics, `understand` a description of audio codes.
            seeds: seed of each song, 0 to 2^32 - 1.
            sampling: sampling settings; guidance is not used.
            rewrite_caption: whether `generate` rewrites the caption, as the other modes always do. Without it, nothing
                is written for a song that has all of bpm, keyscale, timesignature and duration.
            on_progress: called regularly with the number of steps so far and the maximum number of steps.
            should_stop: called regularly; if it returns true, the work stops.

        Raises:
            InputError: if the mode is unknown, a prompt is too long, or there are no codes to understand.
            Cancelled: if `should_stop` returned true.
        """
        _check_count(known, seeds, "seeds")
        pieces = [prompts.metadata_prompt(mode, song) for song in known]
        caption = mode != "generate" or rewrite_caption
        found = [_given(song) for song in known]
        rows = [i for i, song in enumerate(known) if caption or not _is_complete(song)]
        if not rows:
            return found
        kinds = dict(caption=caption, genres=mode != "generate", lyrics=mode != "generate")
        limit, token_ids = self.grammar.longest(**kinds), [self._read(pieces[i], "caption, lyrics") for i in rows]
        count = self._padded(len(rows))
        prompt = _bucket(max(map(len, token_ids)), PROMPT_BUCKETS)
        inputs = generate.TextInputs(
            prompts=_prompts(token_ids, count, prompt),
            tables=self.grammar.tables,
            fixed=self.grammar.fixed_fields([known[rows[min(i, len(rows) - 1)]] for i in range(count)], **kinds),
            first=np.array(self.grammar.start, np.int32),
            targets=np.array([limit if i < len(rows) else 0 for i in range(count)], np.int32),
            keys=_keys([seeds[i] for i in rows], count, _TEXT),
            drawing=Drawing.of(sampling or LanguageSampling(), count),
        )
        texts = self._write(inputs, prompt + _bucket(limit, TEXT_BUCKETS), on_progress, should_stop)
        for i, ids in zip(rows, texts, strict=False):
            found[i] = _joined(known[i], parsing.parse(self.tokenizer, ids.tolist()), mode, caption)
        return found

    @with_own_settings
    def write_codes(
        self,
        known: Sequence[Known],
        metadata: Sequence[Metadata],
        *,
        seeds: Sequence[int],
        sampling: LanguageSampling | None = None,
        attempts: int = 1,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[np.ndarray]:
        """Return the audio codes of songs, [ceil(5 * duration)] int32 each; warn of songs whose codes loop.

        Args:
            known: as for `write_metadata`: the model reads the user's own caption and lyrics.
            metadata: metadata of the songs, with durations.
            seeds: seed of each song, 0 to 2^32 - 1.
            attempts: maximum number of attempts for a song whose codes loop. All attempts except the last end as soon
                as a loop is found; the other songs of the batch continue.
            on_progress: called regularly with the number of steps so far and the maximum number of steps.
            should_stop: called regularly; if it returns true, the work stops.

        Raises:
            InputError: if a prompt is too long, or a duration is unknown.
            Cancelled: if `should_stop` returned true.
        """
        _check_count(known, seeds, "seeds")
        _check_count(known, metadata, "metadata")
        if attempts < 1:
            raise InputError(f"attempts: expected at least 1, found {attempts}")
        if not known:
            return []
        sampling = sampling or LanguageSampling()
        lengths = [_count_codes(song) for song in metadata]
        padded = self._code_prompts(known, metadata, sampling)
        return self._sample_until_no_loop(padded, lengths, seeds, sampling, attempts, on_progress, should_stop)

    def _code_prompts(
        self, known: Sequence[Known], metadata: Sequence[Metadata], sampling: LanguageSampling
    ) -> generate.Prompts[np.ndarray]:
        """Return the prompts for audio codes, padded for their bucket and the mesh. With guidance, as many
        unconditional prompts follow them."""
        count = self._padded(len(known))
        conditional = [
            self._read(prompts.codes_prompt(song, its), "caption, lyrics")
            for song, its in zip(known, metadata, strict=True)
        ]
        unconditional = []
        if sampling.cfg_scale != 1:
            pieces = prompts.unconditional_codes_prompt(sampling.negative_prompt)
            unconditional.append(self._read(pieces, "negative_prompt"))
        size = _bucket(max(map(len, [*conditional, *unconditional])), PROMPT_BUCKETS)
        padded = [_prompts(part, count, size) for part in (conditional, unconditional) if part]
        return generate.Prompts(*(np.concatenate(arrays) for arrays in zip(*padded, strict=True)))

    def _sample_until_no_loop(
        self,
        padded: generate.Prompts[np.ndarray],
        lengths: Sequence[int],
        seeds: Sequence[int],
        sampling: LanguageSampling,
        attempts: int,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[np.ndarray]:
        """Return the codes of each song, [lengths[i]] int32; sample those that loop again, up to `attempts` times."""
        count = self._padded(len(lengths))
        slots = padded.tokens.shape[1] + _bucket(max(lengths), CODE_BUCKETS)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(lengths)
        pending = list(range(len(lengths)))
        for attempt in range(attempts):
            targets = np.zeros(count, np.int32)
            targets[pending] = [lengths[i] for i in pending]
            inputs = generate.CodeInputs(
                prompts=padded,
                targets=targets,
                keys=_keys(seeds, count, _CODES, attempt),
                drawing=Drawing.of(sampling, count),
                ends_in_loop=np.array(attempt + 1 < attempts),
            )
            written = self._write(inputs, slots, on_progress, should_stop)
            for i in pending:
                found[i] = written[i]
            loops = {i: loop for i in pending if (loop := find_loop(found[i]))}
            pending = list(loops)
            _warn_of_loops(loops, len(lengths), attempt, attempts)
            if not pending:
                break
        return found

    def _read(self, pieces: Pieces, what: str) -> np.ndarray:
        """Return the tokens of a prompt; raise InputError, naming `what`, if it is too long, or if it has codes that
        the model does not know."""
        ids, config = self.tokenizer.encode_pieces(pieces), self.model.planner
        if (highest := int(ids.max()) - config.first_code) >= config.num_codes:
            raise InputError(
                f"codes: this planner knows those from 0 to {config.num_codes - 1}, found {highest}; use the planner "
                "of the model whose codes they are"
            )
        if len(ids) > PROMPT_BUCKETS[-1]:
            what = "codes" if any(isinstance(piece, tuple) for piece in pieces) else what
            raise InputError(
                f"{what}: {len(ids)} tokens with the instruction, but the planner reads at most {PROMPT_BUCKETS[-1]}; "
                "shorten them"
            )
        return ids

    def _padded(self, count: int) -> int:
        """Return the smallest batch size of at least `count` songs that divides over the mesh."""
        size = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-count // size) * size

    def _write(
        self,
        inputs: generate.TextInputs | generate.CodeInputs,
        slots: int,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[np.ndarray]:
        """Return the tokens of each row of the batch, [n] int32 each."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if on_progress is None and should_stop is None:
                tokens, lengths = generate.write(self.model, inputs, slots=slots)
            else:
                tokens, lengths = generate.write_in_pieces(
                    self.model, inputs, slots=slots, on_progress=on_progress, should_stop=should_stop
                )
            rows, counts = on_host(tokens), on_host(lengths)
        return [np.array(row[:count], np.int32) for row, count in zip(rows, counts, strict=True)]


def _check_count(known: Sequence[Known], others: Sequence, name: str) -> None:
    if len(others) != len(known):
        raise InputError(f"{name}: expected {len(known)}, one for each song, found {len(others)}")


def _count_codes(song: Metadata) -> int:
    if song.duration is None:
        raise InputError("duration: unknown, but the number of audio codes depends on it; give a duration")
    return count_codes(song.duration)


def _bucket(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _prompts(ids: Sequence[np.ndarray], count: int, size: int) -> generate.Prompts[np.ndarray]:
    """Return prompts padded on the left to `size` tokens; the last one is repeated up to `count` rows."""
    tokens, start = np.zeros((count, size), np.int32), np.zeros(count, np.int32)
    for i in range(count):
        row = ids[min(i, len(ids) - 1)]
        start[i] = size - len(row)
        tokens[i, start[i] :] = row
    return generate.Prompts(tokens, start)


def _keys(seeds: Sequence[int], count: int, purpose: int, attempt: int = 0) -> jax.Array:
    """Return the keys of songs, [count], each derived only from its own seed."""
    found = []
    for i in range(count):
        key = jax.random.fold_in(noise.key(seeds[min(i, len(seeds) - 1)]), purpose)
        found.append(jax.random.fold_in(key, attempt) if attempt else key)
    return jax.numpy.stack(found)


def _is_complete(song: Known) -> bool:
    return None not in (song.bpm, song.keyscale, song.timesignature, song.duration)


def _given(song: Known) -> Metadata:
    """Return the values that the user gave, as metadata."""
    signature = song.timesignature
    return Metadata(
        caption=song.caption,
        lyrics=song.lyrics,
        bpm=fields.bpm(song.bpm),
        keyscale=song.keyscale,
        timesignature=None if signature is None else str(signature),
        duration=song.duration,
        language=song.language,
    )


def _joined(song: Known, written: Metadata, mode: str, caption: bool) -> Metadata:
    """Return the metadata of a song; the user's values take precedence. The lyrics are the user's unless `format`
    rewrites them; without any, they are the model's."""
    given = _given(song)
    lyrics = song.lyrics
    if mode != "generate" and (mode == "format" or not lyrics.strip()):
        lyrics = written.lyrics or lyrics
    return Metadata(
        caption=written.caption if caption and written.caption else given.caption,
        lyrics=lyrics,
        bpm=written.bpm if given.bpm is None else given.bpm,
        keyscale=given.keyscale or written.keyscale,
        timesignature=given.timesignature or written.timesignature,
        duration=written.duration if given.duration is None else given.duration,
        language=written.language if song.language is None else given.language,
        genres=written.genres,
    )


def _warn_of_loops(loops: dict[int, Loop], count: int, attempt: int, attempts: int) -> None:
    for i, loop in loops.items():
        name = "codes" if count == 1 else f"codes of song {i + 1}"
        then = "sampling them again" if attempt + 1 < attempts else "try another seed, or more attempts"
        logger.warning("%s: %s; %s", name, loop, then)
