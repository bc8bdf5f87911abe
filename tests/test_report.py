"""`controlnet report`: pages that a real browser shows, filters, sorts and plays, without a word of complaint."""

import json
import re
import shutil

import numpy as np
import pytest
from controlnet.model.report.page import MARK, as_data, write_page
from controlnet.model.report.runs import POINTS, thinned
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes, read_image
from controlnet.preprocessors.metadata import dump
from helpers import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIDE = 32


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium; apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def eventually(locator):
    """What holds at last, of something that a page does in its own time."""
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture
def opened(browser):
    """Opens a page; whatever it complains of, or asks of a network, is an error at the end."""
    complaints, context = [], browser.new_context(viewport={"width": 1200, "height": 800})

    def open_page(path):
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert complaints == []


def picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def results(tmp_path):
    """Three images with their records: of the first the condition is there and kept, of the second not kept."""
    edges = np.zeros((SIDE, SIDE, 3), np.uint8)
    edges[8:24, 8] = edges[8:24, 23] = edges[8, 8:24] = edges[23, 8:24] = 255
    write_file(tmp_path / "box.canny.png", png_bytes(edges))
    box = np.full((SIDE, SIDE, 3), 255, np.uint8)
    box[9:24, 9:24] = 0
    folder = tmp_path / "set"
    folder.mkdir()
    for name, image, prompt, path in (
        ("1-a.png", box, "a black box </script><b>", "box.canny.png"),
        ("2-b.png", picture(1), "a red cone", "box.canny.png"),
        ("10-c.png", picture(2), "a blue cone", "gone.canny.png"),
    ):
        record = {
            "prompt": prompt, "seed": 1, "steps": 4, "guidance": 3.0, "size": [SIDE, SIDE], "base": "tiny",
            "conditions": [
                {"path": str(tmp_path / path), "kind": "canny", "net": "tiny-canny", "scale": 1.0, "start": 0, "end": 1}
            ],
        }  # fmt: skip
        write_file(folder / name, png_bytes(image, dump(record)))
    write_file(folder / "preview.png", png_bytes(picture(9)))
    return folder


def test_a_page_of_results(results, opened, capsys):
    assert run("report", str(results)) == 0
    page = opened(results / "report.html")
    assert capsys.readouterr().out.strip() == str(results / "report.html")
    assert page.locator("#count").inner_text().startswith("3 images, mean score 0.")
    names = page.locator(".card .name span:first-child")
    assert names.all_text_contents() == ["1-a.png", "2-b.png", "10-c.png"]
    assert page.locator(".card p").first.inner_text() == "a black box </script><b>"

    # Sorting and filtering.
    page.locator("#sort").select_option("main-up")
    assert names.all_text_contents() == ["2-b.png", "1-a.png", "10-c.png"]
    page.locator("#sort").select_option("main-down")
    assert names.all_text_contents()[0] == "1-a.png"
    page.locator("#find").fill("CONE red")
    assert page.locator(".card:visible .name span:first-child").all_text_contents() == ["2-b.png"]
    assert page.locator("#count").inner_text().startswith("1 of 3 images")
    page.locator("#find").fill("")
    page.locator("#least").fill("0.6")
    assert page.locator(".card:visible").count() == 1

    # One image by the keyboard: its views, its command, the neighbour, and out again.
    page.locator("#least").fill("0")
    page.locator(".card").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#one-name").inner_text() == "1-a.png"
    assert page.locator("#one-views figcaption").all_text_contents()[:2] == ["image", "canny map"]
    assert page.locator("#one-command").inner_text().startswith("controlnet replay ")
    page.locator("#one-copy").click()
    eventually(page.locator("#one-copy")).to_have_text("copied")
    page.keyboard.press("ArrowRight")
    assert page.locator("#one-name").inner_text() == "2-b.png"
    page.keyboard.press("Escape")
    assert not page.locator("#one").is_visible()

    # The map in the place of the image; a picture is on the screen; dark and light.
    page.locator("#view").select_option("canny map")
    assert page.locator(".card img").first.get_attribute("src").startswith("data:image/webp")
    assert on_screen(page).std() > 10
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def on_screen(page):
    return read_image(page.screenshot(), "screenshot")[0]


def test_a_thousand_images_stay_quick(tmp_path, opened):
    """Only those near the window have their pictures."""
    src = as_data(picture(0), SIDE)
    items = [
        {
            "name": f"{k}.png", "href": "", "size": [256, 256], "prompt": f"number {k}", "scores": {}, "why": [],
            "views": [{"label": "image", "src": src}], "main": (k * 7919 % 1000) / 1000, "facts": [], "command": "",
        }
        for k in range(1000)
    ]  # fmt: skip
    write_page(tmp_path / "report.html", "results.html.j2", "many", {"items": items, "kinds": [], "measures": {}})
    page = opened(tmp_path / "report.html")
    there = re.compile("^data:")
    eventually(page.locator(".card img").first).to_have_attribute("src", there)
    assert 0 < page.locator(".card img[src]").count() < 200
    page.locator("#sort").select_option("main-up")
    shown = page.evaluate("[...document.querySelectorAll('.card')].map(card => card.item.main)")
    assert len(shown) == 1000 and shown == sorted(shown)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    eventually(page.locator(".card img").last).to_have_attribute("src", there)


def make_run(folder, looks, held=True):
    settings = {"max_steps": 400, "learning_rate": 1e-5, "accumulation": 1, "kind": "canny", "base": "tiny"}
    data = {"name": "photos", "form": "photos", "pairs": 500, "held_out": 50}
    (folder / "pictures").mkdir(parents=True)
    settings["seed"] = looks
    record = {"settings": settings, "facts": {}, "data": data, "size": SIDE}
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"step": 10 * k, "loss": 0.4 - 0.001 * k, "lr": 1e-5, "seconds": k} for k in range(1, 31)]
    for k in range(looks):
        gap = 0 if k < 2 else 0.02 * k
        rows.append({"step": 100 * k, "control_gap": gap, "band": 0.004, "validation_loss": 0.4 - 0.01 * k})
        shot = np.full((SIDE, 2 * SIDE, 3), 60 * k, np.uint8)
        write_file(folder / "pictures" / f"step-{100 * k:07d}.png", png_bytes(shot))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if held:
        write_file(folder / "pictures" / "held-out.png", png_bytes(np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)))
    return folder


def brightness(page):
    """Of the picture that was made, as the browser has it."""
    return page.evaluate(
        """async () => {
            const image = document.querySelector("img[alt='what the network made of it']");
            await image.decode();
            const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0, 1, 1);
            return context.getImageData(0, 0, 1, 1).data[0];
        }"""
    )


def test_a_page_of_a_run(tmp_path, opened):
    folder = make_run(tmp_path / "runs" / "photos-1", 4)
    assert run("report", str(folder)) == 0
    page = opened(folder / "report.html")
    assert "stopped" in page.locator(".verdict").inner_text()
    assert page.locator("#gap svg polyline").count() == 1 and page.locator("#loss svg polyline").count() == 2
    assert page.locator(".strip img").count() == 6
    assert page.locator("#step-value").inner_text() == "step 300" and brightness(page) == pytest.approx(180, abs=4)
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#step-value").inner_text() == "step 200" and brightness(page) == pytest.approx(120, abs=4)
    cursor = page.locator("#gap .cursor")
    before = float(cursor.get_attribute("x1"))
    page.locator("#step").fill("0")
    assert float(cursor.get_attribute("x1")) < before
    page.locator("#play").click()
    eventually(page.locator("#step-value")).to_have_text("step 300")
    assert on_screen(page).std() > 5
    assert "learning_rate" in page.locator("#settings").inner_text()


def test_runs_side_by_side(tmp_path, opened):
    runs = [make_run(tmp_path / "runs" / f"photos-{k}", k + 1, held=k > 1) for k in range(1, 4)]
    assert run("report", *map(str, runs)) == 0
    page = opened(tmp_path / "runs" / "report.html")
    assert page.locator(".verdict").count() == 3
    assert page.locator("#gap svg polyline").count() == 3
    assert page.locator("#settings th").all_text_contents()[1:4] == [run.name for run in runs]
    assert page.locator("#settings tr.differs th").all_text_contents() == ["seed"]
    assert page.locator("#settings tr").count() == 2  # what differs alone
    page.locator("#only").uncheck()
    assert page.locator("#settings tr").count() > 4


def test_a_run_that_has_measured_nothing(tmp_path, opened):
    folder = make_run(tmp_path / "photos-1", 0, held=False)
    (folder / "log.jsonl").unlink()
    assert run("report", str(folder)) == 0
    page = opened(folder / "report.html")
    assert "nothing measured yet" in page.locator("#gap").inner_text()
    assert not page.locator("#over-steps").is_visible()


def test_a_long_log_is_thinned():
    points = thinned([[k, 1.0 + k % 2] for k in range(10 * POINTS)])
    assert len(points) == POINTS
    assert points[0][0] == pytest.approx(4.5) and all(value == pytest.approx(1.5) for _, value in points)


def test_a_page_is_renewed_and_another_file_is_not(results, capsys):
    page = results / "report.html"
    assert run("report", str(results), "--no-score") == 0
    assert MARK in page.read_text() and "mean score" not in re.sub(r"(?s)<script.*", "", page.read_text())
    assert run("report", str(results), "--no-score") == 0
    page.write_text("my notes")
    assert run("report", str(results), "--no-score") == Exit.OUTPUT
    assert page.read_text() == "my notes" and "--overwrite" in capsys.readouterr().err
    assert run("report", str(results), "--no-score", "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gone/"], Exit.INPUT, "is not a folder"),
        (["empty/"], Exit.INPUT, "neither a training run nor images"),
        (["empty/", "run/"], Exit.USAGE, "is not a training run"),
        (["run/", "-o", "page.png"], Exit.USAGE, "is an HTML file"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run", 1)
    assert run("report", *arguments) == code
    told = capsys.readouterr().err
    assert said in told and "hint:" in told
    assert not list(tmp_path.rglob("*.html"))


SHAPES = [
    ["x"], {"a": 1}, 5, [{}], [{"kind": "canny", "net": "n"}], [{"kind": "canny", "path": 5}],
    [{"kind": "canny", "path": "box.canny.png", "detect": 5}],
    [{"kind": "canny", "path": "box.canny.png", "detect": {"size": "x", "detector": 7, "options": [1]}}],
    [{"kind": "canny", "path": "box.canny.png", "detect": {
        "kind": "canny", "detector": "opencv", "options": {}, "size": [10**9, 10**9], "resize": "crop"}}],
]  # fmt: skip


@pytest.mark.parametrize("conditions", SHAPES)
@pytest.mark.parametrize("flag", ["--score", "--no-score"])
def test_records_of_other_shapes_cost_no_page(results, conditions, flag, capsys):
    write_file(results / "0-odd.png", png_bytes(picture(5), dump({"prompt": "odd", "conditions": conditions})))
    assert run("report", results, flag) == 0
    assert run("score", results / "0-odd.png") in (Exit.INPUT, Exit.USAGE)
    assert "Traceback" not in capsys.readouterr().err


LINES = [
    b"5", b"null", b"[1]", b'"lr control_gap"', b'\xff\xfe{"', b'{"lr":1}', b'{"step":"a","lr":1,"loss":2,"seconds":1}',
    b'{"control_gap":1}', b'{"step":1,"lr":1}\n{"step":1,"lr":1}', b'{"step":1,"loss":NaN,"lr":1,"seconds":1}',
    b'{"step":1,"control_gap":NaN,"band":1,"validation_loss":Infinity}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_logs_of_other_shapes(tmp_path, line):
    folder = make_run(tmp_path / "photos-1", 3)
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + b"\n" + line)
    assert run("report", folder) == 0 and run("status", folder) == 0
    text = (folder / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1], parse_constant=pytest.fail)
    assert len(data["runs"][0]["validations"]) == 3


def test_pictures_of_other_shapes_are_left_out(tmp_path):
    folder = make_run(tmp_path / "photos-1", 2)
    write_file(folder / "pictures" / "step-0000000.png", png_bytes(np.zeros((64, 20, 3), np.uint8)))
    write_file(folder / "pictures" / "held-out.png", png_bytes(np.zeros((65, 64, 3), np.uint8)))
    assert run("report", folder) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "report.html").read_text())[1])
    (only,) = data["runs"]
    assert [shot["step"] for shot in only["shots"]] == [100] and only["held_out"] == []


def test_a_run_without_settings(tmp_path, capsys):
    folder = make_run(tmp_path / "photos-1", 1)
    record = json.loads((folder / "run.json").read_text())
    del record["settings"]["learning_rate"]
    (folder / "run.json").write_text(json.dumps(record))
    assert run("report", folder) == Exit.INPUT
    assert "has no learning_rate" in capsys.readouterr().err
