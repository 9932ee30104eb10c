"""An estimate of the memory a training run takes per rank, by arithmetic on the model's shape (docs/memory.md).

P parameters, of which P_t are trained; R ranks; N tokens in a micro-batch; w, c bytes per number of the stored weights
and in computation. Nothing is loaded: parameters are counted on the meta device.
"""

import os
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


GIB = 2**30
# CUDA context, NCCL buffers and the allocator's slack, in bytes; nothing on a CPU.
DEVICE_OVERHEAD = 2 * GIB
# vLLM's own activations and CUDA graphs, out of its share.
VLLM_OVERHEAD = 2 * GIB
# Elements of DeepSpeed's two communication buckets (its default size).
ZERO_BUCKETS = 2 * 500_000_000


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights. One rank alone may call it: `from_config` would shard under ZeRO-3, with all ranks.

    Raises:
        ValueError: if the config is not a causal language model's.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model_name_or_path={config.name_or_path!r} is a {config.model_type} model, which is no causal language "
            "model of transformers; choose one that is."
        )
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder that memory depends on."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "ModelShape":
        """Shape of a model by its config, without weights."""
        text = config.get_text_config()
        model = empty_model(config)
        num_heads = text.num_attention_heads
        return cls(
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            num_heads=num_heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
            vocab_size=text.vocab_size,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of the attention and the gated MLP of one layer."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.vocab_size * self.hidden_size

    def kv_bytes(self, bytes_per_number: int) -> int:
        """Bytes of the KV cache per token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA on all linear layers but the head."""
        q, k = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sides = 4 * self.hidden_size + 2 * q + 2 * k  # in + out of q, k, v and o
        sides += 3 * (self.hidden_size + self.intermediate_size)  # of gate, up and down
        return self.num_layers * rank * sides


@dataclass(frozen=True)
class Sharding:
    """How the state of training is spread over ranks.

    Attributes:
        num_ranks: R.
        engine: `"none"` (one rank, or DDP), `"deepspeed"` or `"fsdp"`.
        stage: 0 to 3, in the sense of ZeRO: 1 shards optimizer state, 2 gradients too, 3 weights too.
        offload: whether optimizer state lies in the host's memory.
    """

    num_ranks: int = 1
    engine: str = "none"
    stage: int = 0
    offload: bool = False

    @classmethod
    def from_environment(cls, num_ranks: int) -> "Sharding":
        """What `accelerate launch` set in this process's environment."""
        env = os.environ
        if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            offload = env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
            return cls(num_ranks, "deepspeed", int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)), offload)
        if env.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            full = env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "full_shard", "1")
            return cls(num_ranks, "fsdp", 3 if full else 2, env.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")
        return cls(num_ranks)

    def divide(self, size: float, stage: int) -> float:
        """Bytes per rank of something that is sharded from `stage` on."""
        return size / self.num_ranks if self.stage >= stage else size

    def __str__(self) -> str:
        names = {
            "deepspeed": f"ZeRO-{self.stage}",
            "fsdp": "FSDP",
            "none": "DDP" if self.num_ranks > 1 else "unsharded",
        }
        return names[self.engine]


@dataclass(frozen=True)
class TrainingSetup:
    """What memory depends on besides the model.

    Attributes:
        sharding: over the ranks.
        micro_batch: rows per forward and backward (`per_device_train_batch_size`).
        row_tokens: prompt and completion tokens of a row at most.
        weight_bytes: bytes per number of the loaded weights (`dtype`): w.
        compute_bytes: bytes per number in computation (2 under bf16): c.
        adapter_parameters: trained parameters of an adapter, 0 for full fine-tuning.
        has_reference: whether a frozen copy of the model is kept (beta > 0, without an adapter).
        gradient_checkpointing: as in the trainer's arguments.
        vllm_share: `vllm_gpu_memory_utilization`, `None` without vLLM.
        vllm_ranks: ranks one engine is spread over.
        vllm_sleeps: whether vLLM gives its memory back while training.
        generation_rows: rows that `model.generate` samples at once, without vLLM.
    """

    sharding: Sharding
    micro_batch: int
    row_tokens: int
    weight_bytes: int = 4
    compute_bytes: int = 2
    adapter_parameters: int = 0
    has_reference: bool = False
    gradient_checkpointing: bool = True
    vllm_share: float | None = None
    vllm_ranks: int = 1
    vllm_sleeps: bool = False
    generation_rows: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank.

    Attributes:
        state: name to bytes of what is there from the start of training to its end: weights, reference, gradients,
            optimizer.
        training: name to bytes of what comes on top in the largest micro-batch.
        generation: name to bytes of what comes on top while sampling.
        engine: bytes of vLLM's share that are held while training too.
        kv_tokens: tokens that the KV cache holds; `None` where it grows as needed.
    """

    state: dict[str, float]
    training: dict[str, float]
    generation: dict[str, float]
    engine: float
    kv_tokens: int | None

    @property
    def certain(self) -> float:
        """What no smaller batch or shorter completion changes."""
        return sum(self.state.values()) + self.engine

    @property
    def peak(self) -> float:
        """The larger of the two phases."""
        return self.certain + max(sum(self.training.values()), sum(self.generation.values()))


def _state(shape: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    sharding, total = setup.sharding, shape.num_parameters
    adapter = setup.adapter_parameters
    trained = adapter or total
    deepspeed = sharding.engine == "deepspeed"
    if deepspeed:  # the engine computes in c bytes and keeps a float32 copy of what it trains beside the two moments
        weight = gradient = setup.compute_bytes
        moments = 12
    else:  # AdamW's moments have the type of the weights; adapters are kept in float32
        weight = setup.weight_bytes
        gradient = 4 if adapter else weight
        moments = 2 * gradient
    weights = weight * total + (weight if deepspeed else 4) * adapter
    state = {"weights": sharding.divide(weights, 3)}
    if setup.has_reference:
        state["reference model"] = sharding.divide(weight * total, 3)
    gradients = sharding.divide(gradient * trained, 2)
    if deepspeed:
        gradients += min(ZERO_BUCKETS, 2 * trained) * setup.compute_bytes if sharding.num_ranks > 1 else 0
    elif sharding.engine == "none" and sharding.num_ranks > 1:
        gradients *= 2  # DDP's buckets
    state["gradients"] = gradients
    state["optimizer"] = 0 if sharding.offload else sharding.divide(moments * trained, 1)
    return state


def _training(shape: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    tokens = setup.micro_batch * setup.row_tokens  # N
    c = setup.compute_bytes
    # Autocast leaves the residual stream in the type of the weights; DeepSpeed converts the model.
    residual = c if setup.sharding.engine == "deepspeed" else max(c, setup.weight_bytes)
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = tokens * (
        4 * residual * shape.hidden_size + c * (2 * shape.hidden_size + 2 * q + 4 * k + 4 * shape.intermediate_size)
    )
    if setup.gradient_checkpointing:
        activations = tokens * residual * shape.hidden_size * shape.num_layers + 2 * layer
    else:
        activations = layer * (shape.num_layers + 1)
    head = 8 * tokens * shape.hidden_size  # hidden states and their gradient, in float32
    if not setup.adapter_parameters:
        head += 4 * shape.head_parameters  # the gradient of the output head, in float32
    training = {"activations": activations, "output head": head}
    if setup.sharding.stage == 3:
        training["gathered layers"] = c * max(2 * shape.layer_parameters, shape.head_parameters)
    elif setup.sharding.engine == "none" and setup.weight_bytes > c:
        # Copies of trained weights are kept until the micro-batch is done, of frozen ones as long as they are used.
        training["autocast copies"] = c * (setup.adapter_parameters + shape.layer_parameters)
        if not setup.adapter_parameters:
            training["autocast copies"] = c * shape.num_parameters
    return training


def checkpoint_bytes(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of one checkpoint on disk, all ranks together: weights and optimizer state."""
    deepspeed = setup.sharding.engine == "deepspeed"
    trained = setup.adapter_parameters or shape.num_parameters
    weight = 4 if setup.adapter_parameters else setup.compute_bytes if deepspeed else setup.weight_bytes
    return trained * (weight + (12 if deepspeed else 2 * weight))


def estimate_memory(shape: ModelShape, setup: TrainingSetup, device_memory: float) -> MemoryEstimate:
    """Estimate the bytes per rank.

    Args:
        shape: of the model.
        setup: of the run.
        device_memory: bytes of one device; vLLM's share refers to it.
    """
    sharding = setup.sharding
    generation: dict[str, float] = {}
    engine, kv_tokens = 0.0, None
    if setup.vllm_share is not None:
        share = setup.vllm_share * device_memory
        engine = 0.0 if setup.vllm_sleeps else share
        cache = share - 2 * shape.num_parameters / setup.vllm_ranks - VLLM_OVERHEAD
        kv_tokens = max(0, int(cache * setup.vllm_ranks / shape.kv_bytes(2)))
        if setup.vllm_sleeps:
            generation["vLLM"] = share
    elif setup.generation_rows:
        cache = setup.generation_rows * setup.row_tokens * shape.kv_bytes(setup.compute_bytes)
        generation["KV cache"] = cache
        if sharding.stage == 3:
            generation["gathered model"] = setup.compute_bytes * shape.num_parameters
    if setup.adapter_parameters and sharding.stage == 3 and setup.vllm_share is not None:
        generation["gathered model"] = setup.compute_bytes * shape.num_parameters  # merged at each weight sync
    return MemoryEstimate(_state(shape, setup), _training(shape, setup), generation, engine, kv_tokens)
