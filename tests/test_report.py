"""The report: what is in it, and what a browser makes of it."""

import base64
import dataclasses
import html
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcrf import report
from jaxcrf.evaluation import evaluate

# Names that would break a page that takes them as they are.
LABELS = ("<b>sky</b>", 'tree & "bush"', "$car$")
NAMES = ("<script>alert(1)</script>", "b'\"", "c", "d")


@dataclasses.dataclass
class Source:
    examples: list
    names: tuple = NAMES
    label_names: tuple = LABELS
    ignore_label: int = 255

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@pytest.fixture(scope="module")
def evaluation():
    random = np.random.default_rng(0)
    examples = []
    for k in range(4):
        truth = np.zeros((40, 60 + 500 * (k == 3)), int)
        truth[:, 30:] = 1
        truth[20:, :20] = 2
        truth[:, 30] = 255
        image = random.integers(0, 255, (*truth.shape, 3)).astype(np.uint8)
        examples.append((image, truth))
    truths = iter([truth for _, truth in examples])

    def predict(image):
        truth = next(truths)
        return np.where(random.random(truth.shape) < 0.2, random.integers(0, 3, truth.shape), truth % 3)

    return evaluate(
        predict,
        Source(examples),
        refine=lambda image, labels: np.where(labels == 2, 2, labels),
        num_pictures=1,
    )


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    evaluation.save_html(path, title="A <title>", notes="x & y")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


class _Page(html.parser.HTMLParser):
    """What a page refers to, its images and its tables."""

    VOID = ("meta", "link", "img", "source", "br")

    def __init__(self, text):
        super().__init__()
        self.sources, self.images, self.rows, self.open, self.tags = [], [], [], [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [attributes[name] for name in ("src", "srcset", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_is_whole_in_itself(page):
    text = page.read_text(encoding="utf-8")
    parsed = _Page(text)
    assert parsed.sources
    assert all(source.startswith("data:") for source in parsed.sources)
    assert "script" not in parsed.tags
    assert "url(" not in text
    assert "@import" not in text
    # Charts are vector graphics, which may refer to other files as well.
    for source in parsed.sources:
        if source.startswith("data:image/svg+xml;base64,"):
            drawing = base64.b64decode(source.partition(",")[2]).decode()
            links = re.findall(r'(?:href|src)="([^"]*)"', drawing)
            assert all(link.startswith(("#", "data:")) for link in links)
    # Images are shrunk, and there is one of 560 pixels.
    assert (
        max(int(image["width"]) for image in parsed.images if ": " in image["alt"] and image["alt"][0] == "d")
        == 480
    )
    assert len(text) < 1_000_000


def test_names_are_escaped(page):
    text = page.read_text(encoding="utf-8")
    for name in (*LABELS[:2], *NAMES[:2], "A <title>", "x & y"):
        assert name not in text
        assert html.escape(name) in text


def test_tables_hold_the_numbers(page, evaluation):
    rows = {}
    for row in _Page(page.read_text(encoding="utf-8")).rows:
        rows.setdefault(row[0], row)
    before = evaluation.baseline.table()
    for line in evaluation.table():
        row = rows[line.name]
        scores = [scores[line.label] for scores in evaluation.objects]
        expected = [line.share, before[line.label].iou, line.iou, line.precision, line.recall, *scores]
        del row[4]  # the change, in points
        assert row[1:] == ["–" if np.isnan(value) else f"{100 * value:.1f}" for value in expected]
    for score in evaluation.images:
        assert rows[score.name][2] == f"{100 * score.mean_iou:.1f}"
    assert f"{100 * evaluation.totals()['mean_iou']:.1f} %" in page.read_text(encoding="utf-8")


def test_every_image_has_a_text_for_those_who_cannot_see_it(page):
    images = _Page(page.read_text(encoding="utf-8")).images
    alternatives = [image["alt"] for image in images]
    assert all(alternatives)
    # Three charts, and five pictures each of the worst and the best.
    assert len(images) == 3 + 5 * 2
    assert len(set(alternatives)) == len(alternatives)


def test_undefined_numbers_are_dashes():
    void = np.full((4, 5), 255)
    source = Source([(np.zeros((4, 5, 3), np.uint8), void)])
    text = report.render(evaluate(lambda image: void, source))
    assert "nan" not in re.sub(r'"data:[^"]*"', "", text).lower()
    assert "Worst images" not in text


def test_label_maps_keep_their_colours():
    colors = np.random.default_rng(0).integers(0, 256, (200, 3)).astype(np.uint8)
    drawing = colors[np.arange(600).reshape(20, 30) % 200]
    source, width, height = report._drawing(drawing)
    stored = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert (stored.mode, width, height) == ("P", 30, 20)
    np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), drawing)


def test_a_palette_that_is_too_short_is_refused(evaluation):
    with pytest.raises(ValueError, match="palette: got 2 colours for 3 labels"):
        report.render(evaluation, palette=np.zeros((2, 3), np.uint8))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PROBE = """<!doctype html><body>%s<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow;
    for (const details of page.querySelectorAll("details")) details.open = true;
    return {
      width: view.innerWidth,
      needed: page.documentElement.scrollWidth,
      images: [...page.images].map(image => image.complete ? image.naturalWidth : 0),
      requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
      title: page.title,
      cells: [...page.querySelectorAll("th, td")].map(cell => cell.innerText.trim()),
    };
  });
  document.body.textContent = "RESULT" + JSON.stringify(found) + "END";
});
</script>"""


def browse(page, folder):
    """What Chromium says of a page in frames as wide as a phone and a screen, and of what its console said."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in (390, 1280)
    )
    wrapper = folder / "probe.html"
    wrapper.write_text(PROBE % frames, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search("RESULT(.*)END", html.unescape(done.stdout), re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found[1]), console


def test_chromium_shows_all_of_it(page, evaluation, tmp_path):
    frames, console = browse(page.read_text(encoding="utf-8"), tmp_path)
    assert console == []
    assert [frame["width"] for frame in frames] == [390, 1280]
    for frame in frames:
        assert frame["needed"] <= frame["width"]
        assert len(frame["images"]) == 3 + 5 * 2
        assert min(frame["images"]) > 0
        assert frame["requests"] == []
        assert frame["title"] == "A <title>"
        for line in evaluation.table():
            start = frame["cells"].index(line.name)
            assert frame["cells"][start + 3] == f"{100 * line.iou:.1f}"


def test_the_check_in_chromium_can_fail(page, tmp_path):
    broken = page.read_text(encoding="utf-8").replace(
        "<main>", '<main><div style="width:2000px">x</div><img src="https://example.org/x.png" alt="x">'
    )
    frames, console = browse(broken, tmp_path)
    # The page's own policy forbids what it does not hold.
    assert "Content Security Policy" in " ".join(console)
    assert all(frame["needed"] > frame["width"] for frame in frames)
    assert min(frames[0]["images"]) == 0


def test_chromium_paints_it(page, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    pictures = []
    for scheme in (0, 1):
        target = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                CHROMIUM,
                *FLAGS,
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--blink-settings=preferredColorScheme={scheme}",
                "--window-size=600,900",
                f"--screenshot={target}",
                page.as_uri(),
            ],
            capture_output=True,
            timeout=120,
            check=True,
        )
        with Image.open(target) as picture:
            pictures.append(np.asarray(picture.convert("L"), float))
    dark, light = pictures
    # The page, and the letters on it.
    assert np.median(dark) < 60
    assert np.median(light) > 200
    assert dark.max() > 200
    assert light.min() < 60


def test_a_report_that_fails_leaves_the_old_one(page, evaluation, monkeypatch):
    before = page.read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        evaluation.save_html(page, title="another")
    assert page.read_bytes() == before
    assert [file.name for file in Path(page).parent.iterdir()] == [page.name]
