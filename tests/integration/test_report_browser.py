"""The report in a real browser: every view draws, gestures work, nothing is asked of any network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # profiles are made there

from profiles import profile_of
from report_profiles import idle_of, repeated, summary_of, three_tiers, training

from penstock.report import build

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

VIEWS = ("memory", "lanes", "bubbles", "residency", "modules", "bandwidth", "leads", "peak")
VERDICT = "Disk-bound: 61 % of idle time waits on reads of layers 7, 9, 11."
HOSTILE = "</script><img src=x onerror=document.title='owned'><b>"
COLOURS_ON_CANVASES = """id => [...document.querySelectorAll(`#${id} canvas`)].map(canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
    return seen.size;
})"""
RANGE = "document.getElementById('range').textContent"
PICTURE = "document.querySelector('#lanes canvas').toDataURL()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Reader:
    """A page, with everything that it complained of and asked for."""

    def __init__(self, browser: Any, path: Path, html: str, **context: Any) -> None:
        path.write_text(html, encoding="utf-8")
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=20_000)
        self.page.wait_for_timeout(100)
        self.own = path.as_uri()

    def settle(self) -> None:
        """Two frames: whatever was to be drawn is drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def lanes(self) -> Any:
        canvas = self.page.locator("#lanes canvas")
        canvas.evaluate("canvas => canvas.scrollIntoView({block: 'center', behavior: 'instant'})")
        self.settle()
        return canvas.bounding_box()

    def check(self) -> None:
        """Nothing was complained of, and nothing was asked for but the page itself."""
        assert self.complaints == []
        assert [url for url in self.requests if url not in (self.own, "data:,")] == []


@pytest.fixture
def reader(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Reader] = []

    def read(html: str, **context: Any) -> Reader:
        opened.append(Reader(browser, tmp_path / f"report{len(opened)}.html", html, **context))
        return opened[-1]

    yield read
    for one in opened:
        one.check()
        one.context.close()


@pytest.fixture(scope="module")
def html() -> str:
    profile = three_tiers(24, 6)
    return build(profile, summary_of(profile, verdict=VERDICT), idle_steps=idle_of(profile))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_every_view_draws(reader: Any, html: str, scheme: str, width: int) -> None:
    read = reader(html, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert read.page.evaluate("document.documentElement.dataset.theme") == scheme
    for view in VIEWS:
        colours = read.page.evaluate(COLOURS_ON_CANVASES, view)
        if view not in ("modules", "peak"):
            assert colours, view
        assert all(count > 8 for count in colours), (view, colours)
    assert read.page.locator("#modules tbody tr").count() > 20
    assert read.page.locator("#peak .icicle button").count() > 5
    assert read.page.evaluate("document.documentElement.scrollWidth") == width
    assert read.page.locator("h1").inner_text() == VERDICT
    assert read.page.locator(".figures > div").count() == 7
    assert read.page.locator("#diff").is_hidden()


def test_the_theme_can_be_chosen(reader: Any, html: str) -> None:
    read = reader(html, color_scheme="light")
    before = read.page.evaluate(PICTURE)
    read.page.click("#theme")
    read.settle()
    assert read.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert read.page.evaluate(PICTURE) != before


def test_drag_wheel_and_keys_zoom_all_time_plots(reader: Any, html: str) -> None:
    read = reader(html)
    page, box = read.page, read.lanes()
    whole, memory = page.evaluate(RANGE), "document.querySelector('#memory canvas').toDataURL()"
    before = page.evaluate(memory)
    page.mouse.move(box["x"] + 400, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 700, box["y"] + 60, steps=4)
    page.mouse.up()
    read.settle()
    dragged = page.evaluate(RANGE)
    assert dragged != whole
    assert page.evaluate(memory) != before
    page.mouse.wheel(0, -200)  # the plot has the focus: the wheel zooms it
    read.settle()
    wheeled = page.evaluate(RANGE)
    assert wheeled != dragged
    page.keyboard.press("ArrowRight")
    assert page.evaluate(RANGE) != wheeled
    page.keyboard.press("0")
    assert page.evaluate(RANGE) == whole


def test_a_plain_wheel_scrolls_and_says_how_to_zoom(reader: Any, html: str) -> None:
    read = reader(html)
    box, whole = read.lanes(), read.page.evaluate(RANGE)
    read.page.mouse.move(box["x"] + 400, box["y"] + 60)
    read.page.mouse.wheel(0, 120)
    read.page.wait_for_selector(".hint")
    assert read.page.evaluate(RANGE) == whole


def test_two_fingers_pinch(reader: Any, html: str) -> None:
    read = reader(html, has_touch=True)
    box, whole = read.lanes(), read.page.evaluate(RANGE)
    touch = read.context.new_cdp_session(read.page)
    y = box["y"] + 60
    for kind, left, right in (("touchStart", 500, 560), ("touchMove", 450, 610), ("touchMove", 400, 660)):
        points = [{"x": box["x"] + left, "y": y, "id": 0}, {"x": box["x"] + right, "y": y, "id": 1}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    read.settle()
    assert read.page.evaluate(RANGE) != whole


def test_a_click_on_a_module_highlights_it(reader: Any, html: str) -> None:
    read = reader(html)
    before = read.page.evaluate(PICTURE)
    row = read.page.locator("#modules tbody tr").first
    row.locator("button").click()
    read.settle()
    assert row.get_attribute("aria-selected") == "true"
    assert read.page.evaluate(PICTURE) != before
    assert read.page.locator("#lanes .detail h3").inner_text() == row.locator("button").inner_text()
    row.click()
    read.settle()
    assert read.page.evaluate(PICTURE) == before


def test_the_table_sorts_and_searches(reader: Any, html: str) -> None:
    read = reader(html)
    first = read.page.locator("#modules tbody tr td.path button").first
    read.page.locator("#modules thead button").first.click()
    assert first.inner_text() == "(root)"
    assert read.page.locator("#modules thead th").first.get_attribute("aria-sort") == "ascending"
    read.page.fill("#modules input", "layers.7.mlp")
    assert read.page.locator("#modules tbody tr").count() == 1
    read.page.press("#modules input", "Enter")
    assert read.page.locator("#lanes .detail h3").inner_text() == "model.layers.7.mlp"


def test_a_click_on_a_wait_shows_the_hops_that_ended_it(reader: Any, html: str) -> None:
    read = reader(html)
    read.lanes()
    read.page.focus("#lanes canvas")
    read.page.keyboard.press("w")
    assert read.page.locator("#lanes .detail h3").inner_text().startswith("Waiting for model.layers.")
    hops = read.page.locator("#lanes .hops li b").all_inner_texts()
    assert hops[0] == "decided"
    assert hops[-1] == "host → device"


def test_hover_tells_what_is_under_the_pointer(reader: Any, html: str) -> None:
    read = reader(html)
    box = read.lanes()
    read.page.mouse.move(box["x"] + 600, box["y"] + 70)
    assert "CausalLM" in read.page.locator("#tip").inner_text()
    read.page.mouse.move(5, 5)
    assert read.page.locator("#tip").is_hidden()


def test_a_bar_leads_to_its_step(reader: Any, html: str) -> None:
    read = reader(html)
    whole = read.page.evaluate(RANGE)
    canvas = read.page.locator("#bubbles canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.6, "y": box["height"] - 60})
    assert read.page.evaluate(RANGE) != whole


def test_the_icicle_opens(reader: Any, html: str) -> None:
    read = reader(html)
    read.page.locator("#peak .icicle button", has_text="layers").first.click()
    assert "model.layers" in read.page.locator("#peak .tools").inner_text()
    read.page.locator("#peak .icicle button").first.click()
    assert "model.layers" not in read.page.locator("#peak .tools").inner_text()


def test_two_runs_are_compared(reader: Any) -> None:
    run, other = three_tiers(12, 4), three_tiers(12, 4, seed=2, disk_gb=3.0)
    html = build(run, summary_of(run), idle_steps=idle_of(run), other=(other, summary_of(other)))
    read = reader(html)
    assert read.page.locator("#diff table").count() == 2
    assert read.page.locator("#diff table").nth(1).locator("tbody tr").count() > 10
    assert "other run" in read.page.locator("#figures").inner_text()


def test_delays_of_a_device_are_told_where_a_run_has_them(reader: Any) -> None:
    profile = training()
    delays: dict[str, Any] = {"tklqt_ns": 12_500_000, "tklqt_steps": 3, "tklqt_launches": 1200, "behind_ns": 250_000}
    known = reader(build(profile, summary_of(profile, **delays), idle_steps=idle_of(profile)))
    found = known.page.locator("#figures").inner_text().lower()
    assert "queued kernels" in found
    assert "12.5" in found
    assert "1,200 launches of 3 steps" in found.replace("\u202f", ",")
    assert "device behind" in found
    assert "250" in found
    part = summary_of(profile, tklqt_ns=5000, tklqt_steps=0, tklqt_launches=1)
    assert "1 launch of a part of a step" in reader(build(profile, part)).page.locator("#figures").inner_text()
    unknown = reader(build(profile, summary_of(profile, tklqt_ns=None, behind_ns=None))).page
    assert "queued" not in unknown.locator("#figures").inner_text().lower()


def test_an_empty_run_says_so_in_every_view(reader: Any) -> None:
    profile = profile_of([], modules={}, blocks={}, storages={})
    read = reader(build(profile, summary_of(profile, verdict="Nothing was recorded.")))
    for view in ("lanes", "bubbles", "residency", "modules", "bandwidth", "leads", "peak"):
        assert read.page.locator(f"#{view} .empty").count() == 1, view
    assert "nothing was recorded here" in read.page.locator("#memory").inner_text()


def test_a_plain_script_says_that_nothing_moved(reader: Any) -> None:
    profile = training()
    read = reader(build(profile, summary_of(profile), idle_steps=idle_of(profile)))
    assert "No block was moved" in read.page.locator("#lanes").inner_text()
    assert read.page.locator("#bandwidth .empty").count() == 1
    assert all(count > 8 for count in read.page.evaluate(COLOURS_ON_CANVASES, "lanes"))


def test_hostile_names_are_text(reader: Any) -> None:
    profile = three_tiers(6, 3)
    profile.modules = {
        n: type(m)(path=HOSTILE + m.path, kind=HOSTILE, parent=m.parent) for n, m in profile.modules.items()
    }
    profile.blocks = {
        n: type(b)(name=HOSTILE, nbytes=b.nbytes, home=b.home, module=b.module) for n, b in profile.blocks.items()
    }
    read = reader(build(profile, summary_of(profile, verdict=HOSTILE), title=HOSTILE, idle_steps=idle_of(profile)))
    assert read.page.locator("img").count() == 0
    assert read.page.title() == HOSTILE
    assert read.page.locator("h1").text_content() == HOSTILE
    assert HOSTILE in read.page.locator("#modules tbody").inner_text()


def test_a_long_run_says_what_was_merged_and_keeps_steps_exact(reader: Any) -> None:
    profile = repeated(three_tiers(24, 6), 400)
    read = reader(build(profile, summary_of(profile), idle_steps=idle_of(profile)))
    assert "Too many to draw one by one" in read.page.locator("#lanes").inner_text()
    read.page.get_by_role("button", name="Typical steps").click()
    read.settle()
    box = read.lanes()
    read.page.mouse.move(box["x"] + 600, box["y"] + 75)
    assert "stands for" not in read.page.locator("#tip").inner_text()


def test_print_is_light(reader: Any, html: str) -> None:
    read = reader(html, color_scheme="dark")
    read.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert read.page.evaluate("document.documentElement.dataset.theme") == "light"
    read.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert read.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert len(read.page.pdf()) > 10_000
