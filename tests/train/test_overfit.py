"""Training works from end to end: a small model overfits one clip and reproduces it."""

import numpy as np
import pytest

import acestep_jax.cli
from acestep_jax.io import audio
from acestep_jax.io.conversion import from_torch
from acestep_jax.train.data_folder import read_index, read_records
from acestep_jax.train.report import read_metrics
from tests import overfit
from tests.training import run_command

FIT = """
    --method full --steps 300 --report.log-every 10 --optimizer.learning-rate 3e-3 --optimizer.accumulation 1
    --examples.batch-size 2 --examples.text2music 1 --examples.repaint 0 --examples.cover 0
    --examples.validation-fraction 0 --objective.condition-dropout 0
""".split()


@pytest.mark.slow
def test_a_clip_is_overfitted_and_reproduced(tmp_path):
    torch_folder, native, songs, data, run = (tmp_path / name for name in ("torch", "native", "songs", "data", "run"))
    overfit.write_checkpoint(torch_folder)
    from_torch(torch_folder, native)
    clip = overfit.write_song(songs)
    assert not run_command("preprocess", songs, data, "--checkpoint", native, "--crop-seconds", 10)
    assert not run_command("fit", "--data", data, "--checkpoint", native, "--out", run, *FIT)

    losses = [row["loss"] for row in read_metrics(run)]
    assert losses[-1] <= losses[0] / 10

    index = read_index(data)
    (record,) = read_records(data / index.songs[0].shard, [0])
    assert (record["std"] < 2e-4).all()  # so that the loss is the model's, not the posterior's

    assert overfit.similarity(data, native) < 0.3
    assert overfit.similarity(data, run / "model") >= 0.95

    out = tmp_path / "song.wav"
    arguments = f"--checkpoint {run / 'model'} --out {out} --lyrics [Instrumental] --bpm 96 --time-signature 4 --seed 1"
    arguments = ["generate", overfit.CAPTION, *arguments.split(), "--duration", "10", "--key", overfit.KEY]
    assert not acestep_jax.cli.main(arguments)
    sound = audio.read(out, overfit.SAMPLE_RATE, 2)
    assert np.corrcoef(sound[0], clip[0])[0, 1] >= 0.9
