"""From songs to training data: the data equal those of torch and the pipeline, and nothing is encoded twice."""

import collections
import dataclasses
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderOobleck

from acestep_jax import InputError
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import pad_tokens
from acestep_jax.inputs.prepare import prepare
from acestep_jax.inputs.prompt import tokenize
from acestep_jax.io import checkpoint
from acestep_jax.io.files import as_path, files_below, upload
from acestep_jax.models.kernels import convolution
from acestep_jax.request import Request
from acestep_jax.train import data_folder, dataset, preprocess, records
from acestep_jax.train.config import TASKS
from acestep_jax.train.data_folder import crop_durations, fingerprint, read_index, read_records, text_key
from tests import cloud
from tests.parity import assert_close, normal
from tests.processes import ends, same_programs, start, together
from tests.training import error_of, run_command

RATE = 48000


load, known_fingerprint = functools.cache(preprocess._load), functools.cache(fingerprint)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Songs of a second or two in buckets of their size; a checkpoint is read once."""
    monkeypatch.setattr(preprocess, "_load", load)
    monkeypatch.setattr(data_folder, "fingerprint", known_fingerprint)
    monkeypatch.setattr(preprocess, "BUCKETS", dataclasses.replace(BUCKETS, frames=64))


@pytest.fixture
def work(monkeypatch):
    """How often each network ran."""
    done = collections.Counter()

    def count(name):
        function = getattr(preprocess, name)

        def counted(*arguments):
            done[name] += 1
            return function(*arguments)

        monkeypatch.setattr(preprocess, name, counted)

    count("_posterior")
    count("_hidden_states")
    return done


def write_song(folder, name, seconds=1.5, rate=RATE, channels=2, caption="a song", seed=0):
    """A song of noise, with a caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * normal(int(seconds * rate), channels, seed=seed), rate, subtype="FLOAT")
    if caption:
        path.with_suffix(".caption.txt").write_text(caption)
    return path


@pytest.fixture
def songs(tmp_path):
    """Four songs, one of them in a folder below."""
    folder = tmp_path / "audio"
    for i, name in enumerate(["a.wav", "b.wav", "c.wav", "more/d.wav"]):
        write_song(folder, name, 1.2 + 0.1 * i, caption=f"song {i}", seed=i)
    return folder


def run(tiny, folder, **options):
    return preprocess.preprocess(folder, folder.parent / "data", checkpoint=tiny[1], **options)


def record_of(folder, song):
    (record,) = read_records(folder.parent / "data" / song.shard, [song.row])
    return record


def listing(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder.parent / "data").iterdir()}


def test_posterior_is_that_of_torch(tiny, tmp_path, monkeypatch):
    """Of the whole song, at odd lengths, past one window and of one channel, in the buckets that are used."""
    monkeypatch.setattr(preprocess, "BUCKETS", BUCKETS)
    monkeypatch.setitem(convolution.TILE_FRAMES, "cpu", 150)
    folder = tmp_path / "audio"
    write_song(folder, "odd.wav", 2.34567)
    write_song(folder, "long.wav", 9.7)
    write_song(folder, "mono.wav", 2.0, channels=1)
    index = run(tiny, folder)
    theirs = AutoencoderOobleck.from_pretrained(tiny[0] / "vae").eval()
    assert [song.source for song in index.songs] == ["long.wav", "mono.wav", "odd.wav"]
    for song in index.songs:
        sound = soundfile.read(folder / song.source, dtype="float32", always_2d=True)[0].T
        assert song.seconds == sound.shape[1] / RATE
        with torch.no_grad():
            expected = theirs.encode(torch.from_numpy(np.broadcast_to(sound, (2, sound.shape[1])).copy())[None])
        record = record_of(folder, song)
        assert record["mean"].shape == record["std"].shape == (song.frames, index.latent_channels)
        assert song.frames == sound.shape[1] // 1920 and record["mean"].dtype == record["std"].dtype == np.float32
        assert_close(record["mean"], expected.latent_dist.mean[0].T.numpy())
        assert_close(record["std"], expected.latent_dist.std[0].T.numpy())


def test_texts_are_those_of_the_pipeline(tiny, tmp_path):
    """For each task and each length of crop, a song that is shorter than a crop has its own."""
    folder = tmp_path / "audio"
    lyrics = "[Verse]\nna na"
    known = dict(bpm=90, keyscale="A minor", timesignature="4")
    write_song(folder, "a.wav", 3.5, caption=None)
    side = "caption: slow piano\nbpm: 90\nkey: Am\nsignature: 4/4\nlang: de\ncustom_tag: zxq\nrepeat: 2\nlyrics:"
    (folder / "a.txt").write_text(f"{side}\n{lyrics}\n")
    index = run(tiny, folder, crop_seconds=(60.0, 2.5))
    (song,) = index.songs
    assert (song.caption, song.lyrics, song.language, song.repeat) == ("zxq, slow piano", lyrics, "de", 2)
    assert {name: getattr(song, name) for name in known} == known
    text_encoder, tokenizer = load(tiny[1], None, "text_encoder"), checkpoint.load_tokenizer(tiny[1])
    encode = jax.jit(lambda network, ids: network(ids))
    texts, seen = {}, {}
    for task in TASKS:
        for seconds in (2, 3):
            source = None if task == "text2music" else np.ones((2, seconds * 48_000), np.float32)
            asked = Request(song.caption, lyrics, None, "de", **known, task_type=task, src_audio=source)
            asked = dataclasses.replace(asked, audio_duration=10.0 if source is None else None)
            made = prepare(asked, checkpoint.read_manifest(tiny[1]).configs, tokenizer)
            text = tokenizer.decode(made.prompt_ids.tolist(), skip_special_tokens=False)
            text = text.removesuffix("<|endoftext|>")  # of the post-processor, which adds it again
            texts[task, seconds] = text.replace("10 seconds", f"{seconds} seconds")
    record = record_of(folder, song)
    for (task, duration), text in texts.items():
        tokens = pad_tokens(tokenize(tokenizer, [text], max_length=256, what="prompt"), 64, 0)
        hidden = np.asarray(encode(text_encoder, tokens.ids))
        seen[text_key(task, duration)] = hidden[0][tokens.mask[0]]
    assert record.keys() == {"mean", "std", "lyric_ids", *seen}
    for key, hidden in seen.items():
        assert_close(record[key], hidden, 1e-6)
    assert song.lyric_tokens == len(record["lyric_ids"]) and song.prompt_tokens == max(map(len, seen.values()))
    assert record["lyric_ids"].dtype == np.int32 and np.array_equal(record["lyric_ids"], made.lyric_ids)
    assert len({hidden.tobytes() for hidden in seen.values()}) == 6


@pytest.mark.slow
def test_bfloat16(tiny, tmp_path):
    """By default `tests/models` and `tests/io/test_checkpoint.py` show the networks in bfloat16."""
    folder = tmp_path / "audio"
    write_song(folder, "a.wav")
    index = run(tiny, folder, dtype="bfloat16")
    record = record_of(folder, index.songs[0])
    assert index.dtype == "bfloat16" and record["mean"].dtype == np.float32
    assert record[text_key("cover", 1)].dtype.name == "bfloat16"
    with pytest.raises(InputError, match="data: holds data of dtype bfloat16, but dtype is now float32"):
        run(tiny, folder)


def test_nothing_is_done_twice(tiny, songs, work, capsys):
    first = run(tiny, songs)
    assert "4 songs (4 encoded)" in capsys.readouterr().out
    assert [song.source for song in first.songs] == ["a.wav", "b.wav", "c.wav", "more/d.wav"]
    assert first == read_index(songs.parent / "data") and first.complete
    assert work == dict(_posterior=4, _hidden_states=4)
    before = listing(songs)
    os.utime(songs / "b.wav")  # another time, the same bytes
    touched = run(tiny, songs)
    assert [song.row for song in touched.songs] == [song.row for song in first.songs]
    before["index.json"] = listing(songs)["index.json"]
    capsys.readouterr()
    assert run(tiny, songs) == touched
    assert listing(songs) == before and "nothing to do" in capsys.readouterr().out
    assert work == dict(_posterior=4, _hidden_states=4)


def test_only_what_changed_is_encoded(tiny, songs, work, monkeypatch, capsys):
    monkeypatch.setattr(records, "SHARD_SONGS", 2)
    first = {song.source: song for song in run(tiny, songs).songs}
    kept = record_of(songs, first["a.wav"])
    work.clear()
    (songs / "a.caption.txt").write_text("another caption")  # new text
    write_song(songs, "b.wav", 1.9, caption="song 1", seed=7)  # new sound
    (songs / "c.wav").rename(songs / "e.wav")  # moved
    (songs / "c.caption.txt").rename(songs / "e.caption.txt")
    (songs / "more" / "d.wav").unlink()  # gone
    write_song(songs, "f.wav", seed=9)  # new
    index = run(tiny, songs)
    assert work == dict(_posterior=2, _hidden_states=3)
    found = {song.source: song for song in index.songs}
    assert list(found) == ["a.wav", "b.wav", "e.wav", "f.wav"]
    new = record_of(songs, found["a.wav"])
    assert np.array_equal(new["mean"], kept["mean"]) and np.array_equal(new["std"], kept["std"])
    assert found["a.wav"].caption == "another caption"
    key = text_key("text2music", 1)
    assert new[key].shape != kept[key].shape or not np.array_equal(new[key], kept[key])
    assert (found["e.wav"].shard, found["e.wav"].row) == (first["c.wav"].shard, first["c.wav"].row)
    assert record_of(songs, found["b.wav"])["mean"].shape[0] == found["b.wav"].frames == 47
    # The first shard, which a and b have left, is gone.
    shards = {song.shard for song in index.songs}
    assert first["a.wav"].shard not in shards and set(listing(songs)) == {"index.json", *shards}
    assert "4 songs (1 with new texts, 2 encoded, 1 as before)" in capsys.readouterr().out


def test_new_crops_encode_only_the_text(tiny, songs, work):
    """Songs of less than two seconds have the same prompts for either, so that nothing is done for them."""
    first = run(tiny, songs)
    work.clear()
    assert run(tiny, songs, crop_seconds=(1.0, 60.0)).songs == first.songs and not work
    write_song(songs, "long.wav", 3.2)
    run(tiny, songs)
    work.clear()
    index = run(tiny, songs, crop_seconds=(2.0, 1.0))
    assert work == dict(_hidden_states=1) and index.crop_seconds == (1.0, 2.0)
    long = next(song for song in index.songs if song.source == "long.wav")
    texts = {key for key in record_of(songs, long) if key.startswith("text.")}
    assert texts == {text_key(task, d) for task in TASKS for d in crop_durations(3.2, (1.0, 2.0))}


def test_another_cut_of_long_prompts_encodes_these(tiny, songs, work, monkeypatch):
    """Songs whose prompts are read whole stay."""
    (songs / "a.caption.txt").write_text("piano and " * 200)
    first = {song.source: song for song in run(tiny, songs).songs}
    assert run(tiny, songs).songs == tuple(first.values())
    work.clear()
    monkeypatch.setattr(preprocess, "CUT_RULE", preprocess.CUT_RULE + 1)
    found = {song.source: song for song in run(tiny, songs).songs}
    assert work == dict(_hidden_states=1)
    changed = [name for name in found if found[name].text_sha256 != first[name].text_sha256]
    assert changed == ["a.wav"]


def test_a_new_repeat_encodes_nothing(tiny, songs, work):
    run(tiny, songs)
    work.clear()
    (songs / "a.txt").write_text("repeat: 3")
    assert [song.repeat for song in run(tiny, songs).songs] == [3, 1, 1, 1] and not work


KILLED = """
import os, signal, sys
from acestep_jax.train import preprocess, records
records.SHARD_SONGS = 1
posterior, count = preprocess._posterior, iter(range(99))
def fatal(*arguments):
    if next(count) == 2:
        open(os.path.join(sys.argv[2], ".acestep-x.array_record"), "w").write("begun")
        os.kill(os.getpid(), signal.SIGKILL)
    return posterior(*arguments)
preprocess._posterior = fatal
preprocess.preprocess(sys.argv[1], sys.argv[2], checkpoint=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_and_resumed(tiny, songs, work):
    """Of four songs two were done; the result is that of an undisturbed run."""
    data = songs.parent / "data"
    command = [sys.executable, "-c", KILLED, songs, data, tiny[1]]
    done = subprocess.run(command, capture_output=True, env=os.environ | same_programs())
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputError, match="interrupted; .* resumes it"):
        read_index(data)
    assert [song.source for song in read_index(data, unfinished=True).songs] == ["a.wav", "b.wav"]
    index = run(tiny, songs)
    assert work == dict(_posterior=2, _hidden_states=2)
    assert set(listing(songs)) == {"index.json", *(song.shard for song in index.songs)}
    alone = preprocess.preprocess(songs, songs.parent / "alone", checkpoint=tiny[1])
    for ours, theirs in zip(index.songs, alone.songs, strict=True):
        assert (ours.source, ours.sha256, ours.text_sha256) == (theirs.source, theirs.sha256, theirs.text_sha256)
        expected = next(read_records(songs.parent / "alone" / theirs.shard, [theirs.row]))
        for name, array in record_of(songs, ours).items():
            assert_close(array, expected[name], 1e-6)


def test_interrupted_while_texts_change(tiny, songs, work, monkeypatch):
    """What was done is written, and what was not yet looked at is still known for the next run."""
    run(tiny, songs)
    hidden = preprocess._hidden_states

    def interrupt(*arguments):
        if work["_hidden_states"] == 2:
            raise KeyboardInterrupt
        return hidden(*arguments)

    work.clear()
    monkeypatch.setattr(preprocess, "_hidden_states", interrupt)
    for file in songs.rglob("*.caption.txt"):
        file.write_text("changed")
    with pytest.raises(KeyboardInterrupt):
        run(tiny, songs)
    monkeypatch.setattr(preprocess, "_hidden_states", hidden)
    assert [song.caption for song in run(tiny, songs).songs] == ["changed"] * 4
    assert work == dict(_hidden_states=4)


def test_links_are_followed_and_every_other_file_is_named(tiny, songs, work, capsys):
    """An album elsewhere that is linked here, a link to the folder itself, and one to a folder that is here anyway."""
    elsewhere = songs.parent / "elsewhere"
    write_song(elsewhere, "album/e.wav")
    (elsewhere / "album" / "E_LYRICS.TXT").write_text("la la")
    (elsewhere / "album" / "notes.md").write_text("x")
    (songs / "album").symlink_to(elsewhere / "album")
    (songs / "loop").symlink_to(songs)
    (songs / "again").symlink_to(songs / "more")
    (songs / "linked.wav").symlink_to(songs / "a.wav")
    (songs / "dead.wav").symlink_to(songs / "nothing.wav")
    (songs / "nobody.txt").write_text("x")
    assert run_command("preprocess", songs, songs.parent / "data", "--checkpoint", tiny[1]) == 0
    index = read_index(songs.parent / "data")
    assert [song.source for song in index.songs] == [
        *("a.wav", "album/e.wav", "b.wav", "c.wav", "linked.wav", "more/d.wav")
    ]
    assert index.songs[1].lyrics == "la la"
    out = capsys.readouterr().out
    assert "3 other file(s) not used:\n  album/notes.md\n  dead.wav\n  nobody.txt\n" in out


def test_unusable_files_are_skipped(tiny, songs, work, capsys):
    """With the reason, in the index and at the end."""
    (songs / "bad.mp3").write_bytes(b"garbage" * 100)
    write_song(songs, "short.wav", 0.5)
    soundfile.write(songs / "silent.wav", np.full((RATE * 2, 2), 5e-5), RATE, subtype="FLOAT")
    broken = np.zeros((RATE * 2, 2))
    broken[5] = np.nan
    soundfile.write(songs / "nan.wav", broken, RATE, subtype="FLOAT")
    soundfile.write(songs / "wide.wav", np.ones((RATE * 2, 6)), RATE)
    (songs / "b.caption.txt").write_bytes(b"caf\xe9")
    write_song(songs, "04 Nameless.wav", caption=None)
    (songs / "a.txt").write_text("bpm: 90\nmood: sad")
    write_song(songs, "fast.wav")
    (songs / "fast.txt").write_text("bpm: 999")
    (songs / "c.lyrics.txt").write_text("la" * 3000)
    (songs / ".hidden.wav").write_bytes(b"")
    (songs / "cover.jpg").write_bytes(b"")
    shutil.copy(songs / "a.wav", os.fsencode(songs) + b"/caf\xe9.wav")
    assert run_command("preprocess", songs, songs.parent / "data", "--checkpoint", tiny[1]) == 0
    index = read_index(songs.parent / "data")
    assert [song.source for song in index.songs] == ["04 Nameless.wav", "a.wav", "c.wav", "more/d.wav"]
    reasons = dict(index.skipped)
    assert list(reasons) == [
        *("b.wav", "bad.mp3", "caf\\udce9.wav", "fast.wav", "nan.wav", "short.wav", "silent.wav", "wide.wav")
    ]
    words = dict(
        b="b.caption.txt: not UTF-8",
        bad="Format not recognised",
        caf="is not UTF-8; rename it",
        fast="fast.txt: bpm: expected 30 to 300 beats per minute, found '999'; correct or remove it",
        nan="2 of 192000 samples are NaN",
    )
    words |= dict(short="too short: 0.50 s", silent="silent: its peak is 5.0e-05", wide="6 channels, expected 1 or 2")
    out = capsys.readouterr().out
    for (source, reason), word in zip(reasons.items(), words.values(), strict=True):
        assert word in reason and f"  {source}: {reason}" in out
    assert "4 songs (4 encoded)" in out and "skipped 8 file(s):" in out
    assert "no caption for 1 song(s), used the file name:\n  04 Nameless.wav" in out
    assert index.songs[0].caption == "Nameless"
    assert "1 value(s) ignored:" in out and "a.txt: unknown key 'mood'" in out
    assert "1 other file(s) not used:\n  cover.jpg" in out and "3 song(s) without lyrics" in out
    assert len(record_of(songs, index.songs[2])["lyric_ids"]) == 2048
    work.clear()
    assert run(tiny, songs) == index and not work


def test_full_disk(tiny, songs, work, monkeypatch):
    """Really so: no file may grow beyond 20 kB. What was written before is kept, nothing is half there."""
    run(tiny, songs)
    before, index = listing(songs), read_index(songs.parent / "data")
    write_song(songs, "e.wav", 5.0, seed=9)
    (songs / "e.lyrics.txt").write_text("la " * 600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match="songs-00001.array_record: the disk is full; free some space and run"):
            run(tiny, songs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(songs) == before and read_index(songs.parent / "data") == index
    work.clear()
    assert len(run(tiny, songs).songs) == 5 and work["_posterior"] == 1


def test_another_checkpoint(tiny, songs, tmp_path):
    run(tiny, songs)
    before = listing(songs)
    shutil.copytree(tiny[1], tmp_path / "other")
    with open(tmp_path / "other" / "tokenizer.json", "a") as file:
        file.write("\n")
    heads = fingerprint(tiny[1])[:12], fingerprint(tmp_path / "other")[:12]
    message = f"data: holds data of checkpoint {heads[0]}, but checkpoint is now {heads[1]}; .* another DATA_DIR"
    with pytest.raises(InputError, match=message):
        preprocess.preprocess(songs, tmp_path / "data", checkpoint=tmp_path / "other")
    assert listing(songs) == before


def everything_bad(audio):
    shutil.rmtree(audio)
    audio.mkdir()
    (audio / "bad.mp3").write_bytes(b"garbage")


def nothing(audio):
    shutil.rmtree(audio)
    audio.mkdir()
    (audio / "notes.txt").write_text("")


COMMANDS = {
    "empty folder": (nothing, ["{audio}", "{data}"], "audio: no audio files here or below; expected .aac"),
    "all skipped": (everything_bad, ["{audio}", "{data}"], "none of 1 audio files can be used:\n  bad.mp3: not a"),
    "no folder": (None, ["{data}", "{data}"], "data: no such folder; expected one with songs"),
    "data is a file": (None, ["{audio}", "{audio}/a.wav"], "a.wav: is a file"),
    "data in no folder": (None, ["{audio}", "{data}/deep"], "deep: the folder "),
    "crop": (None, ["{audio}", "{data}", "--crop-seconds", "60", "601"], "expected 1 to 600 seconds, found [60.0, 601"),
    "no crop": (None, ["{audio}", "{data}", "--crop_seconds", "0"], "--crop-seconds: expected 1 to 600"),
    "dtype": (None, ["{audio}", "{data}", "--dtype", "int8"], "use one of float32, bfloat16, float16"),
    "checkpoint": (None, ["{audio}", "{data}", "--checkpoint", "{audio}"], "audio: not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_errors_are_messages(tiny, songs, capsys, case):
    prepare, options, message = COMMANDS[case]
    if prepare:
        prepare(songs)
    filled = [option.format(audio=songs, data=songs.parent / "data") for option in options]
    if "--checkpoint" not in filled:
        filled += ["--checkpoint", str(tiny[1])]
    assert message in error_of(capsys, "preprocess", *filled)
    assert not (songs.parent / "data").exists()


def test_interruption_is_a_message(tiny, songs, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "preprocess", interrupt)
    assert run_command("preprocess", songs, "data", "--checkpoint", tiny[1]) == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_data_of_one(tiny, songs, tmp_path):
    """Bit for bit, also where a song cannot be used, one has new texts, and one was there before.

    By default one process shows all of this, killed and resumed; two processes meet in `test_distributed_processes.py`.
    """
    (songs / "broken.wav").write_text("not music")
    run(tiny, songs)
    for name in ("alone", "shared"):
        shutil.copytree(songs.parent / "data", tmp_path / name)
    (songs / "a.caption.txt").write_text("another text")
    for seed, name in enumerate("uvwxyz"):
        write_song(songs, f"{name}.wav", seed=9 + seed)
    words = ["train", "preprocess", songs, tmp_path / "shared", "--checkpoint", tiny[1]]
    made = together(*words, devices=2)
    assert [status for status, *_ in made] == [0, 0], made
    one = start("train", "preprocess", songs, tmp_path / "alone", "--checkpoint", tiny[1])
    assert ends([one])[0][0] == 0
    assert "10 songs (1 with new texts, 3 as before, 6 encoded)" in made[0][1]
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}


def test_songs_and_data_in_cloud_storage(tiny, songs, work, monkeypatch):
    """The records are those of a folder, and a second run finds them."""
    bucket = cloud.use(monkeypatch)
    (songs / "b.txt").write_text("\ufeffbpm: 90\nlyrics:\nla", encoding="utf-8")
    for name in files_below(songs):
        upload(songs / name, as_path("gs://music/songs") / name)
    index = preprocess.preprocess("gs://music/songs", "gs://music/data", checkpoint=tiny[1])
    local = run(tiny, songs)
    assert [song.bpm for song in index.songs] == [None, 90, None, None]
    assert {name for name in bucket if "data" in name} == {f"/music/data/{name}" for name in listing(songs)}
    for ours, theirs in zip(index.songs, local.songs, strict=True):
        assert (ours.source, ours.text_sha256, ours.shard, ours.row) == (
            (theirs.source, theirs.text_sha256, theirs.shard, theirs.row)
        )
    shard = index.songs[0].shard
    assert bucket[f"/music/data/{shard}"].getvalue() == (songs.parent / "data" / shard).read_bytes()
    work.clear()
    assert preprocess.preprocess("gs://music/songs", "gs://music/data", checkpoint=tiny[1]) == index and not work
    records_of = dataset.Records(as_path("gs://music/data"), index.songs)
    assert records_of[1][1]["lyric_ids"].size == index.songs[1].lyric_tokens


@pytest.mark.slow
def test_two_processes_share_cloud_storage(tiny, songs, tmp_path):
    """Songs and data: both read and write there at once, as one process does in a folder."""
    local = run(tiny, songs)
    (tmp_path / "buckets").mkdir()
    bucket = cloud.Objects(tmp_path / "buckets")
    for name in files_below(songs):
        shutil.copyfile(songs / name, bucket._file(f"/music/songs/{name}"))
    words = [tmp_path / "buckets", "train", "preprocess", "gs://music/songs", "gs://music/data"]
    for expected in ("4 songs (4 encoded)", "nothing to do"):
        made = together(*words, "--checkpoint", tiny[1], code=cloud.SHARED_COMMAND, devices=1)
        assert [status for status, *_ in made] == [0, 0], made
        assert expected in made[0][1]
    assert {name for name in bucket if "/data/" in name} == {f"/music/data/{name}" for name in listing(songs)}
    (shard,) = {song.shard for song in local.songs}
    (tmp_path / shard).write_bytes(bucket[f"/music/data/{shard}"].getvalue())
    rows = [song.row for song in local.songs]
    for ours, theirs in zip(*(read_records(f / shard, rows) for f in (tmp_path, songs.parent / "data")), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():  # in other buckets, which round differently
            assert_close(ours[name], value, 1e-5)


def test_sigterm_ends_after_the_song_in_flight(tiny, songs, work, monkeypatch, capsys):
    """With the status of a process that the signal has killed; the same command encodes the rest."""
    whole = preprocess._posterior

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(preprocess, "_posterior", terminated)
    command = ["preprocess", songs, songs.parent / "data", "--checkpoint", tiny[1]]
    assert run_command(*command) == 143
    assert "SIGTERM; the same command resumes" in capsys.readouterr().err
    assert [song.source for song in read_index(songs.parent / "data", unfinished=True).songs] == ["a.wav"]
    monkeypatch.setattr(preprocess, "_posterior", whole)
    work.clear()
    assert run_command(*command) == 0 and work["_posterior"] == 3
    assert len(read_index(songs.parent / "data").songs) == 4
