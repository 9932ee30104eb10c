"""Forward context influence and key-focus scores against dense maps, closed forms and reference values."""

import pytest
import torch

from attn_trainers.attention import (
    InfluenceObserver,
    KeyFocusObserver,
    forward_context_influence,
    forward_for_attention,
    key_focus_scores,
    observe_attention,
)


HEADS = [(0, 1), (2, 3), (1, 0), (2, 0)]


def dense_influence(maps, ranges, stop, delta, aggregation="sum"):
    """AttnRL eq. 4 to 6, literally; with "mean" the sum of eq. 6 is a mean."""
    pool = torch.zeros(len(ranges), maps.shape[-1], dtype=torch.float64)
    for step, (start, end) in enumerate(ranges):
        pool[step, start:end] = 1 / (end - start)
    alpha = pool @ maps @ pool.T  # (L, H, S, S)
    influence = torch.zeros(len(ranges), dtype=torch.float64)
    for k in range(2, min(stop if stop > 0 else len(ranges), len(ranges) - delta)):
        later = alpha[:, :, k + delta :, k]
        influence[k] = (later.mean(dim=-1) if aggregation == "mean" else later.sum(dim=-1)).max()
    return influence


def dense_focus(maps, ranges, answer, heads):
    received = torch.stack([maps[layer, head, answer:].sum(dim=0) for layer, head in heads])
    return torch.stack([received[:, start:end].mean(dim=1) for start, end in ranges], dim=1)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("delta", [0, 1, 4])
def test_influence_equals_eager_attention(decoder, batch, eager, delta, aggregation):
    stops = [-1, 180, 5]  # row 1 has 191 steps, many more than the 8 columns of one fused call
    found = forward_context_influence(decoder, batch.ids, batch.mask, batch.ranges, stops, delta, aggregation)
    for row, influence in enumerate(found):
        maps = eager(decoder, batch.sequence(row))
        expected = dense_influence(maps, batch.ranges[row], stops[row], delta, aggregation)
        assert influence.dtype == torch.float32
        torch.testing.assert_close(influence.double(), expected, rtol=1e-5, atol=0)


def test_more_steps_than_the_square_of_the_head_dimension(qwen2, eager):
    ids = torch.arange(300) % 89
    ranges = [(t, t + 1) for t in range(300)]  # 300 steps of one token; the head dimension is 8
    found = forward_context_influence(qwen2, ids[None], torch.ones(1, 300), [ranges])[0]
    torch.testing.assert_close(found.double(), dense_influence(eager(qwen2, ids), ranges, -1, 4), rtol=1e-5, atol=0)


def test_influence_of_reference_values(golden):
    model, cases = golden
    for case in cases:
        ids = torch.tensor([case["input_ids"]])
        found = forward_context_influence(
            model, ids, torch.ones_like(ids), [case["step_ranges"]], [case["stop_step"]]
        )[0]
        torch.testing.assert_close(found, torch.tensor(case["fci"]), rtol=1e-5, atol=0)


def test_key_focus_of_reference_values(golden):
    model, cases = golden
    for case in cases:
        ids, answer = torch.tensor([case["input_ids"]]), case["final_answer_start"]
        steps = [step for step in case["step_ranges"][1:] if step[1] <= answer]
        heads = [tuple(head) for head in case["key_focus_heads"]]
        found = key_focus_scores(model, ids, torch.ones_like(ids), [steps], [answer], heads)[0]
        torch.testing.assert_close(found, torch.tensor(case["key_focus_scores"]), rtol=1e-5, atol=0)


def test_key_focus_equals_eager_attention(decoder, batch, eager):
    answers = [110, 250, 30]
    steps = [[step for step in ranges[1:] if step[1] <= answers[row]] for row, ranges in enumerate(batch.ranges)]
    observer = KeyFocusObserver(batch.mask, steps, answers, HEADS, average=False)
    forward_for_attention(decoder, batch.ids, batch.mask, observer)
    averaged = key_focus_scores(decoder, batch.ids, batch.mask, steps, answers, HEADS)
    for row, scores in enumerate(observer.result()):
        expected = dense_focus(eager(decoder, batch.sequence(row)), steps[row], answers[row], HEADS)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(averaged[row], scores.mean(dim=0), rtol=1e-6, atol=0)


def test_uniform_attention_has_a_closed_form(uniform_qwen2):
    # Token t gives 1 / (t + 1) to each token: a step's mean weight does not depend on which earlier step it looks at.
    ids = torch.arange(60)[None]
    ranges = [(0, 7), (7, 9), (9, 20), (20, 24), (24, 25), (25, 40), (40, 41), (41, 52), (52, 60)]
    means = [sum(1 / (t + 1) for t in range(*step)) / (step[1] - step[0]) for step in ranges]
    expected = [0.0, 0.0, sum(means[6:]), sum(means[7:]), means[8], 0.0, 0.0, 0.0, 0.0]
    found = forward_context_influence(uniform_qwen2, ids, torch.ones_like(ids), [ranges])[0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    means_found = forward_context_influence(uniform_qwen2, ids, torch.ones_like(ids), [ranges], aggregation="mean")[0]
    averaged = [0.0, 0.0, sum(means[6:]) / 3, sum(means[7:]) / 2, means[8], 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(means_found, torch.tensor(averaged), rtol=1e-5, atol=0)
    scores = key_focus_scores(uniform_qwen2, ids, torch.ones_like(ids), [ranges[1:8]], [52], HEADS)[0]
    torch.testing.assert_close(scores, torch.full((7,), sum(1 / (m + 1) for m in range(52, 60))), rtol=1e-5, atol=0)


def test_answer_rows_give_each_a_mass_of_one(decoder, batch):
    # One range over the whole sequence: its mean times its length is the number of answer tokens, for every head.
    whole = [[(0, length)] for length in batch.lengths]
    answers = [100, 299, 37]  # the last row has no answer token
    observer = KeyFocusObserver(batch.mask, whole, answers, HEADS, average=False)
    forward_for_attention(decoder, batch.ids, batch.mask, observer)
    for row, scores in enumerate(observer.result()):
        mass = scores[:, 0] * batch.lengths[row]
        torch.testing.assert_close(mass, torch.full((4,), float(batch.lengths[row] - answers[row])), rtol=1e-5, atol=0)


def test_several_forwards_of_consecutive_rows_fill_one_observer(qwen2, batch):
    observer = InfluenceObserver(batch.mask, batch.ranges)
    with torch.no_grad(), observe_attention(qwen2, observer):
        for rows in (slice(0, 2), slice(2, 3)):
            qwen2(input_ids=batch.ids[rows], attention_mask=batch.mask[rows])
    for found, alone in zip(
        observer.result(), forward_context_influence(qwen2, batch.ids, batch.mask, batch.ranges), strict=True
    ):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)


def test_rows_without_tokens_or_steps_are_empty(qwen2):
    ids = torch.arange(24).view(3, 8)
    mask = torch.tensor([[0] * 8, [1] * 8, [0] * 7 + [1]])
    influence = forward_context_influence(qwen2, ids, mask, [[(0, 4)], [], [(0, 1)]], [-1, -1, 0])
    assert [found.tolist() for found in influence] == [[], [], [0.0]]
    scores = key_focus_scores(qwen2, ids, mask, [[(0, 4)], [], [(0, 1)]], [3, 8, 1], [(0, 0)])
    assert [found.tolist() for found in scores] == [[], [], [0.0]]


def test_arguments_off_the_sequence_are_refused(qwen2):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    good = [[(0, 2), (2, 4)], [(0, 6)]]
    with pytest.raises(ValueError, match=r"step_ranges\[0\]\[1\]=\(2, 5\).*end by 4"):
        InfluenceObserver(mask, [[(0, 2), (2, 5)], [(0, 6)]])
    with pytest.raises(ValueError, match=r"step_ranges\[1\]\[1\]=\(3, 5\)"):
        InfluenceObserver(mask, [[(0, 2)], [(0, 4), (3, 5)]])
    with pytest.raises(ValueError, match=r"step_ranges\[1\]\[0\]=\(2, 2\)"):
        InfluenceObserver(mask, [[(0, 2)], [(2, 2)]])
    with pytest.raises(ValueError, match="step_ranges has 1 rows"):
        InfluenceObserver(mask, good[:1])
    with pytest.raises(ValueError, match="stop_steps has 1 entries"):
        InfluenceObserver(mask, good, [-1])
    with pytest.raises(ValueError, match="delta=-1"):
        InfluenceObserver(mask, good, delta=-1)
    with pytest.raises(ValueError, match="influence_aggregation='max'"):
        InfluenceObserver(mask, good, aggregation="max")
    with pytest.raises(ValueError, match="attention_mask row 1 has padding between"):
        InfluenceObserver(torch.tensor([[1, 1, 0], [1, 0, 1]]), [[], []])
    with pytest.raises(ValueError, match=r"answer_starts\[0\]=5"):
        KeyFocusObserver(mask, good, [5, 6], [(0, 0)])
    with pytest.raises(ValueError, match="heads="):
        KeyFocusObserver(mask, good, [4, 6], [(0, 0), (0, 0)])
    with pytest.raises(ValueError, match=r"heads=\[4\] of layer 0"):
        key_focus_scores(qwen2, torch.ones(2, 6, dtype=torch.long), mask, good, [4, 6], [(0, 4)])


def test_a_forward_that_does_not_fit_the_mask_is_refused(qwen2, batch):
    observer = InfluenceObserver(batch.mask[:2], batch.ranges[:2])
    with pytest.raises(ValueError, match=r"result\(\) needs 2 rows"):
        observer.result()
    with pytest.raises(ValueError, match="attention_mask has 2 rows"):
        forward_for_attention(qwen2, batch.ids, batch.mask, observer)
    observer = InfluenceObserver(batch.mask, batch.ranges)
    with observe_attention(qwen2, observer), torch.no_grad():
        qwen2(input_ids=batch.ids[:2], attention_mask=batch.mask[:2])
    with pytest.raises(ValueError, match="needs 3 rows per layer, seen so far {0: 2, 1: 2, 2: 2}"):
        observer.result()
