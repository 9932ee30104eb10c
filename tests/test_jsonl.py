"""Files that a run goes on with."""

from attn_trainers.jsonl import resumed


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
