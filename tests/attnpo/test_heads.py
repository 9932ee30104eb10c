"""Known heads, heads files and lists of heads."""

import json
import re

import pytest

from attn_trainers.attnpo.heads import KeyFocusHeads, load_heads, resolve_heads, save_heads


SMALL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def test_known_models():
    assert resolve_heads(None, SMALL, 28, 12) == [(16, 2), (20, 9), (23, 2)]
    assert resolve_heads(None, "models/DeepSeek-R1-Distill-Qwen-1.5B/", 28, 12) == [(16, 2), (20, 9), (23, 2)]
    assert resolve_heads(None, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 28, 28) == [(16, 14), (19, 22), (21, 5)]


def test_unknown_model_is_told_how_to_find_its_heads():
    command = re.escape("python recipes/find_key_focus_heads.py --model Qwen/Qwen3-4B --data ")
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
