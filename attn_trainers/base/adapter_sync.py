"""A LoRA that travels to vLLM as an adapter: nothing is merged, and only the adapter is pushed.

vLLM reads adapters from a folder alone, so each push writes one for the moment, for a colocated engine here and for a
server in `attn_trainers.base.server`. What vLLM would ignore or refuse in an
adapter is found beforehand; such a run pushes merged weights instead, and says why.
"""

import functools
import logging
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path

from accelerate.utils import is_peft_model
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from ..sampling.server import ADAPTER_RANKS, engine_rank


logger = logging.getLogger(__name__)

# Fields of a LoRA that vLLM takes as they are, or that leave the adapter's weights what they are.
UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "init_lora_weights", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Ways to begin that leave the base model as it is.
UNCHANGED_BASES = (True, False, "gaussian", "eva", "orthogonal")


def lora_hindrance(config: LoraConfig) -> str | None:
    """What in a LoRA's settings vLLM would ignore or refuse, as `field=value` with the reason; `None` for nothing."""
    if not isinstance(config, LoraConfig):
        return f"peft_type={config.peft_type.value!r} is no LoRA"
    if config.r > ADAPTER_RANKS[-1]:
        return f"r={config.r} is above {ADAPTER_RANKS[-1]}"
    if config.init_lora_weights not in UNCHANGED_BASES:
        return f"init_lora_weights={config.init_lora_weights!r} changes the base model"
    for field in fields(LoraConfig):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in UNDERSTOOD and value and value != default:
            return f"{field.name}={value!r} is not known to vLLM"
    return None


def adapts_embeddings(model: nn.Module) -> bool:
    """Whether an adapter has a part in the input embeddings or the output head, or trains them whole."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in ends)


def check_tied_ends(model: nn.Module) -> None:
    """Refuse an adapter that parts what vLLM holds once: embeddings and output head of one weight, adapted apart.

    Nothing shows at the start, as an adapter begins with no change; merged, each part's change would reach the other.

    Raises:
        ValueError: for such an adapter.
    """
    if not is_peft_model(model) or not model.config.get_text_config().tie_word_embeddings:
        return
    config = model.peft_config[model.active_adapters[0]]
    if adapts_embeddings(model) and not getattr(config, "ensure_weight_tying", False):
        raise ValueError(
            f"lora_target_modules={config.target_modules!r}, modules_to_save={config.modules_to_save!r} adapt the "
            "embeddings or the output head, but this model ties them, and vLLM holds them once; leave both out, or "
            "set use_vllm to False."
        )


def supports_lora(architectures: list[str] | None) -> bool:
    """Whether vLLM's model of an architecture takes adapters."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    known = [ModelRegistry.models[name] for name in architectures or () if name in ModelRegistry.models]
    return any(supports_lora(model.load_model_cls()) for model in known)


def adapter_hindrance(model: nn.Module, options: dict | None, is_sharded: bool) -> str | None:
    """Why the weights of a model cannot travel as an adapter; `None` if they can.

    Args:
        model: that is trained.
        options: of the engine; `None` for a server, which says itself what it takes.
        is_sharded: whether FSDP splits the adapter's own weights.
    """
    if not is_peft_model(model):
        return "the model has no adapter"
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    if (found := lora_hindrance(model.peft_config[model.active_adapters[0]])) is not None:
        return found
    if adapts_embeddings(model):
        return "it adapts the embeddings or the output head"
    if is_sharded:
        return "FSDP shards it"
    if options is None:
        return None
    if options.get("enable_sleep_mode"):
        return "vllm_enable_sleep_mode=True discards the engine's weights, so that all must be pushed"
    if not supports_lora(model.config.architectures):
        return f"vLLM takes no adapter for {', '.join(model.config.architectures or ['this model'])}"
    return None


@functools.cache
def adapter_llm() -> type:
    """vLLM's `LLM` whose requests go through the adapter that was pushed last (`adapter`, a `LoRARequest`)."""
    from vllm import LLM

    class AdapterLLM(LLM):
        adapter = None

        def generate(self, *args, **kwargs):
            return super().generate(*args, **({"lora_request": self.adapter} | kwargs))

    return AdapterLLM


def adapter_engine(trainer, plain: type, options: dict):
    """A colocated engine that takes the trainer's adapter where that is wanted, else a plain one.

    Args:
        trainer: whose model samples.
        plain: vLLM's `LLM`.
        options: of the engine.

    Raises:
        ValueError: if `lora_sync` is "adapter" and the adapter cannot travel.
    """
    wanted = trainer.args.lora_sync
    is_sharded = trainer.accelerator.distributed_type == "FSDP"
    hindrance = None if wanted == "merged" else adapter_hindrance(trainer.model, options, is_sharded)
    if wanted == "adapter" and hindrance is not None:
        raise ValueError(f"lora_sync='adapter' does not go here ({hindrance}); set it to 'auto' or 'merged'.")
    if wanted == "merged" or hindrance is not None:
        if is_peft_model(trainer.model):
            logger.info("LoRA goes to vLLM merged into the weights: %s.", hindrance or "lora_sync='merged'")
        return plain(**options)
    logger.info("LoRA goes to vLLM as an adapter.")
    rank = trainer.model.peft_config[trainer.model.active_adapters[0]].r
    return adapter_llm()(**options, enable_lora=True, max_lora_rank=engine_rank(rank), max_loras=1)


def takes_adapter(vllm_generation: VLLMGeneration) -> bool:
    """Whether the engine was built to take adapters."""
    return vllm_generation.mode == "colocate" and hasattr(vllm_generation.llm, "adapter")


def adapter_weights(vllm_generation: VLLMGeneration) -> dict[str, Tensor]:
    """The trained adapter's weights by PEFT's names, on the CPU; a collective."""
    model = vllm_generation.model
    (name,) = model.active_adapters
    trained = [parameter for key, parameter in model.named_parameters() if model.prefix in key]
    with vllm_generation._dist.gather_params(trained):
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        return {key: weight.detach().to("cpu", copy=True).contiguous() for key, weight in weights.items()}


def save_adapter(model: nn.Module, weights: dict[str, Tensor], folder: str | Path) -> None:
    """Write an adapter as vLLM reads it."""
    save_file(weights, f"{folder}/adapter_model.safetensors")
    model.peft_config[model.active_adapters[0]].save_pretrained(str(folder))


def push_adapter(vllm_generation: VLLMGeneration) -> None:
    """Put the trained adapter into the engine, in place of the one before; every rank into its own.

    Raises:
        ValueError: if the engine refuses it.
    """
    from vllm.lora.request import LoRARequest

    llm = vllm_generation.llm
    weights = adapter_weights(vllm_generation)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(vllm_generation.model, weights, folder)
        try:
            llm.llm_engine.add_lora(LoRARequest("trained", 1, folder, load_inplace=True))
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"lora_sync: vLLM refuses the adapter ({reason}); set lora_sync to 'merged'.") from error
        llm.adapter = LoRARequest("trained", 1, folder)
    llm.reset_prefix_cache()
