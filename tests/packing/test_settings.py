"""Packed rows in the settings of a trainer: checkpointing, adapters, autocast, wrappers, TRL's head, observers."""

import gc

import pytest
import torch
from transformers import AttentionInterface

from attn_trainers.attention import InfluenceObserver, observe_attention
from attn_trainers.packing import RowsObserver, pack_rows, packed_forward, packed_logps


def loss_of(logps) -> torch.Tensor:
    flat = torch.cat(logps)
    return (flat * torch.linspace(-1, 1, len(flat)).exp()).sum()


def gradients(model) -> torch.Tensor:
    """All gradients end to end, which are cleared."""
    flat = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return flat


def entry():
    """What transformers calls for "sdpa", once nothing but the test holds packed rows."""
    gc.collect()
    return AttentionInterface._global_mapping.get("sdpa")


@pytest.fixture
def plain(rows_alone, tree_rows):
    """Log-probs and gradients of the rows one by one."""

    def run(model):
        logps, _ = rows_alone(model, *tree_rows)
        loss_of(logps).backward()
        return torch.cat(logps).detach(), gradients(model)

    return run


def assert_close(found, wanted, tolerance=1e-5):
    assert (found - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(build_model, tree_rows, plain, reentrant):
    """The backward runs the layers again, after everything but the graph is gone."""
    model, before = build_model("mistral"), entry()
    values, grads = plain(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    logps = packed_logps(model, *tree_rows)
    assert entry() is not before
    assert_close(torch.cat(logps).detach(), values)
    loss_of(logps).backward()
    assert_close(gradients(model), grads)
    del logps
    assert entry() is before


def test_other_forwards_are_the_same_to_the_bit_and_the_entry_is_put_back(build_model, tree_rows):
    model, before = build_model("qwen2"), entry()
    ids = torch.tensor([tree_rows[0][0]])
    wanted = model(input_ids=ids).logits
    logps = packed_logps(model, *tree_rows)
    assert torch.equal(model(input_ids=ids).logits, wanted)
    del logps
    with torch.no_grad():
        packed_logps(model, *tree_rows)
    assert entry() is before
    with pytest.raises(IndexError):
        packed_logps(model, [[1, 2, 1000]], [1])  # no such token
    assert entry() is before


def test_a_layout_that_meets_another_attention_function_is_an_error(build_model, tree_rows):
    model, before = build_model("qwen2").train(), entry()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logps = packed_logps(model, *tree_rows)
    AttentionInterface.register("sdpa", before)
    with pytest.raises(RuntimeError):
        loss_of(logps).backward()


def test_adapter(build_model, tree_rows, plain):
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_model("qwen2"), config)
    values, grads = plain(model)
    logps = packed_logps(model, *tree_rows)
    loss_of(logps).backward()
    assert_close(torch.cat(logps).detach(), values)
    assert_close(gradients(model), grads)


@pytest.mark.parametrize("shape", ["qwen3", "mistral"])
def test_bf16_autocast_is_as_near_the_truth_as_rows(build_model, tree_rows, plain, shape):
    model = build_model(shape, hidden_size=128, intermediate_size=256)
    truth, true_grads = plain(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, grads = plain(model)
        logps = packed_logps(model, *tree_rows)
    loss_of(logps).backward()
    assert all(one.dtype == torch.float32 for one in logps)
    assert 0 < (torch.cat(logps).detach() - truth).norm() < 1.5 * (values - truth).norm()
    assert 0 < (gradients(model) - true_grads).norm() < 1.5 * (grads - true_grads).norm()


def test_bf16_weights(build_model, tree_rows, rows_alone):
    model = build_model("qwen2")
    truth = torch.cat(rows_alone(model, *tree_rows)[0])
    model.bfloat16()
    rows = torch.cat(rows_alone(model, *tree_rows)[0])
    found = torch.cat(packed_logps(model, *tree_rows))
    assert 0 < (found - truth).norm() < 1.5 * (rows - truth).norm()


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    import torch.distributed as dist

    if dist.is_initialized():  # by an engine that another test of this process started, of this process alone too
        assert dist.get_world_size() == 1
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(build_model, tree_rows, plain, one_rank):
    model = build_model("qwen2")
    values, grads = plain(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    logps = packed_logps(wrapped, *tree_rows)
    loss_of(logps).backward()
    assert_close(torch.cat(logps).detach(), values)
    assert_close(gradients(model), grads)


def test_fsdp2(build_model, tree_rows, plain, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build_model("qwen2").train()
    values, grads = plain(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logps = packed_logps(model, *tree_rows)
    loss_of(logps).backward()
    assert_close(torch.cat(logps).detach(), values)
    found = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    assert_close(found, grads)


def test_fused_head(build_model, tree_rows, rows_alone):
    """TRL's head, as GRPOTrainer adds it: same numbers, its own temperature."""
    from trl.trainer.utils import add_fused_lm_head

    model, (rows, starts) = build_model("qwen3"), tree_rows
    wanted, entropies = rows_alone(model, rows, starts, temperature=0.7)
    loss_of(wanted).backward()
    grads = gradients(model)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    found, found_entropies = packed_forward(model, pack_rows(rows, starts), entropies=True, fused_head=True)
    loss_of(found).backward()
    assert_close(torch.cat(found).detach(), torch.cat(wanted).detach())
    assert_close(torch.cat(found_entropies), torch.cat(entropies))
    assert_close(gradients(model), grads)


def test_a_rank_without_rows_forwards_one_token(build_model):
    """It reaches every parameter, with zeros, so that its backward takes part in what the ranks do together."""
    model = build_model("qwen2")
    logps, entropies = packed_forward(model, pack_rows([[7]], [1]), entropies=True)
    assert logps[0].shape == entropies[0].shape == (0,)
    logps[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_no_rows(build_model):
    assert packed_logps(build_model("qwen2"), [], []) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_observers_read_the_rows(build_model, tree_rows, side):
    """Forward context influence of the rows of a packed forward, against a padded batch's."""
    model, (rows, starts) = build_model("qwen2-windows"), tree_rows
    rows, starts = rows[:5], starts[:5]
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    ranges = [[(0, 6), *((start, start + 2) for start in range(6, len(row) - 1, 2))] for row in rows]
    wanted = InfluenceObserver(mask, ranges, delta=2)
    with torch.no_grad(), observe_attention(model, wanted):
        model(input_ids=ids, attention_mask=mask)
    found, packed = InfluenceObserver(mask, ranges, delta=2), pack_rows(rows, starts)
    with torch.no_grad():
        packed_forward(model, packed, around=observe_attention(model, RowsObserver(found, packed, mask)))
    for one, other in zip(found.result(), wanted.result(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert max(one.max() for one in found.result()) > 0
    with pytest.raises(ValueError, match="tokens per row"):
        RowsObserver(found, packed, mask[:, 1:])


@pytest.mark.parametrize("shape", ["qwen2", "mistral"])
def test_flash_attention_of_the_model(build_model, tree_rows, plain, shape, flash_varlen, monkeypatch):
    """A model that runs FlashAttention gets its own kernel, with the path of each segment as its keys."""
    from transformers import modeling_flash_attention_utils as flash

    model = build_model(shape)
    values, grads = plain(model)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: (None, flash_varlen, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr("attn_trainers.packing.ability.flash_attn_supports_top_left_mask", lambda: False)
    model.config._attn_implementation = "flash_attention_2"
    logps = packed_logps(model, *tree_rows)
    loss_of(logps).backward()
    assert_close(torch.cat(logps).detach(), values)
    assert_close(gradients(model), grads)


@pytest.mark.parametrize("shape", ["qwen2", "mistral"])
def test_flex_attention_of_the_model(build_model, tree_rows, rows_alone, shape, monkeypatch):
    """Values alone: flex_attention has no backward on a CPU. Not compiled, which takes a minute."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    model = build_model(shape)
    with torch.no_grad():
        wanted, _ = rows_alone(model, *tree_rows)
        monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: flex_attention)
        model.set_attn_implementation("flex_attention")
        assert_close(torch.cat(packed_logps(model, *tree_rows)), torch.cat(wanted))
