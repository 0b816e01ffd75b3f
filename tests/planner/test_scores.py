"""Scores of plans against a direct computation in torch."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as TorchQwen3

from acestep_jax.errors import InputError
from acestep_jax.models.config import PlannerConfig
from acestep_jax.planner import scores
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.tokenizer import Mark
from acestep_jax.planner.writer import Planner
from tests.parity import make_pair
from tests.planner import small

CODES = (3, 1, 4, 1, 5, 9, 2, 6)
PLAN = Plan(
    caption="Warm lofi piano, with rain.",
    lyrics="[Verse]\nWe sing. We dance.",
    audio_duration=120.0,
    vocal_language="en",
    bpm=90,
    keyscale="F# minor",
    timesignature="4",
    audio_codes=CODES,
)


@pytest.fixture(scope="module")
def pair():
    tokenizer = small.tokenizer()
    sizes = dict(
        vocab_size=tokenizer.first_code + small.CODES + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    theirs = TorchQwen3(Qwen3Config(**sizes, tie_word_embeddings=True, rope_theta=1e6))
    config = PlannerConfig(
        **sizes,
        first_code=tokenizer.first_code,
        num_codes=small.CODES,
        eos_token_id=tokenizer.mark(Mark.END_OF_TURN),
    )
    theirs, ours = make_pair("planner", theirs, config)
    return theirs, Planner(ours, tokenizer)


def direct(theirs, planner, user, target):
    """Log-probabilities and ranks of the target's tokens, from prompts that are written out."""
    encode, mark = planner.tokenizer.encode_pieces, Mark
    system = (
        "system\n# Instruction\nUnderstand the given musical conditions and describe the audio semantics accordingly:"
        "\n\n"
    )
    head = [mark.TURN, system, mark.END_OF_TURN, "\n", mark.TURN, "user\n", user, mark.END_OF_TURN, "\n"]
    context = encode([*head, mark.TURN, "assistant\n"])
    target = encode(target)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.concatenate([context, target])[None].astype(np.int64))).logits[0].double()
    logits = logits[len(context) - 1 : -1]
    own = logits.gather(1, torch.from_numpy(target[:, None].astype(np.int64)))
    return (own - logits.logsumexp(1, keepdim=True))[:, 0].numpy(), (1 + (logits > own).sum(1)).numpy()


def test_scores_are_those_of_a_direct_computation(pair):
    theirs, planner = pair
    found = scores.pmi_scores(planner, PLAN)
    think = lambda text: [Mark.THINK, f"\n{text}\n", Mark.END_OF_THINK, "\n"]  # noqa: E731
    words = {
        "caption": think("caption: Warm lofi piano, with rain."),
        "lyrics": [Mark.THINK, "\n", Mark.END_OF_THINK, "\n# Lyric\n[Verse]\nWe sing. We dance.\n"],
    }
    fields = {
        "bpm": think("bpm: 90"),
        "duration": think("duration: 120"),
        "keyscale": think("keyscale: F# minor"),
        "language": think("language: en"),
        "timesignature": think("timesignature: 4"),
    }
    assert list(found) == [*words, *fields]
    for name, target in words.items():
        given, plain = (direct(theirs, planner, user, target)[0].mean() for user in (CODES, "NO USER INPUT"))
        assert abs(given - plain) > 1e-4
        assert found[name] == pytest.approx(1 / (1 + np.exp(-(given - plain) / 0.1)), rel=1e-4)
    for name, target in fields.items():
        ranks = direct(theirs, planner, CODES, target)[1]
        assert found[name] == pytest.approx(sum(1 - (rank - 1) / 10 for rank in ranks if rank <= 10) / len(ranks))
    metadata = np.mean([found[name] for name in fields])
    expected = 0.5 * found["caption"] + 0.3 * found["lyrics"] + 0.2 * metadata
    assert scores.pmi_score(planner, PLAN) == pytest.approx(expected)


def test_parts_that_are_missing_do_not_count(pair):
    _, planner = pair
    found = scores.pmi_scores(planner, Plan(caption="Rain.", bpm=90, audio_codes=CODES))
    assert list(found) == ["caption", "bpm"]
    assert scores.total_score(found) == pytest.approx((0.5 * found["caption"] + 0.2 * found["bpm"]) / 0.7)


@pytest.mark.parametrize(
    ("plan", "message"), [(Plan(caption="Rain."), "no audio codes"), (Plan(caption="", audio_codes=CODES), "neither")]
)
def test_plans_without_codes_or_words_have_no_score(pair, plan, message):
    with pytest.raises(InputError, match=message):
        scores.pmi_score(pair[1], plan)


def test_extremes():
    assert scores.sigmoid(-1e4) == 0.0 and scores.sigmoid(1e4) == 1.0 and scores.sigmoid(0) == 0.5
    assert scores.rank_score(np.array([1, 10, 11, 3])) == pytest.approx((1 + 0.1 + 0 + 0.8) / 4)
