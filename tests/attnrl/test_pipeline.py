import pytest

from attn_trainers.attnrl.pipeline import PromptStream


def test_each_epoch_of_the_stream_is_another_permutation():
    stream = PromptStream(7, seed=3)
    epochs = [[draw.index for draw in stream.draw(7)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.next_serial == 21


def test_the_stream_does_not_depend_on_how_many_prompts_are_drawn_at_a_time():
    whole = PromptStream(5, seed=0).draw(17)
    stream = PromptStream(5, seed=0)
    parts = [draw for count in (3, 1, 6, 7) for draw in stream.draw(count)]
    assert parts == whole


def test_a_resumed_stream_goes_on_where_the_other_stopped():
    stream = PromptStream(5, seed=0)
    stream.draw(8)
    rest = stream.draw(6)
    resumed = PromptStream(5, seed=0)
    resumed.next_serial = 8
    assert resumed.draw(6) == rest
    assert resumed.draws(8, 6) == rest
    assert resumed.next_serial == 14


def test_an_unshuffled_stream_keeps_the_order():
    assert [draw.index for draw in PromptStream(3, seed=0, shuffle=False).draw(5)] == [0, 1, 2, 0, 1]


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="train_dataset has 0 prompts"):
        PromptStream(0, seed=0)
