"""The page and the pictures of an inspection, and the page in a browser."""

import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from attn_trainers.inspection import page
from attn_trainers.inspection.measure import (
    InspectionSettings,
    find_receiver_heads,
    inspect_response,
    summarise_couplings,
)
from attn_trainers.inspection.perturbation import Perturbation, PerturbedResponse, summarise_perturbations


class _Links(HTMLParser):
    """Everything a page would load."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def statistics(inspected):
    return summarise_couplings(inspected, find_receiver_heads(inspected))


@pytest.fixture(scope="module")
def perturbed() -> list[PerturbedResponse]:
    """Of the first response; the second was too short."""
    top = Perturbation(3, True, 0.25, "<b>", [" many", "\n"], [0.125, 0.375])
    bottom = Perturbation(7, False, 0.001, "&", [" long", "1"], [0.5, 1.0])
    return [PerturbedResponse(10, [top, bottom]), PerturbedResponse(1, [])]


@pytest.fixture(scope="module")
def html(inspected, statistics, perturbed) -> str:
    summary = summarise_perturbations(perturbed)
    return page.page("Attention of a model", ["Two responses."], statistics, inspected, summary, perturbed)


def test_page_is_self_contained_and_shows_everything(html, inspected):
    links = _Links()
    links.feed(html)
    assert links.loads == [] and "script" not in links.tags and "@import" not in html and "url(" not in html
    assert links.tags.count("section") == links.tags.count("svg") == 2
    assert "&lt;problem 1&gt; &amp; more" in html
    assert html.count("<circle") == sum(int(r.preplan.sum() + r.anchors.sum()) for r in inspected)
    steps = sum(len(r.influence.ranges) + len(r.key_focus.ranges) for r in inspected)
    assert len(re.findall(r"<title>step \d+: ", html)) == steps
    strips = re.findall(r'<div class="tokens">(.*?)</div>', html)
    assert [strip.count("anchor") for strip in strips] == [int(r.anchors.sum()) for r in inspected]


def test_page_in_a_headless_browser(html, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on the path: the page is not looked at in a browser (apt-get install chromium)")
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--window-size=1200,2600", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"]
    done = subprocess.run([*command, str(tmp_path / "index.html")], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<svg") == 2 and "Couplings" in done.stdout, done.stderr
    pixels = matplotlib_image(tmp_path / "page.png")
    assert pixels.shape[:2] == (2600, 1200)
    for colour in ((0x2F, 0x6D, 0xB3), (0xC2, 0x57, 0x1A), (0x5B, 0x8C, 0x5A), (0x7D, 0x5B, 0xA6)):
        distance = abs(pixels[..., :3] * 255 - torch.tensor(colour).numpy()).max(axis=2)
        assert (distance < 3).sum() > 50  # each curve and each kind of bar is drawn


def matplotlib_image(path: Path):
    from matplotlib import image

    return image.imread(path)


def test_pictures(inspected, statistics, perturbed, tmp_path):
    page.plot_response(inspected[0], tmp_path / "response.png", "A response")
    page.plot_couplings(statistics, tmp_path / "couplings.png", "Couplings")
    page.plot_perturbations(perturbed, tmp_path / "perturbation.png", "Perturbed tokens")
    for name, least_width in (("response.png", 800), ("couplings.png", 800), ("perturbation.png", 400)):
        width, height = struct.unpack(">II", (tmp_path / name).read_bytes()[16:24])
        assert width > least_width and height > 300
        assert matplotlib_image(tmp_path / name)[..., :3].std() > 0.05


def test_perturbations_are_shown(html, perturbed):
    row = ["1", "0.250", "0.750", "+0.500 [+0.500, +0.500]", "100.0 %", "30 %, 70 %", "1"]
    assert page.perturbation_row(summarise_perturbations(perturbed)) == row
    assert "".join(f"<td>{cell}</td>" for cell in row) in html
    forced = ["highest", "3", "0.25000", "“&lt;b&gt;”", "“ many” 0.12, “↵” 0.38"]
    assert "".join(f"<td>{cell}</td>" for cell in forced) in html
    assert html.count('class="forced"') == 1  # none for the response without positions


def test_nothing_perturbed_is_shown_as_such():
    assert page.perturbation_row(summarise_perturbations([PerturbedResponse(1, [])])) == ["0", *["–"] * 5, "1"]


def test_undefined_statistics_are_shown_as_such(model, tiny_tokenizer, prompt_ids, delimiters):
    lone = inspect_response(model, tiny_tokenizer, prompt_ids, [20], InspectionSettings(), delimiters)
    rows = page.statistic_rows(summarise_couplings([lone], find_receiver_heads([lone])))
    assert rows[-1][2:6] == ["0", "– ± –", "– ± –", "–"]
