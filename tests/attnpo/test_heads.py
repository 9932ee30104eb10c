"""Known heads, heads files and lists of heads."""

import json
import re

import pytest
from transformers import LlamaConfig, Qwen2Config

from attn_trainers.attnpo.heads import KeyFocusHeads, load_heads, model_fingerprint, resolve_heads, save_heads


SMALL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def test_known_models():
    assert resolve_heads(None, SMALL, 28, 12) == [(16, 2), (20, 9), (23, 2)]
    assert resolve_heads(None, "models/DeepSeek-R1-Distill-Qwen-1.5B/", 28, 12) == [(16, 2), (20, 9), (23, 2)]
    assert resolve_heads(None, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 28, 28) == [(16, 14), (19, 22), (21, 5)]


def test_unknown_model_is_told_how_to_find_its_heads():
    command = re.escape("attn-trainers heads --model Qwen/Qwen3-4B --data ")
    with pytest.raises(ValueError, match=command):
        resolve_heads(None, "Qwen/Qwen3-4B", 36, 32)


def test_heads_outside_the_model_are_refused():
    assert resolve_heads([[27, 11]], SMALL, 28, 12) == [(27, 11)]
    for pair in ([28, 0], [0, 12]):
        with pytest.raises(ValueError, match=re.escape(f"heads contain {pair}") + ".*28 layers of 12 heads"):
            resolve_heads([pair], SMALL, 28, 12)


@pytest.mark.parametrize("heads", [[], [3], [[1, 2, 3]], [[1, -1]], [[1, 2.0]], [[1, True]], ["12"], [[1, 2], (1, 2)]])
def test_malformed_heads_are_refused(heads):
    with pytest.raises(ValueError, match="heads"):
        resolve_heads(heads, SMALL, 28, 12)


def test_heads_file_round_trip(tmp_path):
    path = tmp_path / "heads.json"
    saved = KeyFocusHeads("Qwen/Qwen3-4B", [[20, 3], [18, 1]], [0.95, 0.91], settings={"average": "macro"})
    save_heads(path, saved)
    assert load_heads(path) == saved
    assert json.loads(path.read_text())["heads"] == [[20, 3], [18, 1]]
    assert resolve_heads(path, "Qwen/Qwen3-4B", 36, 32) == resolve_heads(str(path), "x", 36, 32) == [(20, 3), (18, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[[1, 2]]", "model_name and heads"),
        ('{"heads": [[1, 2]]}', "model_name and heads"),
        ('{"model_name": "m", "heads": [[1, 2]], "more": 1}', "model_name and heads"),
        ('{"model_name": "m", "heads": [[1]]}', "pair"),
        ('{"model_name": "m", "heads": {"1": 2}}', "non-empty list"),
        ('{"model_name": "m", "heads": [[1, 2]], "sra": [0.9, 0.8]}', "one per head"),
        ('{"model_name": "m", "heads": [[1, 2]], "sra": [1.5]}', r"\[0, 1\]"),
    ],
)
def test_malformed_files_are_refused(tmp_path, content, message):
    path = tmp_path / "heads.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_heads(path)


def test_heads_by_the_name_of_a_known_model():
    assert resolve_heads(SMALL, "runs/tuned", 28, 12) == [(16, 2), (20, 9), (23, 2)]
    with pytest.raises(ValueError, match="heads='Qwen/Unknown' is neither a file nor a model with known heads"):
        resolve_heads("Qwen/Unknown", "runs/tuned", 28, 12)


def test_fingerprint_is_of_the_attention_and_its_shape():
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    mark = model_fingerprint(Qwen2Config(**shape, vocab_size=100))
    assert re.fullmatch("[0-9a-f]{12}", mark)
    assert mark == model_fingerprint(Qwen2Config(**shape, vocab_size=200))  # tuned from it, with a token more
    others = [Qwen2Config(**(shape | {name: value * 2})) for name, value in shape.items()] + [LlamaConfig(**shape)]
    assert len({mark, *map(model_fingerprint, others)}) == 6


@pytest.fixture
def heads_file(tmp_path):
    path = tmp_path / "heads.json"
    found = KeyFocusHeads("Qwen/A", [[3, 1]], num_layers=4, num_heads=8, fingerprint="abc", step_mode="paragraphs")
    save_heads(path, found)
    return path


def test_a_file_of_the_same_shape_and_steps_is_taken(heads_file, tmp_path):
    assert resolve_heads(heads_file, "runs/tuned", 4, 8, step_mode="paragraphs", fingerprint="abc") == [(3, 1)]
    assert resolve_heads(heads_file, "runs/tuned", 4, 8) == [(3, 1)]
    by_hand = tmp_path / "by_hand.json"
    save_heads(by_hand, KeyFocusHeads("Qwen/A", [[3, 1]]))
    assert resolve_heads(by_hand, "runs/tuned", 6, 9, step_mode="phrases", fingerprint="def") == [(3, 1)]


@pytest.mark.parametrize(("layers", "heads", "fingerprint"), [(5, 8, "abc"), (4, 9, "abc"), (4, 8, "def")])
def test_a_file_of_another_shape_is_refused(heads_file, layers, heads, fingerprint):
    message = (
        f"heads='{heads_file}' were found in 'Qwen/A' (4 x 8 heads, fingerprint abc), and 'B' is a model of another"
    )
    with pytest.raises(ValueError, match=re.escape(message) + f" shape .{layers} x {heads} heads.*--model B --data"):
        resolve_heads(heads_file, "B", layers, heads, step_mode="paragraphs", fingerprint=fingerprint)


def test_a_file_of_other_steps_is_refused(heads_file):
    message = f"heads='{heads_file}' were found with step_mode='paragraphs', and step_mode='phrases' cuts other steps"
    with pytest.raises(ValueError, match=re.escape(message) + "; set step_mode='paragraphs', or.*--step_mode phrases"):
        resolve_heads(heads_file, "Qwen/A", 4, 8, step_mode="phrases", fingerprint="abc")
