"""The page without a browser: its files, its headers, what it asks the server for, and its logic under Node.js."""

import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from acestep_jax.arguments import arguments, describe
from acestep_jax.inputs.tasks import TASKS
from acestep_jax.request import Arguments, Planning, Request, Sampling
from tests.imports import ROOT
from tests.serve.fake import sound
from tests.serve.test_http_native import wav

FOLDER = ROOT / "acestep_jax" / "serve" / "page"
SONG = dict(prompt="lofi piano", audio_duration=10.0)
EXTERNAL = re.compile(r"(?:https?:)?//[\w-]+(?:\.[\w-]+)+")
NAMESPACE = "http://www.w3.org/2000/svg"  # which nobody fetches
FORBIDDEN = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc")


class Page(html.parser.HTMLParser):
    """The elements of a document: (tag, attributes), ids, and labels."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.fixture
def page():
    return Page((FOLDER / "index.html").read_text(encoding="utf-8"))


def modules():
    return sorted(FOLDER.glob("*.js"))


@pytest.mark.unit
def test_nothing_comes_from_elsewhere():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace(NAMESPACE, "")
        assert not EXTERNAL.findall(text), path
        assert path.stat().st_size < 40_000, path


@pytest.mark.unit
def test_every_module_is_there_and_makes_no_markup_of_texts():
    names = {path.name for path in FOLDER.iterdir()}
    for path in modules():
        text = path.read_text(encoding="utf-8")
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in names, (path, imported)
        assert not [word for word in FORBIDDEN if word in text], path
        assert len(text.splitlines()) < 400, path


@pytest.mark.unit
def test_elements_that_modules_ask_for_are_on_the_page(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    made = re.compile(r'\bid: "([\w-]+)"')
    texts = {path: path.read_text(encoding="utf-8") for path in modules()}
    known = {*ids, *(name for text in texts.values() for name in made.findall(text))}
    for path, text in texts.items():
        for name in re.findall(r'byId\("([\w-]+)"\)', text):
            assert name in known, (path, name)
    for _, attrs in page.elements:
        for attribute in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attrs.get(attribute) or "").split()) <= known, attrs


@pytest.mark.unit
def test_no_script_or_style_stands_in_the_page(page):
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        assert tag != "style" and (tag != "script" or attrs["src"].startswith("/static/"))


@pytest.mark.unit
def test_controls_have_names(page):
    """In the page as it is written; `test_page_browser.py` looks at what scripts add."""
    labelled = {attrs["for"] for tag, attrs in page.elements if tag == "label" and "for" in attrs}
    within = {"model", "only-favourites", "explain", "import", "source-file", "reference-file", "lrc"}  # their labels
    for tag, attrs in page.elements:
        if tag in ("input", "select", "textarea"):
            assert attrs["id"] in labelled | within or attrs.get("aria-label"), attrs


@pytest.mark.unit
def test_it_is_package_data():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"acestep_jax.serve" = ["page/*"]' in text
    assert not [path for path in FOLDER.iterdir() if path.is_dir()]


@pytest.mark.unit
def test_logic(tmp_path):
    """Runs `page.test.js`, where Node.js is installed."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js: apt-get install nodejs")
    for path in (*modules(), ROOT / "tests" / "serve" / "page.test.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for path in modules():
        checked = subprocess.run([node, "--check", str(tmp_path / path.name)], capture_output=True, text=True)
        assert not checked.returncode, checked.stderr
    ran = subprocess.run([node, "--test", str(tmp_path / "page.test.js")], capture_output=True, text=True)
    assert not ran.returncode, ran.stdout + ran.stderr
    assert "# pass 0" not in ran.stdout


@pytest.mark.unit
def test_colours_have_a_value_for_browsers_without_light_dark():
    """That of light, in front of the block that such browsers skip; so they do not take a dark scheme either."""
    plain, supports, rest = (FOLDER / "style.css").read_text().partition("@supports (color: light-dark(#fff, #000)) {")
    dark, end, rest = rest.partition("\n}\n")
    assert supports and end and "light-dark(" not in plain.replace("no light-dark()", "") + rest
    assert "color-scheme: light;" in plain and "color-scheme: light dark" not in plain
    light = re.sub(r"light-dark\(([^,]+), [^)]+\)", r"\1", dark)
    values = re.findall(r"(--[\w-]+: [^;]+;)", light)
    assert len(values) == 14 and all(value in plain for value in values)


def test_it_is_served_with_a_policy(http):
    client = http(static=FOLDER)
    for path, kind in (("/", "text/html"), ("/static/app.js", "text/javascript"), ("/static/style.css", "text/css")):
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "http" not in policy and response.headers["x-content-type-options"] == "nosniff"
        assert client.head(path).status_code == 200
    for path in FOLDER.iterdir():
        assert client.get(f"/static/{path.name}").content == path.read_bytes()
    for path in ("/static/", "/static/page.py", "/static/..%2fpage.py", "/static/%2e%2e/app.py", "/index.html"):
        assert client.get(path).status_code == 404
    assert http(static=None, folder=client.service.store.folder / "other").get("/").status_code == 404


def test_it_opens_without_the_key_but_shows_nothing_of_the_server(http):
    client = http(static=FOLDER, key="opensesame", started=False)
    client.headers.pop("authorization")
    for path in ("/", "/static/app.js", "/static/options.json"):
        assert client.get(path).status_code == 200
    for path in ("/v1/server", "/v1/songs", "/v1/songs/x/0/peaks", "/v1/songs/x/uploads/src_audio"):
        assert client.get(path).status_code == 401
    assert client.post("/v1/tokens", json={}).status_code == 401
    assert client.post("/v1/session", content="wrong").status_code == 401
    assert client.post("/v1/session", content="opensesame").status_code == 204
    assert client.get("/v1/server").status_code == 200


def test_options_are_those_of_the_request(http):
    client = http(static=FOLDER, started=False)
    found = client.get("/static/options.json").json()
    fields = found["fields"]
    assert set(client.get("/v1/server").json()["fields"]) | set(arguments(Planning)) == set(fields)
    for name, field in fields.items():
        assert field["help"] == describe(name, Arguments) and field["label"] and field["types"]
        assert field["group"] == (
            "planning" if name in arguments(Planning) else "sampling" if name in arguments(Sampling) else "request"
        )
    assert fields["bpm"]["minimum"] == 30 and fields["solver"]["values"] and fields["prompt"]["required"]
    assert fields["repainting_start"]["tasks"] == ["repaint", "lego"] and fields["repainting_start"]["many"]
    assert fields["seed"]["tasks"] == list(TASKS) == list(found["tasks"])
    assert found["tasks"]["extract"] == dict(
        accepts=["src_audio", "src_latents", "track_name"],
        needs_source=True,
        regions=False,
        max_tracks=1,
        turbo=False,
        tokenized=False,
    )
    assert "F# minor" in fields["keyscale"]["values"] and fields["vocal_language"]["names"]["ja"] == "Japanese"


@pytest.mark.parametrize("name", ["keyscale", "timesignature", "vocal_language"])
def test_values_that_are_offered_are_accepted(http, name):
    client = http(static=FOLDER, started=False)
    about = client.get("/static/options.json").json()["fields"][name]
    kind = arguments(Arguments)[name][1].reader
    for value in about["values"]:
        assert kind(value) == value


def test_tokens_are_counted(http):
    client = http(started=False)
    counted = client.post("/v1/tokens", json=dict(prompt="lofi piano", lyrics="[Verse]\nla la la")).json()
    assert counted["prompt"]["limit"] == 256 and counted["lyrics"]["limit"] == 2048
    more = client.post("/v1/tokens", json=dict(prompt="lofi piano and strings", lyrics="[Verse]\n" + "la " * 50)).json()
    for name in ("prompt", "lyrics"):
        assert 0 < counted[name]["tokens"] < more[name]["tokens"]
    job = client.service.engine.models["small"]
    prepared = job.prepare(Request("lofi piano", "[Verse]\nla la la", 600.0), Sampling())
    assert counted["lyrics"]["tokens"] == len(prepared.lyric_ids)
    assert counted["prompt"]["tokens"] == len(prepared.prompt_ids)
    assert client.post("/v1/tokens", json={}).json()["prompt"]["tokens"] == 0
    for body, name in (
        (dict(prompt=3), "prompt"),
        (dict(lyrics="x" * 20_000), "lyrics"),
        (dict(vocal_language="klingon"), "vocal_language"),
        (dict(vocal_language=3), "vocal_language"),
        (dict(model="gpt"), "model"),
        (dict(prompt="\ud800"), None),
        ([], None),
    ):
        answer = client.post("/v1/tokens", content=json.dumps(body))
        assert answer.status_code == 400 and (name is None or answer.json()["field"] == name), body


def test_waveform_of_a_song(http, finished):
    client = http()
    record = finished(client, client.post("/v1/songs", json=SONG | dict(seed=5)).json()["id"])
    found = client.get(f"/v1/songs/{record['id']}/0/peaks?count=100").json()
    assert found["seconds"] == 10 and len(found["peaks"]) == 200
    columns = sound(5, 480_000).reshape(2, 100, 4800)
    wanted = np.stack([columns.min((0, 2)), columns.max((0, 2))], 1) * 127
    assert np.abs(np.array(found["peaks"]).reshape(100, 2) - wanted).max() <= 0.51
    for path in (f"{record['id']}/1/peaks", f"{record['id']}/-1/peaks", "x/0/peaks"):
        assert client.get(f"/v1/songs/{path}").status_code == 404
    assert client.get(f"/v1/songs/{record['id']}/0/peaks?count=0").status_code == 422


def test_peaks_of_few_samples(tmp_path):
    from acestep_jax.serve.page import peaks

    for samples, count in (([0.5, -0.5, 1.0], 800), ([0.25] * 1000, 7), ([], 5)):
        data = io.BytesIO()
        soundfile.write(data, np.array(samples), 48_000, format="WAV", subtype="FLOAT")
        path = tmp_path / "x.wav"
        path.write_bytes(data.getvalue())
        found = peaks(path, count)["peaks"]
        assert len(found) <= 2 * count and len(found) % 2 == 0
        assert max(found, default=0) == round(max(samples, default=0) * 127)


def test_an_upload_comes_back_to_be_heard_beside_the_song(http, finished):
    client = http()
    sent = client.post(
        "/v1/songs",
        data=dict(request='{"prompt": "x", "task_type": "repaint"}'),
        files=dict(src_audio=("a.html", wav())),
    )
    record = finished(client, sent.json()["id"])
    heard = client.get(f"/v1/songs/{record['id']}/uploads/src_audio")
    assert heard.content == wav() and heard.headers["content-type"] == "audio/wav"
    assert "sandbox" in heard.headers["content-security-policy"]
    for name in ("reference_audio", "request.json", "..%2f0.flac", "0.flac"):
        assert client.get(f"/v1/songs/{record['id']}/uploads/{name}").status_code == 404


@pytest.mark.unit
def test_long_parts_are_read_in_pieces(tmp_path, monkeypatch):
    """A column of a long song is not in memory as a whole, and is the same."""
    pytest.importorskip("fastapi")
    from acestep_jax.serve import page

    path = tmp_path / "x.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, (1003, 2)), 48_000, subtype="FLOAT")
    whole = [page.peaks(path, count) for count in (1, 7, 200)]
    monkeypatch.setattr(page, "BLOCK", 64)
    read, largest = soundfile.SoundFile.read, 0

    def watched(self, frames=-1, *rest, **options):
        nonlocal largest
        largest = max(largest, len(found := read(self, frames, *rest, **options)))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    assert [page.peaks(path, count) for count in (1, 7, 200)] == whole
    assert len(whole[1]["peaks"]) == 14 and 0 < largest <= 64
