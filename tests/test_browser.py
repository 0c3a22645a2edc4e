"""Explorers in a real browser: JupyterLab on this machine, headless Chromium, menus changed, the text's colours read.

Skipped where there is no playwright, or no Chromium ($CHROMIUM, or chromium or google-chrome on the path). What the
browser shows is saved in the folder $SCREENSHOTS, if one is named.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tensorlens_utils import explore, load_data, load_model
from tensorlens_utils.baselines import rollout
from tensorlens_utils.collapse.explaining import coloured
from tensorlens_utils.notebooks import normal, text_of

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: it comes with the dev extra")
CHROMIUM = next(filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "google-chrome"))]), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium or google-chrome on the path, nor in $CHROMIUM")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update"]  # fmt: skip
LONG = 120_000  # ms, for what waits on a kernel that imports torch on a busy machine
TEXT, TYPED = "the plot was far from dull .", "the film was dull ."
REVIEW = f"""import time
from pathlib import Path

from tensorlens_utils import baselines, collapse, explore, load_model


def slow(model, inputs, target):
    while not Path("enough").exists():  # until the test has looked at what is shown meanwhile
        time.sleep(0.05)
    raise RuntimeError("no <b>attention</b> here")

methods = {{"class": collapse.METHODS["class"], "rollout": baselines.rollout, "slow": slow}}
explore(*load_model("tiny-bert"), [{TEXT!r}], methods)"""
DIGIT = """from tensorlens_utils import explore, load_data, load_model

explore(*load_model("tiny-vit"), load_data("digits").select(range(3)))"""
HEADS = """from tensorlens_utils import load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses import unembedding
from tensorlens_utils.lenses.exploring import explore_heads
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.training import train

model, tokenizer = load_model("tiny-gpt")
heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
text = [heads.capture({"input_ids": world.Text(seed).rows(2)}, scale=True) for seed in range(6)]
moments = Moments.of(text)
lenses = {"lens": train(heads, text, steps=0, moments=moments), "unembedding": unembedding(heads, moments)}
explore_heads(lenses, ["the capital of france is"])"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of three notebooks, and the address of each by name; all that the server writes is temporary."""
    home = tmp_path_factory.mktemp("lab")
    for name, source in {"review": REVIEW, "digit": DIGIT, "heads": HEADS}.items():
        (home / f"{name}.ipynb").write_text(text_of(normal(new_notebook(cells=[new_code_cell(source)]))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER{name}_DIR": str(home / f"jupyter{name.lower()}") for name in (
        "_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
         "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={home}",
         "--LabApp.news_url=None"], env={**os.environ, **folders}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api")
                break
            except OSError:
                assert server.poll() is None, "JupyterLab ended at once"
                time.sleep(0.5)
        yield home, lambda name: f"http://127.0.0.1:{port}/lab/workspaces/{name}/tree/{name}.ipynb?token=t"
    finally:
        server.terminate()  # it ends its kernels
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(lab, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 2400})  # tall: Lab draws only the cells in view
    page.set_default_timeout(LONG)
    yield page
    page.close()


def opened(page, address, run=True):
    page.goto(address)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    if run:  # not before there is a kernel: what is asked of none is lost
        page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(state="attached")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells").first.click()
        page.locator(".widget-html b").first.wait_for()


def photograph(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", clip={"x": 0, "y": 0, "width": 1300, "height": 900})


def words(page):
    """The coloured tokens: [(word, colour)]."""
    read = "all => all.map(e => [e.textContent, e.style.background])"
    return page.eval_on_selector_all(".widget-html span[title]", read)


def waits_for(page, title):
    page.wait_for_function("text => document.querySelector('.widget-html b')?.textContent.startsWith(text)", arg=title)


def same_colours(page, scores, tokens):
    expected = [[float(x) for x in re.findall(r"[\d.]+", colour)] for colour in
                re.findall(r"rgba\([^)]*\)", coloured(scores, tokens))]  # fmt: skip
    shown = [[float(x) for x in re.findall(r"[\d.]+", colour)] for _, colour in words(page)]
    assert [len(colour) for colour in shown] == [4] * len(expected)
    for one, other in zip(shown, expected, strict=True):
        assert one == pytest.approx(other, abs=5e-3)


def test_menus_change_the_text(lab, page):
    opened(page, lab[1]("review"))
    before, tokens = words(page), ["[CLS]", *TEXT.split(), "[SEP]"]
    assert [word for word, _ in before] == tokens
    photograph(page, "review")

    page.get_by_label("method").select_option("rollout")
    waits_for(page, "rollout")
    model, tokenizer = load_model("tiny-bert")
    same_colours(page, rollout(model, tokenizer(TEXT, return_tensors="pt"))[0], tokens)
    assert words(page) != before
    photograph(page, "review_rollout")

    page.get_by_label("text", exact=True).fill(TYPED)
    page.keyboard.press("Enter")
    page.wait_for_function("word => document.querySelectorAll('.widget-html span[title]')[4]?.textContent === word",
                           arg="dull")  # fmt: skip
    assert [word for word, _ in words(page)] == ["[CLS]", *TYPED.split(), "[SEP]"]
    waits_for(page, "rollout: “negative”")  # the menu of targets has followed

    page.get_by_label("method").select_option("slow")  # disabled meanwhile, and the error is not lost
    page.locator(".widget-html i", has_text="computing").wait_for()
    sync_api.expect(page.locator(".widget-dropdown select:enabled")).to_have_count(0, timeout=LONG)
    (lab[0] / "enough").touch()
    page.locator(".widget-html summary").wait_for()
    assert "RuntimeError: no <b>attention</b> here" in page.locator(".widget-html").first.text_content()
    photograph(page, "review_error")
    page.get_by_label("method").select_option("class")
    waits_for(page, "class")
    assert len(words(page)) == 7


def test_menus_change_the_image(lab, page):
    opened(page, lab[1]("digit"))

    def patches():
        read = "all => all.map(e => e.parentNode.getAttribute('fill'))"
        return page.eval_on_selector_all(".widget-html rect title", read)

    before = patches()
    assert len(before) == 16
    photograph(page, "digit")
    page.get_by_label("layer").select_option("before block 2")
    waits_for(page, "class, before block 2")
    assert len(patches()) == 16 and patches() != before
    assert "of the class token" in page.locator(".widget-html").last.text_content()
    photograph(page, "digit_layer")


def test_menus_change_the_head_and_the_text(lab, page):
    opened(page, lab[1]("heads"))
    cells, framed = ".widget-html td[title]", ".widget-html td[style*='2px']"
    assert page.locator(cells).count() == 32
    assert page.locator(framed).get_attribute("title").startswith("layer 0, head 0\nlens (KL ")
    photograph(page, "heads")
    page.get_by_label("head", exact=True).select_option("layer 2, head 3")
    page.locator(".widget-html b", has_text="layer 2, head 3, at “is”").wait_for()
    word, told = page.locator(framed).text_content(), page.locator(framed).get_attribute("title")
    assert told.startswith("layer 2, head 3\nlens (KL ") and f"): {word} 0." in told and "\nunembedding (KL " in told
    headings = [text.split(",")[0] for text in page.locator(".widget-html b").all_text_contents()]
    assert headings == ["layer 2", "lens", "unembedding", "the model itself"]
    page.get_by_label("text", exact=True).fill("the capital of spain is")
    page.keyboard.press("Enter")
    page.locator(".widget-html div", has_text="madrid").last.wait_for()
    photograph(page, "heads_typed")


def test_without_a_run_the_still_is_there(lab, page):
    """As git keeps a notebook: in the normal form, which holds no widget."""
    board = explore(*load_model("tiny-vit"), load_data("digits").select(range(3)))
    output = new_output("execute_result", data=board._repr_mimebundle_(), execution_count=1)
    stored = new_notebook(cells=[new_code_cell(DIGIT, execution_count=1, outputs=[output])])
    (lab[0] / "stored.ipynb").write_text(text_of(normal(stored)))
    opened(page, lab[1]("stored"), run=False)
    still = page.locator(".jp-OutputArea-output img")
    still.wait_for()
    assert still.evaluate("image => image.naturalWidth") == 675
    assert page.locator(".jp-OutputArea-output select").count() == 0
    photograph(page, "digit_still")
