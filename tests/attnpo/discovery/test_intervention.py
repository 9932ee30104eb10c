"""Hiding steps from heads, against eager attention whose weights are masked, and the check built on it."""

import pytest
import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from attn_trainers.attnpo.discovery.intervention import Block, check_by_intervention, masked_attention
from attn_trainers.attnpo.discovery.labels import LabelledCompletion
from attn_trainers.attnpo.discovery.probing import ProbedResponse


LENGTH = 40


def build(**options) -> Qwen2ForCausalLM:
    """A random model of 3 layers of 4 heads that share 2 key heads, with attention that differs between tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(10)
    model.set_attn_implementation("sdpa")
    return model


def tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(1)).repeat(rows, 1)


@torch.no_grad()
def logits_of(model, ids, blocks=None):
    if blocks is None:
        return model(ids, use_cache=False).logits
    with masked_attention(model, blocks):
        return model(ids, use_cache=False).logits


@torch.no_grad()
def reference_logits(model, ids, blocks, monkeypatch):
    """Eager attention, written out here, with the hidden weights at zero and the others scaled to a sum of one."""

    def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(dim=-1)
        for row, block in enumerate(blocks):
            for layer, head in block.heads if block else ():
                if layer == module.layer_idx:
                    for start, end in block.ranges:
                        weights[row, head, block.query_start :, start:end] = 0.0
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(modeling_qwen2, "eager_attention_forward", eager)
    model.set_attn_implementation("eager")
    found = model(ids, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    return found


BLOCKS = [
    Block(heads=((0, 1), (2, 3), (2, 0)), ranges=((5, 9), (20, 21)), query_start=30),
    None,
    Block(heads=((1, 2),), ranges=((0, 30),), query_start=30),
]


SLIDING = {"use_sliding_window": True, "sliding_window": 18, "max_window_layers": 1}


@pytest.mark.parametrize("options", [{}, SLIDING], ids=["full", "sliding"])
def test_hidden_keys_equal_eager_attention_with_masked_weights(options, monkeypatch):
    model, ids = build(**options), tokens(3)
    plain = logits_of(model, ids)
    masked = logits_of(model, ids, BLOCKS)
    torch.testing.assert_close(masked, reference_logits(model, ids, BLOCKS, monkeypatch), rtol=1e-4, atol=1e-5)
    # Rows of no block and positions before the first hidden query are the model's own, to the bit.
    assert torch.equal(masked[1], plain[1]) and torch.equal(masked[:, :30], plain[:, :30])
    for row in (0, 2):
        assert (masked[row, 30:] - plain[row, 30:]).abs().max() > 1e-3
    assert torch.equal(logits_of(model, ids), plain)


def test_the_attention_is_put_back():
    model, registry = build(), AttentionInterface()
    before = registry["sdpa"]
    with pytest.raises(RuntimeError, match="stop"), masked_attention(model, BLOCKS):
        assert registry["sdpa"] is not before
        raise RuntimeError("stop")
    assert registry["sdpa"] is before


def test_another_model_in_the_context_is_left_alone():
    model, other, ids = build(), build(), tokens()
    plain = logits_of(other, ids)
    with masked_attention(model, BLOCKS[:1]), torch.no_grad():
        assert torch.equal(other(ids, use_cache=False).logits, plain)


def test_what_cannot_be_masked_is_refused():
    model, ids = build(), tokens()
    with pytest.raises(ValueError, match=r"\(9, 11\): each must hold a key and end by query_start=10"):
        Block(((0, 0),), ((9, 11),), 10)
    with pytest.raises(ValueError, match=r"\(3, 0\): the model has 3 layers of 4 heads"):
        logits_of(model, ids, [Block(((3, 0),), ((1, 2),), 10)])
    with pytest.raises(ValueError, match="blocks=3 rows, but the forward has 1 rows"):
        logits_of(model, ids, BLOCKS)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager' cannot be masked"):
        logits_of(model, ids, BLOCKS[:1])


def probed(scores, problem: str = "p") -> ProbedResponse:
    """Four steps of 5 tokens after a prompt of 10, and an answer of 10."""
    ids = tokens()[0].tolist()
    ranges = [(0, 5), (5, 10), (10, 15), (15, 20)]
    response = LabelledCompletion(problem, "", "", ids[10:], ranges, ["step"] * 4, [None] * 4)
    return ProbedResponse(ids[:10], 20, response, scores)


def answer_logp(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean log p of the last ten tokens."""
    logps = logits[0, -11:-1].log_softmax(-1)
    return logps.gather(-1, ids[0, -10:, None]).mean().item()


def test_the_check_hides_high_and_low_steps_from_chosen_and_other_heads(monkeypatch):
    model, ids = build(), tokens()
    # Six heads are chosen of twelve, so that every draw of six others is the same.
    chosen = [(layer, head) for layer in range(3) for head in (0, 1)]
    others = [(layer, head) for layer in range(3) for head in (2, 3)]
    scores = torch.zeros(12, 4)
    scores[[0, 1, 4, 5, 8, 9]] = torch.tensor([0.2, 0.9, 0.5, 0.1])
    scores[[2, 3, 6, 7, 10, 11]] = torch.tensor([9.0, 0.0, 0.0, 9.0])  # of no account
    report = check_by_intervention(model, [probed(scores)], chosen, torch.Generator().manual_seed(0), batch_size=3)

    plain = logits_of(model, ids)
    losses, changed = [], []
    for heads in (chosen, others):
        for step in ((15, 20), (25, 30)):  # the second step, the fourth
            masked = reference_logits(model, ids, [Block(tuple(heads), (step,), 30)], monkeypatch)
            losses.append(answer_logp(plain, ids) - answer_logp(masked, ids))
            changed.append((masked.argmax(-1) != plain.argmax(-1))[0, -11:-1].double().mean().item())
    assert list(report.drops) == ["chosen, high", "chosen, low", "random, high", "random, low"]
    for (mean, low, high), loss in zip(report.drops.values(), losses, strict=True):
        assert (mean, low, high) == (pytest.approx(loss, abs=1e-5),) * 3
    assert list(report.changed.values()) == pytest.approx(changed)
    assert report.contrast[0] == pytest.approx(losses[0] - losses[1] - losses[2] + losses[3], abs=1e-5)
    assert (report.num_responses, report.num_problems) == (1, 1)
    assert max(map(abs, losses)) > 0.01


def test_intervals_of_the_check_are_over_problems():
    model, scores = build(), torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    responses = [probed(scores, "a"), probed(scores, "a"), probed(scores.flip(1), "b")]
    report = check_by_intervention(model, responses, [(0, 0)], torch.Generator().manual_seed(0))
    assert (report.num_responses, report.num_problems) == (3, 2)
    assert all(low <= mean <= high for mean, low, high in (*report.drops.values(), report.contrast))
    one_step = probed(scores[:, :1])
    one_step.response.step_ranges = one_step.response.step_ranges[:1]
    assert check_by_intervention(model, [one_step], [(0, 0)], torch.Generator()) is None
    too_many = [(layer, head) for layer in range(3) for head in range(4)][:7]
    assert check_by_intervention(model, responses, too_many, torch.Generator()) is None
