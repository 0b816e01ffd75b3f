"""The documentation builds without warnings, and its links are valid."""

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow  # a minute; `.ci/run` runs them

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "index quickstart small_model weights diffusers devices tasks planner serve serve_many sampling compat arguments "
    "training sharding architecture parity performance performance_notes comparison api/index api/pipeline api/planner "
    "api/inputs api/sampling api/networks api/kernels api/config api/audio api/checkpoint api/train"
).split()


class Links(html.parser.HTMLParser):
    """The links and images of a page, and the ids of its anchors."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages, with doctrees of its own."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(folder / "doctrees")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "docs", str(folder / "site")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_pages_are_there(site):
    assert [page for page in PAGES if not (site / f"{page}.html").is_file()] == []
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.stem for path in (site / "notebooks").glob("*.html")} == notebooks


def test_public_names_are_documented(site):
    import acestep_jax

    pages = [Links(page) for page in (site / "api").glob("*.html")]
    places = set().union(*(page.places for page in pages))
    names = [getattr(acestep_jax, name) for name in acestep_jax.__all__]
    assert [o.__name__ for o in names if f"{o.__module__}.{o.__qualname__}" not in places] == []


def test_local_links_lead_somewhere(site):
    """Links to other pages, to anchors within them, and to files of the repository."""
    repository = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "docs" / "conf.py").read_text(), re.MULTILINE)[1]
    pages = {page: Links(page) for page in site.rglob("*.html") if "_modules" not in page.parts}
    broken = []
    for page, found in pages.items():
        for link in found.links:
            url = urlsplit(link)
            if re.match(rf"{re.escape(repository)}/(blob|tree)/", link):
                path = url.path.split("/", 5)[5]
                if not (ROOT / path).exists() and (ROOT / path).parent.is_dir():
                    broken.append(f"{page.name}: {link}")
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            place = unquote(url.fragment)
            if not target.exists() or place and target in pages and place not in pages[target].places:
                broken.append(f"{page.name}: {link}")
    assert broken == []
