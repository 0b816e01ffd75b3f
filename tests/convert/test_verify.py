"""`python -m convert verify`: it passes for what is right, and fails for what is not."""

import pytest

from acestep_jax.convert import __main__ as command_line
from acestep_jax.convert import verify
from acestep_jax.io import rules
from acestep_jax.io.pretrained import open_checkpoint

STAGES = [
    "text encoder",
    "lyric embeddings",
    "condition encoder",
    "transformer",
    "autoencoder encode",
    "autoencoder decode",
    "audio tokenizer",
    "audio codes",
    "audio detokenizer",
]


@pytest.mark.slow
def test_tiny_checkpoint_passes(tiny, capsys):
    """A row for each stage, none of which compares nothing."""
    status = command_line.main(["verify", str(tiny[0])])
    out = capsys.readouterr().out
    print(out)
    header, *rows, footer = out.splitlines()
    assert [row[:24].strip() for row in rows] == STAGES
    assert all(abs(float(row.split()[-1]) - 1) < 1e-6 for row in rows)
    assert "FAILED" not in out and status == 0


def test_wrong_rule_is_found(tiny, monkeypatch, capsys):
    """A norm turned round on its way to JAX: the first stage differs, and so the command fails."""
    right = next(rule for rule in rules.RULES["text_encoder"] if rule.torch == "*input_layernorm.weight")
    others = tuple(rule for rule in rules.RULES["text_encoder"] if rule is not right)
    wrong = right._replace(to_jax=lambda x: x[::-1])
    monkeypatch.setitem(rules.RULES, "text_encoder", (*others, wrong))
    first = [next(verify.rows(open_checkpoint(tiny[0], dtype="float32")))]
    assert first[0].stage == "text encoder" and first[0].error > 0.01 and first[0].cosine < 0.999
    monkeypatch.setattr(verify, "rows", lambda opened: first)
    assert command_line.main(["verify", str(tiny[0])]) == 1
    assert "FAILED" in capsys.readouterr().out
