"""What of an engine on a CPU must be packed again is found by what it is."""

from types import SimpleNamespace

import torch
from torch import nn

from attn_trainers.base.cpu_reload import forget_kernels, sharing_weights


class Packed(nn.Module):
    """A module with a method that packs its weight, as vLLM's layers have one."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None, moe_kernel=None)


def test_modules_that_share_a_weight_are_found_wherever_they_are():
    shared, own = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4, 2))
    model = nn.Module()
    model.any_name, model.another = Packed(shared), nn.Sequential(Packed(own), Packed(shared))
    model.plain = nn.Linear(2, 4, bias=False)
    model.plain.weight = own  # shares, but packs nothing
    # Packed weights leave empty ones behind, which all lie at no place.
    model.empty, model.too = Packed(nn.Parameter(torch.empty(0))), Packed(nn.Parameter(torch.empty(0)))
    found = sharing_weights(model)
    assert {id(module) for module in found} == {id(m) for m in (model.any_name, *model.another)}


def test_every_kernel_of_a_mixture_is_forgotten():
    model = nn.Sequential(*[Packed(nn.Parameter(torch.ones(1))) for _ in range(3)], nn.Linear(1, 1))
    model[1].quant_method.moe_kernel = "kernel"
    forget_kernels(model)
    assert [module.quant_method.moe_kernel for module in model[:3]] == [None] * 3
