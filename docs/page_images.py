"""Take the pictures of the server's page anew: `python docs/page_images.py http://127.0.0.1:8001`.

The server is one of the small model with a folder of its own, `acestep-jax serve --data NEW`, which makes the songs of
the pictures, once. Needs Chromium, Playwright and Pillow. The pictures have few colours: the repository keeps each.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent / "images"
COLOURS = 128
DONE = "[data-testid=record][data-state=done]"
LRC = b"[00:00.00]the rain comes down on the window pane\n[00:04.00]and the needle finds the groove again\n"


def main(address: str) -> None:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(300_000)
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]")
        if not page.locator(DONE).count():
            _fill(page, prompt="lofi piano, soft drums, 80 bpm", audio_duration=12, bpm=80, seed=1, variations=2)
            page.click("[data-testid=generate]")
            page.wait_for_selector(f"{DONE} [data-testid=play]")
            page.locator(".star").first.click()
            _repaint(page)
            page.click("[data-testid=generate]")
            page.locator(DONE).nth(1).wait_for()
        else:
            _repaint(page)
        newest = page.locator(DONE).first
        newest.locator("[data-testid=spectrogram]").click()
        newest.locator("[data-testid=spectrum][data-state=done]").wait_for()
        newest.locator("input[type=file]").set_input_files({"name": "a.lrc", "mimeType": "text/plain", "buffer": LRC})
        newest.locator("[data-testid=play]").click()
        page.wait_for_timeout(3_000)
        page.evaluate("document.querySelectorAll('audio').forEach((sound) => sound.pause())")
        page.wait_for_timeout(8_000)  # until what the page has said is gone
        page.evaluate("document.activeElement.blur(); document.querySelectorAll('*').forEach((e) => (e.scrollTop = 0))")
        _write(page, "page-wide")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 740})
        page.evaluate("document.querySelector('#search').scrollIntoView()")
        _write(page, "page-narrow")
        browser.close()


def _repaint(page: Page) -> None:
    """Take the first song as the source, with two regions."""
    page.locator(DONE).last.locator("[data-testid=to-repaint]").first.click()
    page.wait_for_selector("#stage:not([hidden])")
    for i, (start, end) in enumerate(((3, 5.5), (10, 13))):
        page.click("#add-region")
        for box, value in zip(page.locator("#region-list input").all()[2 * i :], (start, end), strict=False):
            box.fill(str(value))
            box.press("Tab")
    _fill(page, prompt="bright synth arpeggio, 80 bpm", variations=1)


def _fill(page: Page, **values: Any) -> None:
    for name, value in values.items():
        box = f"#{name}" if name in ("prompt", "variations") else f"#field-{name}"
        page.fill(box, str(value))


def _write(page: Page, name: str) -> None:
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture = picture.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
