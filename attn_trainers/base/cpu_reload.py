"""New weights for a vLLM engine on a CPU.

vLLM's CPU backend packs the weights of its layers and drops the originals, so that weights cannot be written into it
one by one. There all layers are loaded anew and packed again, by the same calls as at the engine's start; what would
keep an earlier packing is found by what it is, not by the name of a module or model.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType

from torch import Tensor, nn


_PACKS = "process_weights_after_loading"  # vLLM's name for it, on whatever packs weights
_NO_KERNEL = (type, nn.Module, Tensor, FunctionType)
# vLLM reports at each reload what shares or renames its weights as if it were missing.
_TALKATIVE = ("vllm.model_executor.model_loader.reload.layerwise", "vllm.v1.worker.gpu_model_runner")


def reload_packed_weights(llm, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load all weights of an engine anew, pack them, and forget the prefixes that the old ones computed.

    Args:
        llm: vLLM's `LLM`, in this process.
        weights: name and value of every parameter, as a checkpoint names them.
    """
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    model = runner.get_model()
    with kernels_made_anew(model), _quiet():
        runner.reload_weights(weights_iterator=weights)
    for module in sharing_weights(model):
        module.quant_method.process_weights_after_loading(module)
    if hasattr(model, _PACKS):  # of a whole model: called at the start, but not at a reload
        model.process_weights_after_loading()
    llm.reset_prefix_cache()


@contextmanager
def kernels_made_anew(model: nn.Module) -> Iterator[None]:
    """Context of a reload in which modules have no kernel, and so make one as at the engine's start.

    A mixture of experts that has a kernel takes new weights for packed ones, and would multiply by what is not packed.
    A kernel that the reload does not make again, as the module was given no weights, is put back.
    """
    kept = [
        (method, name, value)
        for method in filter(None, map(_quant_method, model.modules()))
        for name, value in vars(method).items()
        if holds_packer(value)
    ]
    for method, name, _ in kept:
        setattr(method, name, None)
    try:
        yield
    finally:
        for method, name, value in kept:
            if getattr(method, name) is None:
                setattr(method, name, value)


def holds_packer(value: object) -> bool:
    """Whether an object was built around something that packs weights, however deep inside.

    What packs by itself is not meant: its owner has it since before the weights came, and has it pack each time.
    """
    if isinstance(value, _NO_KERNEL) or hasattr(type(value), _PACKS):
        return False
    inside, seen = [value], {id(value)}
    for one in inside:  # grows
        for held in getattr(one, "__dict__", {}).values():
            if id(held) in seen or isinstance(held, _NO_KERNEL):
                continue
            if hasattr(type(held), _PACKS):
                return True
            seen.add(id(held))
            inside.append(held)
    return False


def _quant_method(module: nn.Module) -> object | None:
    """What packs a module's weights; `None` if nothing does."""
    method = getattr(module, "quant_method", None)
    return method if hasattr(method, _PACKS) else None


def sharing_weights(model: nn.Module) -> list[nn.Module]:
    """Modules with a packing of their own whose weight is also another module's, as a tied output head's is.

    A reload loads, and so packs, only one of them.
    """
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                owners[parameter.data_ptr()].append(module)
    shared = [module for modules in owners.values() if len(modules) > 1 for module in modules]
    return [module for module in shared if _quant_method(module) is not None]


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
