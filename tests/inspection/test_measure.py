"""Inspection of responses: values against separate computations, page and pictures, the recipe on a JSONL file."""

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_trainers.attention import forward_context_influence, key_focus_scores, rhythm_signals
from attn_trainers.attnpo.steps import split_paragraphs
from attn_trainers.attnrl.steps import StepDelimiters
from attn_trainers.inspection.analysis import column_kurtosis
from attn_trainers.inspection.measure import (
    InspectionSettings,
    find_receiver_heads,
    inspect_response,
    response_couplings,
    summarise_couplings,
    token_entropies,
)
from attn_trainers.inspection.page import page, plot_couplings, plot_response, statistic_rows
from attn_trainers.rhythm.credit import credit_sets
from attn_trainers.tiny.arithmetic import build_tokenizer, sample_problems
from tests.helpers import ROOT


HEADS = ((1, 0), (2, 3))
SOLUTION = "\n\n".join(["17 + 3 = 20", "20 - 4 = 16", "16 + 9 = 25", "25 - 1 = 24", "24 + 5 = 29"])
COMPLETIONS = [SOLUTION + "\n\n</think>\\boxed{29}", SOLUTION.replace(" = 29", " = 30") + "\n\n</think>\\boxed{30}"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=128, num_layers=3)


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def prompt_ids(tokenizer) -> list[int]:
    return tokenizer("17 + 3 - 4 + 9 - 1 + 5<think>")["input_ids"]


@pytest.fixture(scope="module")
def inspected(model, tokenizer, prompt_ids):
    settings = InspectionSettings(influence_delta=2, key_focus_heads=HEADS, splitter=split_paragraphs)
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    return [
        inspect_response(
            model,
            tokenizer,
            prompt_ids,
            tokenizer(text)["input_ids"],
            settings,
            delimiters,
            problem=f"<problem {index}> & more",
            correct=index == 0,
        )
        for index, text in enumerate(COMPLETIONS)
    ]


def test_signals_are_those_of_separate_forwards(model, tokenizer, prompt_ids, inspected):
    response = inspected[0]
    ids = torch.tensor([prompt_ids + tokenizer(COMPLETIONS[0])["input_ids"]])
    mask, prompt = torch.ones_like(ids), len(prompt_ids)
    signals = rhythm_signals(model, ids, mask, [prompt], layers=range(3))[0]
    torch.testing.assert_close(response.waad, signals.waad)
    torch.testing.assert_close(response.fai, signals.fai, equal_nan=True)
    assert (response.local_heads, response.global_heads) == (signals.local_heads, signals.global_heads)
    sets = credit_sets(signals.waad, signals.fai)
    assert torch.equal(response.preplan, sets.preplan) and torch.equal(response.anchors, sets.anchors)
    assert "".join(response.tokens) == COMPLETIONS[0]
    steps = response.influence.ranges
    assert ["".join(response.tokens[a:b]) for a, b in steps][:2] == ["17 + 3 = 20\n\n", "20 - 4 = 16\n\n"]
    absolute = [(0, prompt), *((a + prompt, b + prompt) for a, b in steps)]
    influence = forward_context_influence(model, ids, mask, [absolute], [len(steps)], delta=2)[0]
    assert response.influence.scores == pytest.approx(influence[1:].tolist(), rel=1e-5)
    assert max(response.influence.scores) > 0
    thinking = [(a + prompt, b + prompt) for a, b in response.key_focus.ranges]
    end = response.tokens.index("</think>") + 1 + prompt
    scores = key_focus_scores(model, ids, mask, [thinking], [end], HEADS)[0]
    assert len(scores) == 5
    assert response.key_focus.scores == pytest.approx(scores.tolist(), rel=1e-5)
    with torch.no_grad():
        logits = model(ids).logits[0, prompt - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(response.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_entropy_of_certain_and_uniform_rows():
    logits = torch.zeros(300, 7)
    logits[::2, 3] = math.inf
    logits[::2] = logits[::2].where(logits[::2] > 0, -math.inf).clamp(max=50.0)
    entropies = token_entropies(logits)
    torch.testing.assert_close(entropies[::2], torch.zeros(150))
    torch.testing.assert_close(entropies[1::2], torch.full((150,), math.log(7)))
    assert token_entropies(torch.zeros(0, 7)).shape == (0,)


def test_responses_without_thinking_say_why(model, tokenizer, prompt_ids):
    settings = InspectionSettings(key_focus_heads=HEADS)
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    one = inspect_response(model, tokenizer, prompt_ids, [20], settings, delimiters)
    assert "no_end_of_thinking" in one.key_focus.note and one.key_focus.scores == []
    assert one.waad.shape == (1,) and one.fai.isnan().all()
    no_heads = inspect_response(model, tokenizer, prompt_ids, [20, 21], InspectionSettings(), delimiters)
    assert "no key-focus heads" in no_heads.key_focus.note
    with pytest.raises(ValueError, match="completion_ids 0; give one or more"):
        inspect_response(model, tokenizer, prompt_ids, [], settings, delimiters)


def test_receiver_heads_have_the_highest_kurtosis(inspected):
    heads = find_receiver_heads(inspected, 0.25)
    profiles = [response.profiles[0] for response in inspected]
    mean = torch.stack([column_kurtosis(profile.fai) for profile in profiles]).mean(dim=0)  # (C,)
    assert heads == [profiles[0].heads[i] for i in mean.argsort(descending=True)[:3].tolist()]


def test_summaries_are_means_over_responses(inspected):
    receivers = find_receiver_heads(inspected)
    summaries = summarise_couplings(inspected, receivers)
    assert [(s.name, s.distance) for s in summaries] == [
        ("entropy", 0),
        ("receiver_global", 0),
        ("fai_after_waad", 0),
        ("receiver_global", 10),
        ("fai_after_waad", 10),
    ]
    for summary in summaries:
        both = [response_couplings(r, receivers, summary.distance)[summary.name] for r in inspected]
        assert summary.responses == 2
        assert summary.observed == pytest.approx((both[0].observed + both[1].observed) / 2)
        assert summary.random_sd == pytest.approx(abs(both[0].random - both[1].random) / math.sqrt(2))
        assert summary.lift == pytest.approx(summary.observed / summary.random - 1)
        assert all(0 < density < 0.5 for density in summary.densities.values())


def test_undefined_statistics_are_shown_as_such(model, tokenizer, prompt_ids):
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    lone = inspect_response(model, tokenizer, prompt_ids, [20], InspectionSettings(), delimiters)
    rows = statistic_rows(summarise_couplings([lone], find_receiver_heads([lone])))
    assert rows[-1][2:6] == ["0", "– ± –", "– ± –", "–"]


class _Links(HTMLParser):
    """Everything a page would load."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def html(inspected) -> str:
    statistics = summarise_couplings(inspected, find_receiver_heads(inspected))
    return page("Attention of a model", ["Two responses."], statistics, inspected)


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
        pytest.skip("no Chromium is installed")
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,2600", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"]
    done = subprocess.run([*command, str(tmp_path / "index.html")], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<svg") == 2 and "Couplings" in done.stdout
    pixels = matplotlib_image(tmp_path / "page.png")
    assert pixels.shape[:2] == (2600, 1200)
    for colour in ((0x2F, 0x6D, 0xB3), (0xC2, 0x57, 0x1A), (0x5B, 0x8C, 0x5A), (0x7D, 0x5B, 0xA6)):
        distance = abs(pixels[..., :3] * 255 - torch.tensor(colour).numpy()).max(axis=2)
        assert (distance < 3).sum() > 50  # each curve and each kind of bar is drawn


def matplotlib_image(path: Path):
    from matplotlib import image

    return image.imread(path)


def test_pictures(inspected, tmp_path):
    plot_response(inspected[0], tmp_path / "response.png", "A response")
    statistics = summarise_couplings(inspected, find_receiver_heads(inspected))
    plot_couplings(statistics, tmp_path / "couplings.png", "Couplings")
    for name in ("response.png", "couplings.png"):
        width, height = struct.unpack(">II", (tmp_path / name).read_bytes()[16:24])
        assert width > 800 and height > 300
        assert matplotlib_image(tmp_path / name)[..., :3].std() > 0.05


@pytest.mark.slow
def test_recipe_reads_given_completions_and_samples_the_others(model_dir, tokenizer, environment, tmp_path):
    problems = sample_problems(2, seed=3)
    records = [
        {"problem": problems[0].text, "completion": COMPLETIONS[0], "answer": "29"},
        {"problem": problems[1].text, "answer": problems[1].answer},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    arguments = ["--model", model_dir, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 20]
    arguments += ["--prompt_template", "{problem}", "--key_focus_heads", "[[1, 0]]", "--step_mode", "paragraphs"]
    command = [sys.executable, ROOT / "recipes/inspect_attention.py", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=300, env=environment)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["couplings.md", "couplings.png", "index.html", "response_1.png", "response_2.png"]
    text = (tmp_path / "out" / "index.html").read_text()
    given = len(tokenizer(COMPLETIONS[0])["input_ids"])
    assert f"{given} tokens · right" in text and "20 tokens · wrong" in text
    assert problems[0].text in text
    assert "| entropy at WAAD peaks, nats" in (tmp_path / "out" / "couplings.md").read_text()
