"""A tokenizer for prompts of composed music: byte-level BPE, like Qwen's, trained on such prompts."""

import itertools
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from acestep_jax.inputs.prompt import PAD

# Qwen's tokenizer splits digits; here a tempo is one token, so that a small network need not learn to combine digits.
_WORDS = r"\n+| ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z\d]+|\s"

MANY = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer that appends `<|endoftext|>` to every text; `texts` may contain it as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that every text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(alphabet), special_tokens=[PAD], show_progress=False
    )
    numbers = [f" {n}" for n in range(10, 301)] * MANY  # one token each, however rare in the texts
    tokenizer.train_from_iterator(itertools.chain(texts, numbers), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {PAD}", special_tokens=[(PAD, tokenizer.token_to_id(PAD))]
    )
    return tokenizer
