"""New weights for a vLLM engine on a CPU.

vLLM's CPU backend packs the weights of its layers and drops the originals, so that weights cannot be written into it
one by one. There all layers are loaded anew and packed again, by the same calls as at the engine's start; what would
keep an earlier packing is found by what it is, not by the name of a module or model.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


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
    forget_kernels(model)
    with _quiet():
        runner.reload_weights(weights_iterator=weights)
    for module in sharing_weights(model):
        module.quant_method.process_weights_after_loading(module)
    if hasattr(model, "process_weights_after_loading"):  # of a whole model: called at the start, but not at a reload
        model.process_weights_after_loading()
    llm.reset_prefix_cache()


def forget_kernels(model: nn.Module) -> None:
    """Let mixtures of experts make their kernels again.

    A mixture that has a kernel takes new weights for packed ones, and would multiply by what is not packed.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


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
    return [
        module for module in shared if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading")
    ]


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
