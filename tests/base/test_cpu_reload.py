"""What of an engine on a CPU must be packed again is found by what it is."""

from types import SimpleNamespace

import torch
from torch import nn

from attn_trainers.base.cpu_reload import holds_packer, kernels_made_anew, sharing_weights


class Packer:
    """Packs weights; vLLM's quant methods and experts are such."""

    def process_weights_after_loading(self, layer):
        pass


class Mixture(Packer):
    """Builds a kernel when it packs for the first time, and packs the weights only then, as vLLM's mixtures do."""

    def __init__(self):
        self.any_name = None
        self.given = Packer()  # has it since before the weights came
        self.config = SimpleNamespace(sizes=(4, 2), kind=Packer)

    def process_weights_after_loading(self, layer):
        self.given.process_weights_after_loading(layer)
        if self.any_name is None:
            layer.packed = layer.weight + 1
            self.any_name = SimpleNamespace(impl=SimpleNamespace(experts=Packer()))
        else:
            layer.packed = layer.weight


class Layer(nn.Module):
    def __init__(self, weight: nn.Parameter, quant_method: Packer):
        super().__init__()
        self.weight, self.quant_method = weight, quant_method


def ones(*shape) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape), requires_grad=False)


def test_modules_that_share_a_weight_are_found_wherever_they_are():
    shared, own = ones(4, 2), ones(4, 2)
    model = nn.Module()
    model.any_name = Layer(shared, Packer())
    model.another = nn.Sequential(Layer(own, Packer()), Layer(shared, Packer()))
    model.plain = nn.Linear(2, 4, bias=False)
    model.plain.weight = own  # shares, but packs nothing
    # Packed weights leave empty ones behind, which all lie at no place.
    model.empty, model.too = Layer(ones(0), Packer()), Layer(ones(0), Packer())
    found = sharing_weights(model)
    assert {id(module) for module in found} == {id(m) for m in (model.any_name, *model.another)}


def test_kernels_are_made_anew_and_the_weights_packed_again():
    model = nn.Sequential(Layer(ones(2), Mixture()), nn.Linear(1, 1), Layer(ones(2), Mixture()))
    layers = [model[0], model[2]]
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
    before = [layer.quant_method.any_name for layer in layers]
    given = [layer.quant_method.given for layer in layers]
    with kernels_made_anew(model):
        model[0].weight.fill_(5.0)
        model[0].quant_method.process_weights_after_loading(model[0])  # the other one is given no weights
    assert model[0].packed.tolist() == [6.0, 6.0]
    assert [layer.quant_method.any_name is kernel for layer, kernel in zip(layers, before, strict=True)] == [
        False,
        True,
    ]
    assert all(layer.quant_method.given is one for layer, one in zip(layers, given, strict=True))


def test_a_kernel_is_what_holds_something_that_packs():
    kernel = SimpleNamespace(impl=SimpleNamespace(experts=Packer()))
    kernel.impl.back = kernel
    around = SimpleNamespace(layer=Layer(ones(1), Packer()), tensor=torch.ones(1), function=holds_packer)
    for value, expected in [(kernel, True), (Packer(), False), (Mixture, False), (around, False), ("name", False)]:
        assert holds_packer(value) is expected
