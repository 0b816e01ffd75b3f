"""Prompt and lyric strings and their tokens, against diffusers and transformers."""

import logging

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from acestep_jax import InputError, Request
from acestep_jax.inputs.collate import pad_tokens
from acestep_jax.inputs.prompt import lyric_text, prompt_text, tokenize
from tests.qwen import SPLIT, real_vocabulary

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def qwen():
    """A tokenizer with Qwen's real vocabulary, which ends every text as that of Qwen3-Embedding does."""
    vocabulary, merges = real_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    assert end == 151643
    return tokenizer


CASES = [
    {},
    dict(bpm=120, keyscale="F# minor", timesignature="4"),
    dict(keyscale=" ", timesignature=""),
    dict(audio_duration=12.9),
    dict(instruction="Do it"),
    dict(instruction="Do it:"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strings_match_diffusers(case):
    arguments = dict(audio_duration=60.0) | case
    kind = pytest.importorskip("diffusers").AceStepPipeline
    theirs = kind.__new__(kind)
    text, words = theirs._format_prompt("piano & strings", "[verse]\nla", "fr", **arguments)
    assert prompt_text("piano & strings", **arguments) == text
    assert lyric_text("[verse]\nla", "fr") == words


def test_tokens_match_transformers(qwen):
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=qwen, pad_token="<|endoftext|>", padding_side="right"
    )
    words = lyric_text("[verse]\n你好，世界 ♪ naïve\n\n ", "zh")
    texts = [prompt_text("warm lofi piano, 80 bpm", audio_duration=30), words]
    want = theirs(texts, padding="longest", truncation=True, max_length=256, return_tensors="np")
    got = pad_tokens(tokenize(qwen, texts, max_length=256, what="prompt"), 1, 0)
    np.testing.assert_array_equal(got.mask, want.attention_mask.astype(bool))
    np.testing.assert_array_equal(np.where(got.mask, got.ids, 0), np.where(got.mask, want.input_ids, 0))
    assert got.ids[0][got.mask[0]][-1] == 151643  # the post-processor's end of text, after the template's own
    assert qwen.decode(got.ids[1][got.mask[1]]) == words.removesuffix("<|endoftext|>")


def test_truncation_matches_transformers_and_warns(qwen, caplog):
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=qwen, pad_token="<|endoftext|>", padding_side="right"
    )
    texts = ["short", "la " * 300]
    whole = len(qwen.encode(texts[1]).ids)
    want = theirs(texts, padding="longest", truncation=True, max_length=256, return_tensors="np")
    with caplog.at_level(logging.WARNING):
        got = pad_tokens(tokenize(qwen, texts, max_length=256, what="lyrics"), 64, 0)
    assert got.ids.shape == (2, 256)
    np.testing.assert_array_equal(got.ids[1], want.input_ids[1])
    assert caplog.messages == [f"lyrics: {whole} tokens, but the model reads 256: {whole - 256} are cut"]


METADATA = [
    (dict(bpm=70, keyscale="A minor"), dict(bpm=160, keyscale="E major")),
    (dict(timesignature="3"), dict(timesignature="4")),
    (dict(audio_duration=30), dict(audio_duration=200)),
]


@pytest.mark.parametrize("pair", METADATA, ids=str)
def test_a_long_caption_leaves_room_for_what_comes_after_it(qwen, pair, caplog):
    """It is cut at a word, to as much as fits, and what is lost is said; other values still make another text."""
    caption = "warm lofi piano, über crackle, " * 60
    found = []
    for values in pair:
        text = prompt_text(caption, **dict(audio_duration=60) | values)
        (ids,) = tokenize(qwen, [text], max_length=256, what="prompt")
        assert 250 <= len(ids) <= 256 and ids[-1] == 151643
        read = qwen.decode(ids)
        assert read.startswith(text.before) and read.endswith(text.after.removesuffix("<|endoftext|>\n") + "\n")
        kept = read.removeprefix(text.before).partition("\n\n# Metas")[0]
        assert caption.startswith(kept) and caption[len(kept)] == " "
        found.append(ids)
    assert not np.array_equal(*found)
    assert f"the caption is cut after {len(kept)} characters" in caplog.text and "the rest stays" in caplog.text


def test_as_in_diffusers_the_end_is_cut_and_what_is_lost_is_named(qwen, caplog):
    text = prompt_text("piano " * 300, audio_duration=60, bpm=70)
    (ids,) = tokenize(qwen, [text], max_length=256, what="prompt", keep_metadata=False)
    assert len(ids) == 256 and "bpm" not in qwen.decode(ids)
    assert "are cut, and with them caption, bpm, timesignature, keyscale, duration; shorten" in caplog.text
    caplog.clear()
    text = prompt_text("piano", audio_duration=60, instruction="do " * 300)
    assert len(tokenize(qwen, [text], max_length=256, what="prompt")[0]) == 256
    assert "and with them caption, bpm" in caplog.text


def test_a_caption_of_one_endless_word_is_cut_within_it(qwen):
    text = prompt_text("a1b2" * 300, audio_duration=60)
    (ids,) = tokenize(qwen, [text], max_length=256, what="prompt")
    assert 250 <= len(ids) <= 256 and "- duration: 60 seconds" in qwen.decode(ids)


def test_a_cut_is_the_librarys_own_and_leaves_the_tokenizer_alone(qwen):
    """Threads share the tokenizer: what one of them cuts must not cut the text of another, or let it be too long."""
    other = Tokenizer.from_str(qwen.to_str())
    text = "la 你好 naïve ♪<|endoftext|> x " * 20
    for most in (2, 3, 17, 256):
        other.enable_truncation(most)
        (got,) = tokenize(qwen, [text], max_length=most, what="lyrics")
        assert got.tolist() == other.encode(text).ids and len(got) <= most
    settings = ("enable_truncation", "no_truncation")

    class Shared:
        def __getattr__(self, name):
            assert name not in settings
            return getattr(qwen, name)

    tokenize(Shared(), [text], max_length=5, what="lyrics")


def test_padding_is_to_a_multiple(qwen):
    got = pad_tokens(tokenize(qwen, ["piano"], max_length=256, what="prompt"), 64, 0)
    assert got.ids.shape == (1, 64) and got.mask.sum() == len(qwen.encode("piano").ids)


BAD = {
    "prompt: it is empty": dict(prompt=" \n"),
    "bpm: expected 30 to 300": dict(bpm=0),
    "timesignature: expected one of 2, 3, 4, 6": dict(timesignature="5"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_metadata(message):
    with pytest.raises(InputError, match=message):
        prompt_text(**dict(prompt="x", audio_duration=60) | BAD[message])


def test_bad_text(qwen):
    with pytest.raises(InputError, match="prompt: not valid text"):
        tokenize(qwen, ["fine", "bad \udcff"], max_length=8, what="prompt")
    with pytest.raises(InputError, match="max_text_length: expected at least 1, found 0"):
        Request("fine", max_text_length=0)
