"""Losses of an update whose micro-batches are unequal, padded with rows that are not there, or empty on a rank."""

import pytest
import torch

from attn_trainers.attnrl.rows import pad_rows
from attn_trainers.attnrl.weights import part_weights


# Rows of two ranks in three micro-batches; twelve places in the tensors, half of them empty.
LAYOUT = [[[0, 1, 2], [3]], [[4], []], [[5], []]]
FILLED_PARTS = 4
LOSSES = ["grpo", "sapo", "dr_grpo", "bnpo", "dapo", "cispo"]


def make_rows(vocabulary, lengths=(5, 9, 2, 7, 4, 11), width=11):
    """One batch of rows with advantages of both signs and old log-probs off the policy."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()  # (6, T)
    shape = mask.shape
    return {
        "prompt_ids": torch.randint(3, vocabulary, (len(lengths), 3), generator=generator),
        "prompt_mask": torch.ones(len(lengths), 3, dtype=torch.long),
        "completion_ids": torch.randint(3, vocabulary, shape, generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(shape, generator=generator) * mask,
        "old_per_token_logps": -5.0 + torch.randn(shape, generator=generator) * mask,
        "ref_per_token_logps": -5.0 + torch.randn(shape, generator=generator) * mask,
        "fresh_mask": torch.zeros(shape, dtype=torch.bool),
    }


class Row:
    def __init__(self, length):
        self.completion_ids = [0] * length


def losses_of(trainer, rows, layout):
    """Mean over ranks of the update's loss, with gradients; (rank, micro-batch) losses besides."""
    lengths = rows["completion_mask"].sum(1).tolist()
    update = [[[Row(lengths[i]) for i in part] for part in micro_batch] for micro_batch in layout]
    ranks, count = len(layout[0]), trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = len(layout)
    losses = []
    for rank in range(ranks):
        weights = part_weights(update, rank, trainer.loss_type, count, lambda row: len(row.completion_ids))
        for micro_batch, weight in zip(layout, weights, strict=True):
            index = micro_batch[rank]
            batch = {name: tensor[index] for name, tensor in rows.items()} if index else empty(rows)
            inputs = pad_rows(batch, weight.num_rows)
            # TRL divides the tokens by the ranks that there are: here one.
            num_items = torch.tensor(weight.num_items / ranks)
            inputs |= {"num_items_in_batch": num_items, "weight": weight}
            losses.append(trainer._compute_loss(trainer.model, inputs))
    return torch.stack(losses).sum() / ranks


def empty(rows):
    """A rank without rows: one prompt token, one masked token."""
    batch = {name: torch.zeros_like(tensor[:1, :1]) for name, tensor in rows.items()}
    batch["prompt_mask"] += 1
    return batch


def closed_form(trainer, rows, entropy_coef=0.0):
    """Each loss by its definition over the six rows."""
    mask, advantages = rows["completion_mask"], rows["advantages"]
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    logits = trainer.model(ids).logits[:, 2:-1] / trainer.temperature
    distribution = logits.log_softmax(-1)
    logps = distribution.gather(2, rows["completion_ids"][:, :, None])[:, :, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    ratio = (logps - rows["old_per_token_logps"]).exp()
    if trainer.loss_type == "cispo":
        per_token = -ratio.clamp(max=trainer.epsilon_high).detach() * advantages * logps
    elif trainer.loss_type == "sapo":
        temperature = torch.where(advantages > 0, trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg)
        per_token = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    else:
        clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        per_token = -torch.min(ratio.clamp(max=trainer.args.delta) * advantages, clipped * advantages)
    difference = rows["ref_per_token_logps"] - logps
    per_token = (per_token + trainer.beta * (difference.exp() - difference - 1)) * mask
    lengths = mask.sum(1)
    if trainer.loss_type in ("grpo", "sapo"):
        loss = (per_token.sum(1) / lengths).mean()
    elif trainer.loss_type == "dr_grpo":
        loss = per_token.sum() / (6 * trainer.max_completion_length)
    elif trainer.loss_type == "bnpo":
        parts = [part for micro_batch in LAYOUT for part in micro_batch if part]
        loss = sum(per_token[part].sum() / lengths[part].sum() for part in parts) / FILLED_PARTS
    else:
        loss = per_token.sum() / lengths.sum()
    return loss - entropy_coef * (entropy * mask).sum() / lengths.sum()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_an_update_is_one_mean_over_its_rows_or_tokens(make_trainer, loss_type, entropy_coef):
    trainer = make_trainer(
        loss_type=loss_type, entropy_coef=entropy_coef, beta=0.01, epsilon_high=5.0 if loss_type == "cispo" else 0.28
    )
    rows = make_rows(trainer.model.config.vocab_size)
    trainer.model.train()
    expected = closed_form(trainer, rows, entropy_coef)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    loss = losses_of(trainer, rows, LAYOUT)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-3, atol=1e-6)


def test_metrics_do_not_see_missing_rows(make_trainer):
    trainer = make_trainer(beta=0.01, entropy_coef=0.3, loss_type="grpo")
    rows = make_rows(trainer.model.config.vocab_size)
    trainer.model.train()
    losses_of(trainer, {name: t[:2] for name, t in rows.items()}, [[[0, 1]]])
    alone = {name: list(values) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    losses_of(trainer, {name: t[:2] for name, t in rows.items()}, [[[0, 1], []]])
    assert {"kl", "entropy", "clip_ratio/high_max", "policy_loss"} <= alone.keys()
    # The mean over the two ranks, the second of which has none, is that of the first alone.
    ranks = trainer._metrics["train"].pop("policy_loss")
    assert sum(ranks) / 2 == pytest.approx(*alone.pop("policy_loss"), rel=1e-5)
    for name, (value,) in alone.items():
        assert trainer._metrics["train"][name][0] == pytest.approx(value, rel=1e-5, nan_ok=True), name


def test_a_row_that_does_not_count_is_not_forwarded(make_trainer):
    trainer = make_trainer()
    rows = make_rows(trainer.model.config.vocab_size)
    padded = pad_rows({name: tensor[:2] for name, tensor in rows.items()}, 5)
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ids = torch.cat([padded["prompt_ids"], padded["completion_ids"]], dim=1)
    mask = torch.cat([padded["prompt_mask"], padded["completion_mask"]], dim=1)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, 11, compute_entropy=True
    )
    hook.remove()
    assert seen == [(2, 14)]
    assert logps.shape == entropies.shape == (5, 11)
    assert not logps[2:].any() and logps[:2].any(dim=1).all()
