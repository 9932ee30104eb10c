"""Files that a run goes on with."""

import pytest

from attn_trainers.jsonl import append_jsonl, read_jsonl, resumed


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\r", "\n"])
def test_text_that_ends_lines_elsewhere_is_read_as_written(tmp_path, character):
    path, records = tmp_path / "records.jsonl", [{"completion": f"a{character}b"}, {"completion": "c"}]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # the mark that some editors put first
    assert read_jsonl(path) == records


def test_resumed_records_are_not_computed_again(tmp_path):
    path = tmp_path / "records.jsonl"
    asked = []

    def compute(missing):
        asked.append(missing)
        yield from ((i, {"value": 10 * i}) for i in reversed(missing))

    assert resumed(path, ["a", "b"], compute) == [{"value": 0}, {"value": 10}]
    assert resumed(path, ["b", "c", "a"], compute) == [{"value": 10}, {"value": 10}, {"value": 0}]
    assert resumed(path, ["a"], compute) == [{"value": 0}]
    assert asked == [[0, 1], [1]]
