"""The lesson in a real browser: headless Chromium, driven by selenium, checked with axe-core."""

import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_docs import PAGES, REFERENCE, site  # noqa: F401 - a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
ASSET_LIMIT = 3_000_000  # bytes that a page loads, the theme's own files included

if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

sys.path.insert(0, str(ROOT / "docs"))
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage"]  # fmt: skip


@pytest.fixture(scope="module")
def address(site):  # noqa: F811
    """The lesson, served on localhost."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def driver(address, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def show(driver, url, width=1400, scheme="light", motion="no-preference"):
    """Open a page in a window of this width, with these wishes of the reader."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wishes = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", motion)]
    features = [{"name": name, "value": value} for name, value in wishes]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(url)


def center(driver, element):
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)


def load_pictures(driver):
    """Have lazy pictures come too, and wait for all."""
    driver.execute_async_script(
        "const done = arguments[0];"
        "for (const i of document.images) i.loading = 'eager';"
        "Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => done())"
    )


def requests_of(driver):
    """Addresses that the browser asked for since the last look."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def faults_of(driver):
    """What the console complained about since the last look."""
    errors = [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    return [e for e in errors if "favicon" not in e["message"]]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole_quiet_and_alone(driver, address, page):
    """Every picture arrives, the console stays silent, nothing is asked of another host."""
    driver.get("about:blank")  # the browser's own start page has requests of its own
    for kind in ("performance", "browser"):
        driver.get_log(kind)
    show(driver, f"{address}/{page}.html")
    load_pictures(driver)
    pictures = driver.execute_script(
        "return [...document.images].map(i => [i.currentSrc, i.naturalWidth, i.alt])"
    )
    assert [p for p in pictures if not p[1] or not p[2].strip()] == []
    outside = [url for url in requests_of(driver) if not url.startswith((address, "data:"))]
    assert outside == []
    assert faults_of(driver) == []


@pytest.mark.parametrize("page", PAGES)
def test_page_is_light(driver, address, page):
    show(driver, f"{address}/{page}.html")
    load_pictures(driver)
    loaded = driver.execute_script(
        "return [...performance.getEntriesByType('resource'),"
        "...performance.getEntriesByType('navigation')].map(e => [e.name, e.encodedBodySize])"
    )
    others = [size for name, size in loaded if not name.endswith(".mp4")]  # the film counts once
    total = sum(others) + video_bytes(driver)
    assert total < ASSET_LIMIT, sorted(loaded, key=lambda entry: -entry[1])[:10]


def video_bytes(driver):
    """The film is fetched piece by piece, so its size is asked of the server."""
    return driver.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.querySelectorAll('video source')].map(s =>"
        " fetch(s.src, {method: 'HEAD'}).then(r => Number(r.headers.get('content-length')))))"
        ".then(sizes => done(sizes.reduce((a, b) => a + b, 0)))"
    )


# ---- Sliders -------------------------------------------------------------------------------------


def state(slider):
    """Where the strip stands and what the readout says."""
    strip = slider.find_element(By.CSS_SELECTOR, ".slider-strip")
    values = slider.find_elements(By.CSS_SELECTOR, "dd")
    return strip.value_of_css_property("transform"), [v.text for v in values]


SLIDERS = {"forward": "1_noise", "reverse": "2_denoising", "sweep": "2_denoising"}


@pytest.mark.parametrize("name", SLIDERS)
def test_slider_by_keyboard_and_mouse(driver, address, name):
    show(driver, f"{address}/{SLIDERS[name]}.html")
    load_pictures(driver)
    frames = json.loads((REFERENCE / f"slider_{name}.json").read_text())["frames"]
    slider = driver.find_element(By.ID, f"slider-{name}")
    assert not slider.find_element(By.CSS_SELECTOR, ".slider-still").is_displayed()
    knob = slider.find_element(By.CSS_SELECTOR, "input[type=range]")
    center(driver, knob)

    knob.send_keys(Keys.HOME)
    picture, values = state(slider)
    first = frames[0].get("t", frames[0].get("steps"))
    assert values[0] == str(first)
    for key, frame in ((Keys.ARROW_RIGHT, 1), (Keys.END, -1), (Keys.ARROW_LEFT, -2)):
        knob.send_keys(key)
        moved, values = state(slider)
        assert moved != picture
        assert values[0] == str(frames[frame].get("t", frames[frame].get("steps")))
        assert values[0] in knob.get_attribute("aria-valuetext")
        picture = moved

    pixels = []
    window = slider.find_element(By.CSS_SELECTOR, ".slider-window")
    for share in (-0.4, 0.4):
        actions = webdriver.ActionChains(driver)
        actions.move_to_element_with_offset(knob, int(knob.rect["width"] * share), 0).click()
        actions.perform()
        pixels.append((window.screenshot_as_png, state(slider)[1]))
    assert pixels[0][0] != pixels[1][0], "the picture has to change"
    assert pixels[0][1] != pixels[1][1], "the numbers have to change"


def test_slider_by_touch(driver, address):
    show(driver, f"{address}/1_noise.html", width=390)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    slider = driver.find_element(By.ID, "slider-forward")
    knob = slider.find_element(By.CSS_SELECTOR, "input[type=range]")
    center(driver, knob)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", knob)
    before = state(slider)
    assert box["height"] >= 40, "large enough for a thumb"
    point = {"x": box["x"] + box["width"] * 0.9, "y": box["y"] + box["height"] / 2}
    for kind, points in (("touchStart", [point]), ("touchEnd", [])):
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    WebDriverWait(driver, 10).until(lambda _: state(slider) != before)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_play_button_moves_the_frames_and_stops(driver, address):
    show(driver, f"{address}/1_noise.html")
    slider = driver.find_element(By.ID, "slider-forward")
    button = slider.find_element(By.CSS_SELECTOR, ".slider-play")
    center(driver, button)
    before = state(slider)
    button.send_keys(Keys.ENTER)
    wait = WebDriverWait(driver, 10)
    wait.until(lambda _: state(slider) != before)
    button.send_keys(Keys.ENTER)
    assert button.text == "Play"
    after = state(slider)
    assert driver.execute_async_script("setTimeout(arguments[0], 400)") is None
    assert state(slider) == after


def test_reduced_motion_stops_everything(driver, address):
    show(driver, f"{address}/1_noise.html", motion="reduce")
    assert not any(b.is_displayed() for b in driver.find_elements(By.CSS_SELECTOR, ".slider-play"))
    show(driver, f"{address}/index.html", motion="reduce")
    video = driver.find_element(By.CSS_SELECTOR, "video.morph")
    assert driver.execute_script("return arguments[0].paused", video)
    show(driver, f"{address}/index.html")
    video = driver.find_element(By.CSS_SELECTOR, "video.morph")
    center(driver, video)
    wait = WebDriverWait(driver, 20)
    wait.until(lambda d: not d.execute_script("return arguments[0].paused", video))


def test_without_javascript_there_are_still_figures(driver, address):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        for page in sorted(set(SLIDERS.values())):
            show(driver, f"{address}/{page}.html")
            for slider in driver.find_elements(By.CSS_SELECTOR, ".slider"):
                assert slider.find_element(By.CSS_SELECTOR, ".slider-still img").is_displayed()
                assert not slider.find_element(By.CSS_SELECTOR, ".slider-live").is_displayed()
        show(driver, f"{address}/3_training.html")
        question = driver.find_element(By.CSS_SELECTOR, ".quiz summary")
        center_without_script(driver, question)
        question.click()
        explanation = driver.find_element(By.CSS_SELECTOR, ".quiz details p")
        assert explanation.is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def center_without_script(driver, element):
    webdriver.ActionChains(driver).scroll_to_element(element).perform()


# ---- Dropdowns and quiz --------------------------------------------------------------------------


def test_dropdowns_open_by_mouse_and_keyboard(driver, address):
    show(driver, f"{address}/2_denoising.html")
    folded = driver.find_elements(By.CSS_SELECTOR, "details.sd-dropdown")
    assert len(folded) > 5
    for number, details in enumerate(folded):
        if details.find_elements(By.XPATH, "ancestor::details"):
            continue  # a solution inside a fold: opened with it
        assert details.get_attribute("open") is None
        summary = details.find_element(By.TAG_NAME, "summary")
        center(driver, summary)
        summary.click() if number % 2 else summary.send_keys(Keys.ENTER)
        assert details.get_attribute("open") is not None
        assert details.find_element(By.CSS_SELECTOR, ".sd-summary-content").is_displayed()


def test_quiz_by_keyboard(driver, address):
    show(driver, f"{address}/3_training.html")
    questions = driver.find_elements(By.CSS_SELECTOR, ".quiz")
    assert len(questions) == 8
    for question in questions:
        right = question.get_attribute("data-answer")
        answers = question.find_elements(By.CSS_SELECTOR, "input[type=radio]")
        center(driver, question)
        answers[0].send_keys(Keys.SPACE)
        verdict = question.find_element(By.CSS_SELECTOR, ".quiz-verdict")
        for number, answer in enumerate(answers, 1):
            if number > 1:
                answers[number - 2].send_keys(Keys.ARROW_DOWN)
            assert answer.is_selected()
            assert verdict.text.startswith("Right" if str(number) == right else "Not quite")
        summary = question.find_element(By.TAG_NAME, "summary")
        summary.send_keys(Keys.ENTER)
        explanation = question.find_element(By.CSS_SELECTOR, "details p")
        assert explanation.text == f"Answer {'ABC'[int(right) - 1]}."


# ---- Looks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, from the npm registry."""
    if "AXE_CORE" in os.environ:
        return Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "axe-core@4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("page", PAGES)
def test_accessible(driver, address, axe, page, width, scheme):
    """No violation of WCAG 2.1 A and AA or of axe's good practice, everything unfolded."""
    show(driver, f"{address}/{page}.html", width, scheme)
    assert driver.execute_script("return document.documentElement.dataset.theme") == scheme
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    driver.execute_script(axe)
    report = driver.execute_async_script("axe.run().then(arguments[0])")
    faults = [
        f"{v['id']}: {v['help']}: {[n['html'][:160] for n in v['nodes']][:4]}"
        for v in report["violations"]
    ]
    assert faults == []


@pytest.mark.parametrize("page", PAGES)
def test_nothing_sticks_out_on_a_phone(driver, address, page):
    show(driver, f"{address}/{page}.html", width=390)
    load_pictures(driver)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390


def test_theme_can_be_switched(driver, address):
    show(driver, f"{address}/index.html")
    colours = set()
    for theme in ("light", "dark"):
        driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        body = driver.find_element(By.TAG_NAME, "body")
        colours.add(body.value_of_css_property("background-color"))
    assert len(colours) == 2


def test_mathematics_has_its_font_and_is_readable_as_text(driver, address):
    show(driver, f"{address}/2_denoising.html")
    driver.execute_async_script("document.fonts.ready.then(() => arguments[0]())")
    assert driver.execute_script("return document.fonts.check('16px \"Lesson Math\"')")
    formulas = driver.find_elements(By.TAG_NAME, "math")
    assert len(formulas) > 30
    assert all(formula.get_attribute("alttext") for formula in formulas)
    heights = [f.rect["height"] for f in formulas if f.is_displayed()]
    assert min(heights) > 5


# ---- The playground ------------------------------------------------------------------------------


@pytest.fixture
def playground(driver, address):
    """playground(address, **settings): the page in a fresh state, its form filled in."""
    driver.get("about:blank")
    for kind in ("performance", "browser"):
        driver.get_log(kind)

    def visit(url=f"{address}/playground.html", **settings):
        show(driver, url)
        fill_in(driver, **settings)

    return visit


def fill_in(driver, **settings):
    for name, value in settings.items():
        driver.execute_script(
            "const field = document.querySelector(`.playground [name=${arguments[0]}]`);"
            "field.value = arguments[1]; field.dispatchEvent(new Event('input'))", name, value,
        )  # fmt: skip


def press(driver, button):
    """Press a button by keyboard."""
    driver.find_element(By.CSS_SELECTOR, f".playground {button}").send_keys(Keys.ENTER)


DRAW, STOP, ANOTHER = "[type=submit]", "[name=stop]", "[name=another]"


def said(driver):
    return driver.find_element(By.CSS_SELECTOR, ".playground [role=status]").text


def forget(driver):
    """Clear what was said, so that the same may be waited for again."""
    driver.execute_script("document.querySelector('.playground [role=status]').textContent = ''")


def wait_until(driver, condition, seconds=300):
    WebDriverWait(driver, seconds, poll_frequency=0.1).until(lambda _: condition())


def fabrics_of(driver):
    """The pixels of every fabric: [fabric, x_t or the guess of x_0, 32, 32, 3]."""
    addresses = driver.execute_script(
        "return [...document.querySelectorAll('.playground canvas')].map(c => c.toDataURL())"
    )
    files = [io.BytesIO(base64.b64decode(address.split(",")[1])) for address in addresses]
    pixels = np.array([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return pixels.reshape(-1, 2, 32, 32, 3)


def node_fabrics(jobs):
    """The same, by the same engine under Node."""
    import make_playground

    walks = make_playground.run_engine([{**job, "all": True} for job in jobs])
    steps = jobs[0]["steps"] + 1
    return make_playground.to_bytes(walks.reshape(len(jobs), steps, 2, 32, 32, 3)[:, -1])


@needs_node
@pytest.mark.parametrize("kind", ["file", "http"])
def test_the_playground_draws_what_node_draws(driver, address, site, playground, kind):  # noqa: F811
    """From a file and from a server: nothing big before the click, nothing from elsewhere after."""
    start = site.as_uri() if kind == "file" else address
    playground(f"{start}/playground.html", tradition=8, steps=5, seed=3)
    before = requests_of(driver)
    assert not [url for url in before if url.endswith(("engine.js", "weights.js"))]
    press(driver, DRAW)
    wait_until(driver, lambda: said(driver).startswith("Drawn in"))
    job = {"seed": 3, "label": 8, "guidance": 2, "steps": 5}
    assert (fabrics_of(driver) == node_fabrics([job])).all()
    press(driver, ANOTHER)
    wait_until(driver, lambda: said(driver).startswith("Drawn in"))
    assert (fabrics_of(driver) == node_fabrics([job, {**job, "label": 9}])).all()
    after = requests_of(driver)
    assert len([url for url in after if url.endswith(("engine.js", "weights.js"))]) == 2
    own = (start, "blob:", "data:")
    assert [url for url in before + after if not url.startswith(own)] == []
    assert faults_of(driver) == []


@needs_node
def test_nine_fabrics_stopped_and_drawn_again(driver, playground, axe):
    """Stopped, all keep what is seen; drawn again, all become what they have to be."""
    playground(count=9, steps=50, guidance=0, seed=20, tradition=-1)
    press(driver, DRAW)
    begun = re.compile(r"step [1-9]\d*/50")  # a busy machine may miss the first
    wait_until(driver, lambda: begun.search(driver.find_element(By.TAG_NAME, "body").text))
    press(driver, STOP)
    assert said(driver).startswith("Stopped")
    stopped = fabrics_of(driver)
    assert len(stopped) == 9
    assert driver.execute_async_script("setTimeout(arguments[0], 500)") is None
    assert (fabrics_of(driver) == stopped).all()
    press(driver, ANOTHER)
    assert said(driver).startswith("Nine fabrics are the most")
    fill_in(driver, steps=3)
    press(driver, DRAW)
    wait_until(driver, lambda: said(driver).startswith("Drawn in"))
    jobs = [{"seed": 20 + i, "label": -1, "guidance": 0, "steps": 3} for i in range(9)]
    assert (fabrics_of(driver) == node_fabrics(jobs)).all()
    driver.execute_script(axe)
    for theme in ("light", "dark"):
        driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        report = driver.execute_async_script("axe.run('.playground').then(arguments[0])")
        assert report["violations"] == [], theme


def test_the_playground_pauses_in_a_hidden_tab(driver, playground):
    playground(steps=50, guidance=0)
    driver.execute_script(
        "Object.defineProperty(document, 'hidden', {get: () => window.away, configurable: true})"
    )
    turn = "window.away = arguments[0]; document.dispatchEvent(new Event('visibilitychange'))"
    press(driver, DRAW)
    wait_until(driver, lambda: said(driver) == "Drawing.")
    driver.execute_script(turn, True)
    wait_until(driver, lambda: said(driver) == "Paused while the page is hidden.")
    held = fabrics_of(driver)
    assert driver.execute_async_script("setTimeout(arguments[0], 500)") is None
    assert (fabrics_of(driver) == held).all()
    driver.execute_script(turn, False)
    wait_until(driver, lambda: said(driver) == "Drawn.")  # in how many seconds would mislead


def test_less_motion_is_a_picture_a_second(driver, address):
    """Whoever asks the system for less motion sees few steps, and the last one."""
    show(driver, f"{address}/playground.html", motion="reduce")
    fill_in(driver, steps=50, guidance=0)
    press(driver, DRAW)
    driver.execute_script(
        "window.painted = []; const canvas = document.querySelector('.playground canvas');"
        "new MutationObserver(() => painted.push(canvas.ariaLabel.split(' ').at(-1)))"
        ".observe(canvas, {attributeFilter: ['aria-label']})"
    )
    wait_until(driver, lambda: said(driver).startswith("Drawn in"))
    painted = driver.execute_script("return window.painted")
    assert painted[-1] == "50"
    assert len(painted) <= float(said(driver).split()[2]) + 2


MISFORTUNES = {
    "delete WebAssembly": "cannot run the network",
    "delete DecompressionStream": "cannot run the network",
    "WebAssembly.compile = () => Promise.reject(new WebAssembly.CompileError());"
    " WebAssembly.validate = () => false": "cannot run the network",
    "WebAssembly.compile = () => Promise.reject(new WebAssembly.CompileError())": "forbid the page",
    "WebAssembly.compile = () => Promise.reject(new RangeError())": "no memory left",
    "window.atob = () => ''": "did not load",
    "delete window.Worker": "The network stopped (Worker is not defined)",
    "Worker = function () { this.terminate = () => {}; this.postMessage = () => setTimeout(() =>"
    " this.onerror({})) }": "forbid the page",
    "Worker = function () { this.terminate = () => {}; this.postMessage = () => setTimeout(() =>"
    " this.onmessage({data: {failed: 'x', noMemory: true}})) }": "no memory left",
    "Worker = function () { this.terminate = () => {}; this.postMessage = () => setTimeout(() =>"
    " this.onerror({message: 'broken'})) }": "The network stopped (broken)",
}  # fmt: skip


@pytest.mark.parametrize("harm", MISFORTUNES)
def test_a_misfortune_is_one_sentence(driver, playground, harm):
    script = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": harm})
    try:
        playground()
        if driver.find_element(By.CSS_SELECTOR, ".playground form").is_displayed():
            press(driver, DRAW)
        wait_until(driver, lambda: MISFORTUNES[harm] in said(driver))
        too_old = "cannot run" in said(driver)
        still = driver.find_element(By.CSS_SELECTOR, ".playground-still")
        form = driver.find_element(By.CSS_SELECTOR, ".playground form")
        assert (still.is_displayed(), form.is_displayed()) == (too_old, not too_old)
        assert faults_of(driver) == []
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_a_file_that_is_missing_may_come_later(driver, playground):
    driver.execute_cdp_cmd("Network.enable", {})
    playground(steps=2)
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/weights.js"]})
    press(driver, DRAW)
    wait_until(driver, lambda: "did not load" in said(driver))
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    press(driver, DRAW)
    wait_until(driver, lambda: said(driver).startswith("Drawn in"))


def test_the_playground_without_javascript(driver, address):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(driver, f"{address}/playground.html")
        assert driver.find_element(By.CSS_SELECTOR, ".playground-still img").is_displayed()
        assert not driver.find_element(By.CSS_SELECTOR, ".playground-live").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("page", [page for page in PAGES if page != "playground"])
def test_other_pages_load_nothing_of_the_playground(site, page):  # noqa: F811
    assert "playground/" not in (site / f"{page}.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "limit"), [(0, 3), (2, 6)])
def test_the_playground_is_fast(driver, playground, guidance, limit):
    """A fabric of 20 steps on one core; the page answers meanwhile."""
    playground(guidance=guidance, steps=20)
    driver.execute_script(
        "window.longest = 0; let last = performance.now(); const beat = () => {"
        " const now = performance.now(); window.longest = Math.max(window.longest, now - last);"
        " last = now; setTimeout(beat, 10) }; beat()"
    )
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        press(driver, DRAW)
        wait_until(driver, lambda: said(driver).startswith("Drawn in"))
        seconds.append(float(said(driver).split()[2]))
        forget(driver)
    assert min(seconds) <= limit
    assert driver.execute_script("return window.longest") < 500, "milliseconds"


@pytest.mark.slow
def test_the_playground_keeps_its_memory(driver, playground):
    """Fifty fabrics leave no more behind than five."""
    playground(steps=2, guidance=0)

    def draw(times):
        for _ in range(times):
            press(driver, DRAW)
            wait_until(driver, lambda: said(driver).startswith("Drawn in"))
            forget(driver)
        driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        return memory_of(driver.service.process.pid)

    before = draw(5)
    assert draw(50) < before + 20e6, "bytes"


def memory_of(process):
    """The resident bytes of a process's descendants that are not shared."""
    children, own = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields["PPid"]), []).append(int(folder.name))
        own[int(folder.name)] = int(fields.get("RssAnon", "0 kB").split()[0]) * 1000

    def total(number):
        return own[number] + sum(map(total, children.get(number, [])))

    return total(process)
