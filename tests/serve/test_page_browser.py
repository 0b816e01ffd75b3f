"""The page in a real browser: Debian's Chromium without a window, driven by Playwright, with a model that computes
nothing behind a real server.

    apt-get install chromium && pip install playwright

The browser is `chromium` of the path, or what CHROMIUM names.
"""

import importlib.util
import json
import os
import re
import shutil

import pytest

from acestep_jax.serve.local import LocalEngine
from tests.serve.fake import FakePipeline, model, sung, wait_until
from tests.serve.test_http_native import wav
from tests.serve.test_page import FOLDER

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [
    what
    for what, there in (
        ("Chromium (apt-get install chromium, or its path in CHROMIUM)", BROWSER),
        ("Playwright (pip install playwright)", importlib.util.find_spec("playwright")),
    )
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
PATIENCE = 20_000  # ms; the machine may be busy with other tests

# Elements that a person can use but that have no name for a screen reader, and texts that are hard to read.
NAMELESS = """() => {
  const shown = (e) => e.checkVisibility?.({ checkVisibilityCSS: true }) ?? true;
  const name = (e) => [e.getAttribute("aria-label"), ...(e.getAttribute("aria-labelledby") ?? "").split(" ").map((id) =>
    document.getElementById(id)?.textContent), ...[...(e.labels ?? [])].map((l) => l.textContent), e.alt,
    /^(BUTTON|A|SUMMARY|LEGEND)$/.test(e.tagName) ? e.textContent : ""].find((text) => text?.trim());
  return [...document.querySelectorAll(
    "button, a[href], input, select, textarea, summary, [role=slider], [role=group], canvas[role=img], img:not([alt])")]
    .filter((e) => shown(e) && !e.closest("[aria-hidden=true]") && !name(e) && e.getAttribute("aria-hidden") !== "true")
    .map((e) => e.outerHTML.slice(0, 200));
}"""
PALE = """() => {
  const parts = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.9) return c;
    }
    return [255, 255, 255];
  };
  const passed = ".sr-only, .help, :disabled, .skip, .chip:has(input:disabled)";
  return [...document.querySelectorAll("body *")].filter((e) => {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(passed)) return false;
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map((e) => [e.tagName, e.className, e.textContent.slice(0, 30)]);
}"""
INK = """(canvas) => { const d = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(http, chromium):
    """Return a function that serves the page and opens it: (page, client). What the console says and where requests go
    is looked at at the end of each test."""
    opened = []

    def make(*, width=1280, height=900, dark=False, client=None, expected=(), **options):
        client = client or http(static=FOLDER, **options)
        context = chromium.new_context(
            viewport=dict(width=width, height=height), color_scheme="dark" if dark else "light", accept_downloads=True
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((context, client, said, asked, expected))
        page.goto(str(client.base_url))
        page.wait_for_selector("body[data-state=ready]")
        return page, client

    yield make
    for context, client, said, asked, expected in opened:
        context.close()
        own = f"http://{client.base_url.netloc.decode()}/"
        assert not [url for url in asked if not url.startswith((own, f"blob:{own}", "data:"))]
        assert not [text for text in said if not re.search("|".join(expected) or "^$", text)], said


def until(page, expression):
    """Wait until an expression is true in the page. Playwright's own `wait_for_function` needs `eval`, which the page's
    policy forbids."""
    wait_until(lambda: page.evaluate(expression), PATIENCE / 1000)


def generate(page, prompt, seconds=10):
    """Request a song, and wait until it is there."""
    page.fill("#prompt", prompt)
    page.fill("#field-audio_duration", str(seconds))
    page.click("[data-testid=generate]")
    page.wait_for_selector("[data-testid=record][data-state=done] [data-testid=play]")


def drag(page, start, end):
    """Drag between two places of the source's editor, given in seconds."""
    box = page.locator("#stage").bounding_box()
    shown = page.locator("#source-extent").bounding_box()
    length = page.evaluate("() => document.querySelector('#source-length').textContent.split(':').map(Number)")
    seconds = length[0] * 60 + length[1]
    x = [shown["x"] + shown["width"] * time / seconds for time in (start, end)]
    y = box["y"] + box["height"] / 3
    page.mouse.move(x[0], y)
    page.mouse.down()
    page.mouse.move((x[0] + x[1]) / 2, y, steps=3)
    page.mouse.move(x[1], y, steps=3)
    page.mouse.up()


def test_the_first_song(visit):
    page, client = visit(pipe=FakePipeline(delay=0.03))
    assert page.locator("#empty").is_visible() and page.locator("[data-testid=record]").count() == 0
    page.fill("#prompt", "lofi piano, 80 bpm")
    page.fill("#field-audio_duration", "10")
    page.fill("#field-seed", "7")
    page.click("[data-testid=generate]")
    page.wait_for_selector("[data-state=running]")
    until(page, "document.querySelector('.status').textContent.includes('step')")
    card = page.locator("[data-testid=record][data-state=done]")
    card.wait_for()
    assert not page.locator("#empty").is_visible() and card.locator("h3").text_content() == "lofi piano, 80 bpm"
    assert "seed 7" in card.locator(".seed").text_content()
    (record,) = client.service.records.values()
    assert record.songs[0].request == dict(prompt="lofi piano, 80 bpm", audio_duration=10, seed=7)
    until(page, f"({INK})(document.querySelector('[data-testid=wave]')) > 100")
    card.locator("[data-testid=play]").click()
    until(page, "document.querySelector('#sound-a').currentTime > 0.1")
    assert page.evaluate("document.querySelector('#sound-a').duration") == pytest.approx(10, abs=0.05)
    assert "Pause" in card.locator("[data-testid=play]").get_attribute("aria-label")
    page.locator("h1").click()
    page.keyboard.press(" ")
    until(page, "document.querySelector('#sound-a').paused")
    page.keyboard.press(" ")
    until(page, "!document.querySelector('#sound-a').paused")
    card.locator("[data-testid=wave]").click(position=dict(x=40, y=20))
    assert page.locator("#transport").is_visible()


def test_repaint_by_dragging_and_compare(visit, finished):
    page, client = visit()
    generate(page, "lofi piano", 20)
    page.click("[data-testid=to-repaint]")
    page.wait_for_selector("#stage:not([hidden])")
    until(page, f"({INK})(document.querySelector('#source-wave')) > 100")
    drag(page, 5, 9)
    drag(page, 16, 22)  # past the end
    numbers = [float(box.input_value()) for box in page.locator("#region-list input").all()]
    assert numbers == pytest.approx([5, 9, 16, 22], abs=0.2)
    assert "adds 2" in page.locator("#region-list output").nth(1).text_content()
    handle = page.locator("[data-testid=handle-0-start]")
    handle.focus()
    page.keyboard.press("Home")
    page.keyboard.press("PageDown")  # 5 s before the source begins
    assert handle.get_attribute("aria-valuenow") == "-5"
    page.locator("#region-list input.end").first.fill("8")
    page.locator("#region-list input.end").first.press("Tab")
    page.fill("#prompt", "with strings")
    page.click("[data-testid=generate]")
    until(page, "document.querySelectorAll('[data-testid=record][data-state=done]').length == 2")
    record = list(client.service.records.values())[-1]
    asked = record.songs[0].request
    assert asked["task_type"] == "repaint" and asked["prompt"] == "with strings"
    assert asked["repainting_start"] == pytest.approx([-5, 16], abs=0.2)
    assert asked["repainting_end"] == pytest.approx([8, 22], abs=0.2)
    assert record.files == ["src_audio"]

    card = page.locator("[data-testid=record]").first
    card.locator("[data-testid=play]").click()
    page.locator("#sides").wait_for()
    page.click("#side-b")
    page.evaluate("document.querySelector('#sound-a').currentTime = 9")
    until(page, "document.querySelector('#sound-a').currentTime > 9.5")
    difference = "document.querySelector('#sound-a').currentTime - document.querySelector('#sound-b').currentTime"
    until(page, f"Math.abs({difference} - 5) < 0.1")
    assert page.evaluate("[document.querySelector('#sound-a').muted, document.querySelector('#sound-b').muted]") == [
        True,
        False,
    ]
    page.click("#side-a")
    assert page.evaluate("document.querySelector('#sound-b').muted")


@pytest.mark.slow  # a browser takes seconds; by default those tests run that the page cannot do without
def test_a_source_from_a_file_survives_a_reload_and_is_removed_by_key(visit):
    page, client = visit()
    page.locator("[data-task=repaint]").click()
    page.set_input_files("#source-file", dict(name="take.wav", mimeType="audio/wav", buffer=wav(4)))
    page.wait_for_selector("#stage:not([hidden])")
    drag(page, 1, 3)
    page.fill("#prompt", "drums")
    page.wait_for_timeout(400)
    page.reload()
    page.wait_for_selector("#stage:not([hidden])")
    assert page.locator("#source-title").text_content() == "take.wav"
    assert page.locator("[data-testid=region]").count() == 1 and page.input_value("#prompt") == "drums"
    page.locator("[data-testid=handle-0-end]").press("Delete")
    assert page.locator("[data-testid=region]").count() == 0
    page.click("#add-region")
    page.click("[data-testid=generate]")
    page.wait_for_selector("[data-state=done]")
    (record,) = client.service.records.values()
    assert (client.service.store.upload_path(record, "src_audio")).read_bytes() == wav(4)
    assert record.songs[0].request["repainting_start"] == 1
    page.click("[data-testid=use]")  # brings the source back from the server
    until(page, "document.querySelector('#source-title').textContent.startsWith('Source of')")


def test_cancel_and_reload(visit):
    page, client = visit(pipe=FakePipeline(delay=0.05), max_batch=1)
    page.fill("#prompt", "one")
    page.fill("#lyrics", "[Verse]\nla la")
    page.fill("#field-bpm", "90")
    page.click("[data-testid=generate]")
    page.wait_for_selector("[data-state=running]")
    page.fill("#prompt", "two")
    page.keyboard.press("Control+Enter")
    second = page.locator("[data-testid=record]", has_text="two")
    second.locator("text=next in the queue").wait_for()
    second.locator("[data-testid=cancel]").click()
    page.wait_for_selector("[data-state=cancelled]")
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_selector("body[data-state=ready]")
    assert [card.get_attribute("data-state") for card in page.locator("[data-testid=record]").all()][0] == "cancelled"
    assert (page.input_value("#prompt"), page.input_value("#field-bpm")) == ("two", "90")
    assert page.input_value("#lyrics") == "[Verse]\nla la"
    page.locator("[data-testid=record]", has_text="one").locator("[data-testid=cancel]").click()
    until(page, "document.querySelectorAll('[data-state=cancelled]').length == 2")
    assert {record.status for record in client.service.records.values()} == {"cancelled"}
    removal = page.locator("[data-testid=remove]").first
    removal.click()
    removal.click()
    until(page, "document.querySelectorAll('[data-testid=record]').length == 1")
    assert len(client.service.records) == 1


@pytest.mark.slow
def test_settings_return_with_the_seed_or_without(visit):
    page, client = visit()
    page.fill("#field-seed", "11")
    page.fill("#variations", "2")
    page.select_option("#field-keyscale", "F# minor")
    generate(page, "choir")
    assert page.locator("[data-testid=song]").count() == 2
    page.click("#clear")
    until(page, "document.querySelector('#prompt').value === ''")
    assert page.input_value("#variations") == "1"
    page.click("[data-testid=same-seed]")
    until(page, "document.querySelector('#prompt').value === 'choir'")
    assert (page.input_value("#field-seed"), page.input_value("#variations")) == ("11", "2")
    assert page.input_value("#field-keyscale") == "F# minor"
    page.click("[data-testid=use]")
    until(page, "document.querySelector('#field-seed').value === ''")


@pytest.mark.slow
def test_export_and_import(visit, tmp_path):
    page, _ = visit()
    page.fill("#prompt", "harp")
    page.fill("#field-bpm", "70")
    page.click("#more summary")
    page.select_option("#field-solver", "heun")
    with page.expect_download() as saved:
        page.click("#export")
    body = json.loads(saved.value.path().read_text())
    assert body == dict(prompt="harp", bpm=70, solver="heun")
    path = tmp_path / "request.json"
    path.write_text(json.dumps(dict(prompt="flute", audio_duration=30, task_type="cover", thing=1, shift=2.5)))
    page.set_input_files("#import", path)
    page.locator(".toast", has_text="thing").wait_for()
    assert (page.input_value("#prompt"), page.input_value("#field-bpm")) == ("flute", "")
    assert page.input_value("#field-shift") == "2.5" and page.locator("#source").is_visible()
    page.set_input_files("#import", dict(name="x.json", mimeType="application/json", buffer=b"[1]"))
    page.locator(".toast", has_text="not a request").wait_for()
    assert page.input_value("#prompt") == "flute"


def test_errors_stand_at_their_fields(visit):
    page, client = visit(expected=("400",))
    page.click("[data-testid=generate]")
    assert page.locator("#error-prompt").is_visible() and page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#prompt", "x")
    assert not page.locator("#error-prompt").is_visible()
    page.fill("#field-bpm", "fast")
    page.click("[data-testid=generate]")
    error = page.locator("#error-bpm")
    error.wait_for()
    assert "expected 30 to 300" in error.text_content()
    assert page.get_attribute("#field-bpm", "aria-invalid") == "true"
    page.fill("#field-bpm", "90")
    assert not error.is_visible()
    page.click("#more summary")
    page.fill("#field-num_inference_steps", "0")
    page.click("#more summary")  # a closed folder opens for its error
    page.click("[data-testid=generate]")
    page.locator("#error-num_inference_steps").wait_for()
    page.fill("#field-num_inference_steps", "")
    page.locator("[data-task=cover]").click()
    page.click("[data-testid=generate]")
    assert "source" in page.locator("#error-src_audio").text_content()
    page.set_input_files("#source-file", dict(name="noise.wav", mimeType="audio/wav", buffer=b"no sound"))
    page.click("[data-testid=generate]")
    until(page, "document.querySelector('#error-src_audio').textContent.includes('not a sound file')")
    assert client.service.records == {}


def test_keyboard_alone(visit):
    page, client = visit()

    def tab_to(selector, most=120):
        for _ in range(most):
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                return ring
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached by Tab")

    tab_to("#prompt")
    page.keyboard.type("bells")
    tab_to("#tags button")
    page.keyboard.press("Enter")
    assert page.input_value("#lyrics") == "[Intro]\n"
    page.keyboard.type("ding")
    tab_to("#field-audio_duration")
    page.keyboard.type("10")
    assert tab_to("#generate") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-state=done] [data-testid=play]")
    tab_to("[data-testid=play]")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#sound-a').currentTime > 0")
    tab_to("[data-testid=to-repaint]")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'add-region'")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.matches('.handle.start')")
    for key in ("ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    tab_to(".handle.end")
    page.keyboard.press("End")
    assert [float(box.input_value()) for box in page.locator("#region-list input").all()] == [3.6, 10]
    (record,) = client.service.records.values()
    assert record.songs[0].request["lyrics"] == "[Intro]\nding"


@pytest.mark.parametrize("dark", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_fits_a_phone_and_can_be_read(visit, dark):
    page, client = visit(width=360, height=740, dark=dark)
    generate(page, "a prompt that is longer than the screen is wide, withawordthatisverylongindeedforaphonescreen")
    page.locator("[data-testid=play]").click()
    page.click("[data-testid=to-repaint]")
    page.wait_for_selector("#stage:not([hidden])")
    page.click("#add-region")
    page.evaluate("document.querySelector('#more').open = true")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(PALE) == []
    small = """() => [...document.querySelectorAll("button, summary, select")].filter((e) => e.checkVisibility() &&
        Math.min(e.offsetHeight, e.offsetWidth) < 24).map((e) => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(small) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(
        "[...document.querySelectorAll('[role=slider]')].every((e) => e.hasAttribute('aria-valuenow'))"
    )


@pytest.mark.slow
def test_colours_can_be_chosen(visit):
    page, _ = visit()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    page.click("#theme")
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    page.wait_for_selector("body[data-state=ready]")
    assert page.evaluate(paper) == dark
    assert page.evaluate(PALE) == []


@pytest.mark.slow
def test_the_key_is_asked_for_once(visit, http, chromium):
    client = http(static=FOLDER, key="opensesame")
    context = chromium.new_context()
    page = context.new_page()
    page.goto(str(client.base_url))
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.locator("#key-problem", has_text="not the key").wait_for()
    page.fill("#key", "opensesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=ready]")
    generate(page, "with a key")
    page.locator("[data-testid=play]").click()
    until(page, "document.querySelector('#sound-a').currentTime > 0")
    until(page, f"({INK})(document.querySelector('[data-testid=wave]')) > 100")
    page.reload()
    page.wait_for_selector("body[data-state=ready]")
    assert not page.locator("#key-dialog").is_visible() and page.locator("[data-testid=song]").count() == 1
    assert "opensesame" not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    context.close()


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(visit):
    page, client = visit(pipe=FakePipeline(delay=0.1), expected=("ERR_INTERNET_DISCONNECTED", "ERR_INCOMPLETE"))
    page.fill("#prompt", "long")
    page.click("[data-testid=generate]")
    page.wait_for_selector("[data-state=running]")
    page.context.set_offline(True)
    page.click("[data-testid=generate]")
    page.locator("#problem", has_text="does not respond").wait_for()
    page.wait_for_selector("#offline:not([hidden])")
    page.context.set_offline(False)
    page.wait_for_selector("#offline", state="hidden")
    page.wait_for_selector("[data-state=done]")
    assert page.input_value("#prompt") == "long"


@pytest.mark.slow
def test_the_history_beside_other_clients(visit, http):
    """What others request and remove, before an answer comes and after it, moves and hides no other card."""
    client = http(static=FOLDER, started=False)
    ids = [client.post("/v1/songs", json=dict(prompt=f"song {i}", seed=1)).json()["id"] for i in range(25)]
    page, _ = visit(client=client, expected=("400",))
    shown = "[...document.querySelectorAll('[data-testid=record]')].map((e) => e.dataset.id)"
    until(page, "document.querySelectorAll('[data-testid=record]').length == 20")
    for _ in range(2):  # cancelled, then removed: the last one that is shown
        client.delete(f"/v1/songs/{ids[5]}")
    assert ids[5] not in client.service.records
    page.click("#older")
    until(page, "document.querySelectorAll('[data-testid=record]').length == 24")
    assert page.evaluate(shown) == [one for one in reversed(ids) if one != ids[5]]
    held = []
    page.route("**/v1/songs?limit=20", lambda route: held.append((route, route.fetch())), times=1)
    while not held:
        page.wait_for_timeout(50)
    page.fill("#prompt", "asked for meanwhile")
    page.click("[data-testid=generate]")
    until(page, "document.querySelectorAll('[data-testid=record]').length == 25")
    before = client.post("/v1/songs", json=dict(prompt="of another", seed=1)).json()["id"]
    ((route, response),) = held
    route.fulfill(response=response)
    page.wait_for_timeout(200)
    newest = page.evaluate(shown)[0]
    assert newest not in ids and client.get(f"/v1/songs/{newest}").json()["request"]["prompt"] == "asked for meanwhile"
    until(page, "document.querySelectorAll('[data-testid=record]').length == 26")  # with the next answer
    assert page.evaluate(shown)[:3] == [before, newest, ids[-1]]


@pytest.mark.slow
def test_adapters_pictures_favourites_and_files(visit, http, service):
    pipe = FakePipeline()
    engine = LocalEngine([model(pipe)], adapters=dict(jazz="nowhere", rock="nowhere"))
    page, client = visit(pipe=pipe, engine=engine)
    page.locator(".adapter label", has_text="jazz").click()
    page.get_by_label("Scale of jazz").fill("0.6")
    generate(page, "sax")
    assert pipe.batches[0][2] == dict(jazz=0.6)
    assert "jazz × 0.6" in page.locator(".facts").text_content()
    page.click("[data-testid=spectrogram]")
    page.wait_for_selector("[data-testid=spectrum][data-state=done]")
    colours = (
        "new Set(document.querySelector('[data-testid=spectrum]').getContext('2d').getImageData(0,0,480,128).data).size"
    )
    assert page.evaluate(colours) > 30
    page.click("[data-testid=download]")
    with page.expect_download() as saved:
        page.click("a[data-format=wav]")
    assert saved.value.suggested_filename.startswith("sax-") and saved.value.path().read_bytes()[:4] == b"RIFF"
    page.keyboard.press("Escape")
    page.click(".star")
    wait_until(lambda: any(record.songs[0].favourite for record in client.service.records.values()))
    generate_other = page.locator("#prompt")
    generate_other.fill("other")
    page.click("[data-testid=generate]")
    until(page, "document.querySelectorAll('[data-state=done] [data-testid=play]').length == 2")
    page.locator("label", has_text="Favourites").click()
    assert [card.is_visible() for card in page.locator("[data-testid=record]").all()] == [False, True]
    page.locator("label", has_text="Favourites").click()
    page.fill("#search", "oth")
    assert [card.is_visible() for card in page.locator("[data-testid=record]").all()] == [True, False]


@pytest.mark.slow
def test_lyrics_are_shown_while_they_are_sung(visit):
    page, _ = visit()
    generate(page, "song")
    lrc = dict(name="song.lrc", mimeType="text/plain", buffer=b"[00:00.00]first\n[00:05.00]second\n")
    page.set_input_files(".take input[type=file]", lrc)
    page.click("[data-testid=play]")
    until(page, "document.querySelector('#sung-now').textContent === 'first'")
    page.evaluate("document.querySelector('#sound-a').currentTime = 6")
    until(page, "document.querySelector('#sung-now').textContent === 'second'")
    page.reload()
    page.click("[data-testid=play]")
    page.wait_for_selector("#sung:not([hidden])")


@pytest.mark.slow
def test_lyrics_are_timed_by_the_server(visit):
    pipe = FakePipeline()
    page, _ = visit(pipe=pipe, engine=LocalEngine([sung(pipe), model(pipe)]))
    page.fill("#lyrics", "first\nsecond")
    page.locator("label", has_text="Time the lyrics").click()
    generate(page, "song")
    page.click("[data-testid=play]")
    until(page, "document.querySelector('#sung-now').textContent === 'first'")
    page.evaluate("document.querySelector('#sound-a').currentTime = 1.5")
    until(page, "document.querySelector('#sung-now').textContent === 'second'")
    page.select_option("#model", "small")  # whose heads are not known
    assert not page.locator("#lrc-field").is_visible()


@pytest.mark.slow
def test_a_plan_is_written_changed_and_made(visit):
    page, client = visit(planner="acestep-5Hz-lm-tiny", pipe=FakePipeline(delay=0.02))
    planner = client.service.pipe.planner
    page.fill("#prompt", "rain")
    page.fill("#field-bpm", "90")
    page.click("#plan-write")
    page.locator("#plan-progress", has_text="of 20").wait_for()
    page.wait_for_selector("#plan-caption")
    assert page.input_value("#plan-caption") == "inspire of rain" and page.input_value("#plan-bpm") == "90"
    assert page.input_value("#plan-lyrics").startswith("[Verse]")
    assert "60 audio codes, 12 s" in page.locator("#plan-body").text_content()
    page.fill("#plan-caption", "my own words")
    assert page.locator("#plan-stale").is_visible()
    page.click("#plan-write")
    until(page, "document.querySelector('#plan-stale').hidden")
    assert page.input_value("#plan-caption") == "my own words"
    asked = len(planner.asked)
    page.fill("#field-seed", "5")
    page.click("#generate")
    page.wait_for_selector("[data-state=done] [data-testid=play]")
    (record,) = client.service.records.values()
    assert record.songs[0].request["prompt"] == "my own words" and record.songs[0].request["bpm"] == 90
    assert record.notes == [] and len(planner.asked) == asked
    page.reload()  # the plan is still there
    page.wait_for_selector("#plan-caption")
    page.click("#plan-drop")
    assert page.locator("#plan-caption").count() == 0
    page.locator("[data-testid=plan] summary").click()
    assert "my own words" in page.locator("[data-testid=plan]").text_content()
    page.locator("[data-testid=plan] button").click()
    page.wait_for_selector("#plan-caption")
    assert page.input_value("#plan-caption") == "my own words"
    page.click("#plan-drop")
    page.click("#plan-write")
    page.locator("#plan-progress", has_text="of 20").wait_for()
    page.click("#plan-write")  # which is Cancel now
    until(page, "document.querySelector('#plan-write').textContent === 'Write a plan'")
    page.locator("[data-task=repaint]").click()
    assert page.locator("#plan").is_hidden()
    page.locator("[data-task=text2music]").click()
    page.click("[data-testid=generate]")  # the server plans by itself
    page.locator(".status", has_text="writing the plan").wait_for()


def test_tasks_that_a_model_cannot_do_say_why(visit):
    page, client = visit(width=700)
    tasks = client.get("/static/options.json").json()["tasks"]
    able = client.get("/v1/server").json()["models"][0]["tasks"]
    for name in tasks:
        box = page.locator(f"[data-task={name}] input")
        assert box.is_disabled() == (name not in able)
    assert page.locator("#plan").is_hidden()  # there is no planner
    counted = page.locator("#prompt-tokens")
    page.fill("#prompt", "lofi piano")
    wait_until(lambda: "about" not in counted.text_content())
    told = client.post("/v1/tokens", json=dict(prompt="lofi piano")).json()["prompt"]["tokens"]
    assert counted.text_content() == f"{told} of 256 tokens"
    page.fill("#prompt", "piano " * 400)
    page.locator("#prompt-tokens.over").wait_for()
