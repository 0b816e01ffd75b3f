"""Planning in the pipeline, the command line and JSONL: what is planned, what wins, and what the song is made of."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError, Plan, Planning, Request, Sampling, cli, planning
from acestep_jax.planner.metadata import Metadata
from acestep_jax.planner.tokenizer import Mark
from acestep_jax.request import split
from acestep_jax.serve import jsonl
from acestep_jax.song import Song
from tests.planner import small

WORDS = dict(caption="a caption of its own", bpm=70, keyscale="A minor", timesignature="3", duration=10, language="en")


class Scripted:
    """In place of a language model: writes the same words, and codes that tell the seed. Keeps what it was told."""

    def __init__(self):
        self.told = []

    def write_metadata(self, known, *, mode, seeds, sampling, rewrite_caption=True, **_):
        self.told.append(dict(known=list(known), mode=mode, seeds=list(seeds), rewrite_caption=rewrite_caption))
        self.sampling = sampling
        return [self.words(song, rewrite_caption) for song in known]

    def words(self, song, rewrite_caption):
        own = {f: getattr(song, f) for f in ("bpm", "keyscale", "timesignature", "duration", "language")}
        given = {name: value for name, value in own.items() if value is not None}
        caption = WORDS["caption"] if rewrite_caption else song.caption
        return Metadata(**(WORDS | given | dict(caption=caption, lyrics=song.lyrics or "[Instrumental]")))

    def write_codes(self, known, metadata, *, seeds, **_):
        self.coded = list(known), list(metadata)
        return [
            np.arange(int(5 * words.duration), dtype=np.int32) + seed % 7
            for words, seed in zip(metadata, seeds, strict=True)
        ]


@pytest.fixture(scope="module")
def loaded(tiny):
    return AceStepPipeline.from_pretrained(tiny[1])


@pytest.fixture
def pipe(loaded):
    loaded.planner = Scripted()
    yield loaded
    loaded.planner = None


def songs(pipe, *args, **keywords):
    return pipe(*args, num_inference_steps=1, output_type="latent", **keywords)


def test_a_request_is_planned_and_the_user_wins(pipe):
    planned = pipe.planned([Request("prompt", "[Verse]\nla", bpm=90, seed=3)], Planning(thinking=True), Sampling())
    ((request, plan),) = planned
    assert (request.prompt, request.lyrics) == (WORDS["caption"], "[Verse]\nla")
    assert (request.bpm, request.keyscale, request.timesignature, request.vocal_language) == (90, "A minor", "3", "en")
    assert request.seed == 3 and plan.lm_seed == 3 and plan.prompt == "prompt"
    assert plan.audio_codes == tuple(range(3, 53)) and pipe.planner.told[0]["mode"] == "generate"
    known, written = pipe.planner.coded
    assert known[0].caption == "prompt" and written[0].caption == WORDS["caption"]  # as the model was trained


def test_the_song_is_that_of_its_plan(pipe):
    song = songs(pipe, "prompt", seed=3, thinking=True)[0]
    again = songs(pipe, song.plan, seed=3)[0]
    np.testing.assert_array_equal(song.latents, again.latents)
    assert song.seed == 3 and len(song.latents) == 250 and again.plan is None
    direct = songs(pipe, song.plan.request(Request("", seed=3)))[0]
    np.testing.assert_array_equal(song.latents, direct.latents)


def test_a_plan_is_not_planned_again(pipe):
    """Without codes the transformer gets its words alone, unless it is asked for."""
    words = Plan(caption="mine", audio_duration=10)
    assert songs(pipe, words, seed=3)[0].plan is None and not pipe.planner.told
    assert songs(pipe, words, seed=3, thinking=True)[0].plan is not None


def test_a_song_is_as_long_as_was_said(pipe):
    """Codes are five a second, of the duration rounded up; the song ends before the last one does."""
    song = songs(pipe, "prompt", seed=3, audio_duration=10.1)[0]
    assert len(song.plan.audio_codes) == 50 and len(song.latents) == 250  # the scripted one writes less
    padded = dataclasses.replace(song.plan, audio_codes=song.plan.audio_codes + (1,))
    assert len(songs(pipe, padded, seed=3)[0].latents) == 253


def test_noise_of_ones_own_is_not_planned(pipe):
    noise = np.zeros((250, pipe.transformer.config.audio_acoustic_hidden_dim), np.float32)
    assert songs(pipe, "prompt", latents=noise[None], audio_duration=10)[0].plan is None


def test_without_an_audio_tokenizer(loaded, caplog):
    networks = {name: getattr(loaded, name) for name in "transformer condition_encoder text_encoder vae".split()}
    without = AceStepPipeline(**networks, tokenizer=loaded.tokenizer)
    without.planner = Scripted()
    song = songs(without, "prompt", seed=3)[0]
    assert song.plan.caption == WORDS["caption"] and not song.plan.audio_codes and "only text, no codes" in caplog.text


def test_what_the_planner_cannot_read_is_made_without_it(pipe, monkeypatch, caplog):
    def refuse(*_, **__):
        raise InputError("caption: 4000 tokens")

    monkeypatch.setattr(pipe.planner, "write_metadata", refuse)
    assert pipe.planned([Request("a", seed=0)], Planning(), Sampling())[0][1] is None
    assert "made without the planner (caption: 4000 tokens)" in caplog.text
    with pytest.raises(InputError, match="4000 tokens"):
        pipe.planned([Request("a", seed=0)], Planning(thinking=True), Sampling())


def test_a_seed_of_ones_own_for_the_plan(pipe):
    """Song i of lm_seed s has the plan of s + i; without one, the plan has the seed of the song, also a new one."""
    pipe.planned([Request("a", seed=1), Request("b", seed=1)], Planning(thinking=True, lm_seed=8), Sampling())
    assert pipe.planner.told[0]["seeds"] == [8, 9]
    ((request, plan),) = pipe.planned([Request("a")], Planning(thinking=True), Sampling())
    assert request.seed == plan.lm_seed is not None


@pytest.mark.parametrize(
    ("planning", "sampling", "expected"),
    [
        (dict(), dict(), True),
        (dict(thinking=False), dict(), False),
        (dict(), dict(compat="diffusers"), False),
        (dict(thinking=True), dict(compat="diffusers"), True),
    ],
)
def test_who_thinks_by_default(pipe, planning, sampling, expected):
    ((_, plan),) = pipe.planned([Request("a", seed=0)], Planning(**planning), Sampling(**sampling))
    assert (plan is not None) == expected


def test_without_a_planner(loaded):
    """Nothing is planned by itself, and what is asked for is an error that says where planners are."""
    assert loaded.planned([Request("a", seed=0)], Planning(), Sampling()) == [(Request("a", seed=0), None)]
    with pytest.raises(InputError, match="acestep-5Hz-lm"):
        loaded.planned([Request("a", seed=0)], Planning(thinking=True), Sampling())
    with pytest.raises(InputError, match="acestep-5Hz-lm"):
        loaded.plan("a song")


def test_other_tasks_are_not_planned(pipe, caplog):
    """By themselves without a word; with one, if it was asked for."""
    requests = [
        Request("a", task_type="cover", audio_codes="<|audio_code_1|>" * 50),
        Request("a", audio_codes="<|audio_code_1|>" * 50),
        Request("a", task_type="repaint", src_audio=np.zeros((2, 480000), np.float32)),
    ]
    assert [plan for _, plan in pipe.planned(requests, Planning(), Sampling())] == [None] * 3 and not caplog.text
    planned = pipe.planned([*requests, Request("b", seed=0)], Planning(thinking=True), Sampling())
    assert [plan is None for _, plan in planned] == [True] * 3 + [False]
    assert "3 of 4 songs are generated without the planner" in caplog.text


def test_wishes(pipe):
    plan = pipe.plan("a sad song about the sea", lm_seed=5, bpm=99)
    told = pipe.planner.told[0]
    assert told["mode"] == "inspire" and told["known"][0].caption == "a sad song about the sea" and plan.bpm == 99
    assert pipe.planner.coded[0][0].caption == WORDS["caption"]  # what it wrote is the request now
    assert pipe.plan("x", instrumental=True, codes=False).audio_codes == ()
    assert pipe.planner.told[1]["known"][0].instrumental
    two = pipe.plan(["x", "y"], lm_seed=5)
    assert [p.lm_seed for p in two] == [5, 6]
    pipe.plan("ballad", lyrics="[Verse]\nla")
    assert pipe.planner.told[-1]["mode"] == "generate"
    changed = pipe.plan(dataclasses.replace(plan, caption="mine", audio_codes=()), lm_seed=5)
    assert (changed.caption, changed.prompt) == ("mine", plan.prompt) and changed.audio_codes == plan.audio_codes
    assert [p.lm_seed for p in pipe.plan(["x", "x"], seed=3)] == [3, 4]
    assert pipe.rewrite("x", "la la", bpm=90).bpm == 90 and pipe.planner.told[-1]["mode"] == "format"
    for bad, message in (
        (dict(wish=Request("x"), bpm=90), "bpm: prompt 0 is a Request, which has its own"),
        (dict(wish="x", shift=3), "shift: says how a song is sampled"),
        (dict(wish=["x", Request("y")]), "found several kinds"),
        (dict(wish="x", codes=False, best_of=2), "best_of: plans are compared by their codes"),
        (dict(wish="x", lm_temprature=1), "did you mean lm_temperature"),
        (dict(wish="x", lm_top_p=2), "lm_top_p: expected 0 to 1"),
        (dict(wish="x", lm_top_p=0), "lm_top_p: expected a number above 0"),
        (dict(wish="x", instrumental=True, lyrics="la"), "instrumental, lyrics: expected one of them"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.plan(**bad)


def test_sampling_of_the_planner(pipe):
    """Wishes are drawn from all tokens, captions and codes from the likeliest, unless it is said."""
    pipe.plan("x", codes=False)
    assert pipe.planner.sampling.top_p == 1
    pipe.plan(Request("x"), codes=False)
    assert pipe.planner.sampling.top_p == 0.9
    pipe.plan("x", codes=False, lm_top_p=0.5, lm_temperature=0, lm_top_k=3)
    sampling = pipe.planner.sampling
    assert (sampling.top_p, sampling.temperature, sampling.top_k) == (0.5, 0, 3)


def test_captions_and_adapters(pipe, monkeypatch, caplog):
    monkeypatch.setattr(AceStepPipeline, "adapters", {"mine": 1.0})
    pipe.planned([Request("a", seed=0)], Planning(), Sampling())
    assert "use_cot_caption=False keeps it" in caplog.text
    ((request, _),) = pipe.planned([Request("a", seed=0)], Planning(use_cot_caption=False), Sampling())
    assert request.prompt == "a" and not pipe.planner.told[-1]["rewrite_caption"]


def test_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    """plan writes what generate reads; --think and --no-think."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny[1])]
    assert cli.main(["plan", "a sad song", *model]) == 2 and "no planner here" in capsys.readouterr().err
    monkeypatch.setattr(AceStepPipeline, "_planner", Scripted())
    assert cli.main(["plan", "a sad song", "--bpm", "80", "--lm-seed", "4", "--out", "plan.json", *model]) == 0
    plan = Plan.load("plan.json")
    assert plan.bpm == 80 and plan.lm_seed == 4 and len(plan.audio_codes) == 50
    assert "bpm: 80" in capsys.readouterr().out
    assert cli.main(["plan", "x", "--out", "plan.json", *model]) == 2
    assert "plan.json: already exists" in capsys.readouterr().err
    assert cli.main(["rewrite", "x", *model]) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == WORDS["caption"]
    quick = ["--steps", "1", "--seed", "4", *model]
    assert cli.main(["generate", "--plan", "plan.json", "--out", "a.wav", *quick]) == 0
    assert cli.main(["generate", "--think", "a sad song", "--bpm", "80", "--out", "b.wav", *quick]) == 0
    assert "caption: a caption of its own" in capsys.readouterr().out
    assert cli.main(["generate", "--no-think", "a sad song", "--duration", "10", "--out", "c.wav", *quick]) == 0
    a, b, c = ((tmp_path / f"{name}.wav").read_bytes() for name in "abc")
    assert len(a) == len(b) == len(c) and b != c
    assert cli.main(["generate", "x", "--plan", "plan.json", *quick]) == 2
    assert "PROMPT, --plan: expected one of them" in capsys.readouterr().err


def test_jsonl(tiny, tmp_path, monkeypatch, capsys):
    planner = Scripted()
    monkeypatch.setattr(AceStepPipeline, "_planner", planner)
    lines = [
        dict(prompt="a", seed=1),
        dict(prompt="b", seed=2, thinking=False, audio_duration=10),
        dict(prompt="c", seed=3),
        dict(prompt="d", audio_duration=5),
        dict(prompt="e", lm_seed=9),
        dict(prompt="f", lm_seed=9),
    ]
    (tmp_path / "songs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["generate", "--batch", str(tmp_path / "songs.jsonl"), "--out-dir", str(tmp_path / "out")]
    assert cli.main([*words, "--steps", "1", "--model", str(tiny[1])]) == 1
    assert "songs.jsonl:4: audio_duration" in capsys.readouterr().err
    found = [json.loads((tmp_path / "out" / f"0000{i}.json").read_text()) for i in (1, 2, 3, 5, 6)]
    assert [settings.get("plan", {}).get("lm_seed") for settings in found] == [1, None, 3, 9, 9]
    assert found[0]["request"] == lines[0] | dict(num_inference_steps=1)
    assert sum(len(told["known"]) for told in planner.told) == 4


@pytest.mark.parametrize(
    ("is_tight", "seconds", "times"), [(True, 300.0, 1), (True, -1.0, 4), (False, 300.0, 1)], ids=["", "slow", "ample"]
)
def test_jsonl_loads_the_planner_once(loaded, tmp_path, monkeypatch, is_tight, seconds, times):
    """Where memory holds the planner or a song, not both, lines are planned before the first song is made: all of them,
    or, where planning takes long, those of a while."""
    monkeypatch.setattr(jsonl, "PLANNING_SECONDS", seconds)
    network = SimpleNamespace(nbytes=1, runtime=SimpleNamespace(param_dtype="float32"))
    loads, made = [], []

    def load(mesh):
        loads.append(mesh)
        return SimpleNamespace(network=network, folder=tmp_path)

    def run(jobs, sampling):
        made.append((len(jobs), loaded._planner is None))
        sound = np.full((2, 480), 0.1, np.float32)
        return [Song(sound, np.zeros((1, 4), np.float32), 48_000, job.request.seed) for job in jobs]

    def planner(network, *_):
        found = Scripted()
        found.model = network
        return found

    monkeypatch.setattr(planning, "Planner", planner)
    monkeypatch.setattr(planning.PlannerTokenizer, "from_folder", lambda folder: None)
    monkeypatch.setattr(planning, "memory_limit", lambda device: 1 if is_tight else 2**60)
    monkeypatch.setattr(loaded, "planner_source", SimpleNamespace(load=load, is_possible=True, named=True))
    monkeypatch.setattr(loaded, "run", run)
    lines = [dict(prompt=str(i), seed=i, bpm=60 + i) for i in range(5)]
    lines += [dict(prompt="plain", thinking=False, audio_duration=10), dict(prompt="own", lm_top_k=3)]
    (tmp_path / "songs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read, errors = jsonl.read(tmp_path / "songs.jsonl", tmp_path / "out", {})
    (tmp_path / "out").mkdir()
    try:
        found = list(jsonl.generate(loaded, read, 2, {}))
    finally:
        loaded.unload_planner()
    assert not errors and [error for _, error in found] == [None] * 7
    assert len(loads) == times and sum(count for count, _ in made) == 7
    assert [dropped for _, dropped in made] == [is_tight] * len(made)
    plans = {line.values["prompt"]: line.plan for line, _ in found}
    assert plans["plain"] is None and [plans[str(i)].bpm for i in range(5)] == [60, 61, 62, 63, 64] and plans["own"]


def test_describing(pipe, tmp_path, monkeypatch, capsys, tiny):
    codes = [1, 2, 3] * 20
    plan = pipe.describe(codes, lm_seed=2)
    known = pipe.planner.told[0]
    assert known["mode"] == "understand" and known["known"][0].codes == tuple(codes) == plan.audio_codes
    wave = np.random.default_rng(0).normal(0, 0.1, (2, 480000)).astype(np.float32)
    assert len(pipe.describe(wave).audio_codes) == 50
    monkeypatch.setattr(AceStepPipeline, "_planner", Scripted())
    from acestep_jax.io import audio

    audio.write(tmp_path / "song.wav", wave, 48000)
    words = ["describe", str(tmp_path / "song.wav"), "--captions", "--model", str(tiny[1])]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "song.json").read_text()) == dict(
        caption=WORDS["caption"], lyrics="[Instrumental]", bpm=70, keyscale="A minor", timesignature="3", language="en"
    )
    assert cli.main(words) == 2 and "song.json: already exists" in capsys.readouterr().err
    assert cli.main(["describe", str(tmp_path / "none.wav"), "--model", str(tiny[1])]) == 1


@pytest.fixture(scope="module")
def planner_folder(tmp_path_factory):
    """A planner as it is published, with random weights and a small vocabulary."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours, folder = small.tokenizer(), tmp_path_factory.mktemp("models") / "acestep-5Hz-lm-0.6B"
    own = dict(first_code=ours.first_code, num_codes=small.CODES, eos_token_id=ours.mark(Mark.END_OF_TURN))
    config = Qwen3Config(
        vocab_size=ours.first_code + small.CODES,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        **own,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    ids, merges = small.vocabulary()
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return folder


def test_from_words_to_a_song(tiny, planner_folder, tmp_path, monkeypatch):
    """With a language model: found by its name, as it is by default where one is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = AceStepPipeline.from_pretrained(tiny[1], planner=planner_folder, dtype="float32")
    given = dict(audio_duration=10, bpm=90, lyrics="[Verse]\nla", output_type="latent", num_inference_steps=1)
    songs = pipe("a", seed=3, **given)
    plan = songs[0].plan
    assert (plan.bpm, plan.lm_seed, plan.prompt, len(plan.audio_codes)) == (90, 3, "a", 50)
    assert plan.caption not in ("a", "") and plan.keyscale and plan.timesignature in ("2", "3", "4", "6")
    pipe.unload_planner()
    with pytest.raises(InputError, match="timestamps: this transformer's config has no lyric_alignment"):
        pipe.timestamps(songs[0], Request("b", given["lyrics"]))


def test_split_knows_all_kinds():
    assert split(dict(prompt="x", thinking=True, shift=2)) == (dict(prompt="x"), dict(thinking=True), dict(shift=2))


@pytest.mark.slow
def test_the_best_of_several_and_what_is_heard(tiny, planner_folder, tmp_path, monkeypatch):
    """With a language model; each part has tests of its own, and the pipeline with a scripted one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = AceStepPipeline.from_pretrained(tiny[1], planner=planner_folder, dtype="float32")
    best = pipe.plan(Request("a", seed=3, audio_duration=10), best_of=2)
    assert best.lm_seed in (3, 3 + 0x9E3779B1) and 0 <= best.score <= 1
    heard = pipe.describe(best.audio_codes)
    assert heard.caption and heard.audio_duration == 10 and heard.audio_codes == best.audio_codes
