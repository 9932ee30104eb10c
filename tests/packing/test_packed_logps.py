"""Packed rows against the same rows one by one: values, gradients, entropies, in every setting a trainer has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.packing import can_pack, pack_rows, packed_forward, packed_logps


SHAPES = ["qwen2", "qwen2-windows", "qwen3", "llama", "mistral", "gemma3_text", "deepseek_v3"]


def gradients(model, logps) -> dict[str, torch.Tensor]:
    """Parameter gradients of a sum in which every token of every row has a weight of its own."""
    model.zero_grad()
    flat = torch.cat(logps)
    (flat * torch.linspace(-1, 1, len(flat)).exp()).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def worst_gradient(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest relative error of a parameter's gradient; one below a hundredth of all is measured against that."""
    least = 0.01 * torch.stack([grad.norm() for grad in wanted.values()]).norm()
    return max(((found[name] - grad).norm() / grad.norm().clamp(min=least)).item() for name, grad in wanted.items())


def assert_equal_to_rows(rows_alone, model, rows, starts, tolerance=1e-5) -> None:
    wanted, _ = rows_alone(model, rows, starts)
    wanted_grads = gradients(model, wanted)
    found = packed_logps(model, rows, starts)
    found_grads = gradients(model, found)
    assert [len(one) for one in found] == [len(row) - start for row, start in zip(rows, starts, strict=True)]
    assert all(one.dtype == torch.float32 for one in found)
    assert relative_error(torch.cat(found), torch.cat(wanted)) < tolerance
    assert worst_gradient(found_grads, wanted_grads) < tolerance


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_rows(build_model, tree_rows, rows_alone, shape, implementation):
    model = build_model(shape)
    model.set_attn_implementation(implementation)
    assert can_pack(model) is None
    assert_equal_to_rows(rows_alone, model, *tree_rows)


@pytest.mark.parametrize("shape", ["qwen2", "mistral"])
@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=14), min_size=1, max_size=6),
    cut=st.floats(0, 1),
)
def test_random_tries(shape_models, rows_alone, shape, rows, cut):
    """Two token ids only, so that rows share prefixes of any length."""
    starts = [1 + int(cut * (len(row) - 2)) for row in rows]
    assert_equal_to_rows(rows_alone, shape_models[shape], rows, starts)


def test_temperature_and_entropies(build_model, tree_rows, rows_alone):
    model, (rows, starts) = build_model("qwen3"), tree_rows
    wanted, wanted_entropies = rows_alone(model, rows, starts, temperature=0.7)
    found, entropies = packed_forward(model, pack_rows(rows, starts), temperature=0.7, entropies=True)
    assert relative_error(torch.cat(found), torch.cat(wanted)) < 1e-5
    assert relative_error(torch.cat(entropies), torch.cat(wanted_entropies)) < 1e-5
    wanted_grads = gradients(model, wanted_entropies)
    assert worst_gradient(gradients(model, entropies), wanted_grads) < 1e-5
