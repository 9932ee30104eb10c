"""What is checked and printed before a GPU is used: rows, tokens, memory, data, chat template, vocabulary, heads.

Nothing of the model is loaded but its config. What cannot work is one ValueError with the field, its value and the
fix; what may be meant so is a warning in the report.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from trl import GRPOConfig, ModelConfig, get_peft_config

from ..base.config import MethodConfig
from ..base.credit import CreditMethod
from ..base.report import Report
from ..rewards import unverifiable_answers
from ..sampling.models import cpu_dtype, num_positions
from ..sampling.problems import prompt_for, render_prompt
from ..thinking import EndOfThinking, ThinkingTags
from .engine import check_sampling
from .memory import (
    DEVICE_OVERHEAD,
    GIB,
    ModelShape,
    Sharding,
    TrainingSetup,
    checkpoint_bytes,
    empty_model,
    estimate_memory,
)


def load_model_config(name: str | None, revision: str | None = None) -> PretrainedConfig:
    """Config of a local folder or a Hub id.

    Raises:
        ValueError: if it cannot be read, offline for instance.
    """
    if not name:
        raise ValueError(f"model_name_or_path={name!r} names no model; set it to a Hub id or a folder.")
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        place = "the folder holds no model" if os.path.isdir(name) else "it is no folder, and the Hub did not give it"
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        raise ValueError(
            f"model_name_or_path={name!r} cannot be read: {place}{offline}. Check the spelling, go online, log in "
            f"with `hf auth login` if it is gated, or download it before (`hf download {name}`). {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def gib(size: float) -> str:
    """Bytes in GiB, with enough digits for a small model."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def check_batch(args: MethodConfig, num_problems: int, report: Report) -> None:
    """Rows, updates and tokens of a generation batch, and what must divide what.

    Raises:
        ValueError: for a data set smaller than a generation batch, or counts that do not divide.
    """
    ranks = args.world_size
    prompts = args.generation_batch_size // args.num_generations
    rows_per_update = args.per_device_train_batch_size * ranks * args.gradient_accumulation_steps
    report.heading("Batch")
    report.add("ranks", ranks)
    report.add(
        "generation batch",
        f"{args.generation_batch_size} rows = {prompts} prompts x {args.num_generations}, trained on in "
        f"{args.updates_per_batch} updates",
    )
    report.add(
        "rows per update",
        f"{rows_per_update} = {args.per_device_train_batch_size} per rank x {ranks} ranks x "
        f"{args.gradient_accumulation_steps} accumulated",
    )
    report.add(
        "tokens per generation batch",
        f"at most {args.generation_batch_size * args.max_completion_length:,} sampled",
    )
    if num_problems < prompts and not args.needs_whole_batches:
        report.warnings.append(
            f"a generation batch takes {prompts} prompts, more than the {num_problems} of the data: some come twice."
        )
    elif num_problems < prompts:
        raise ValueError(
            f"generation_batch_size={args.generation_batch_size} takes {prompts} prompts, but the data set has "
            f"{num_problems}, and TRL's sampler leaves out a batch that is not whole, so that it would train on none; "
            f"lower generation_batch_size to at most {num_problems * args.num_generations}, or add problems."
        )


def check_lengths(args: GRPOConfig, max_prompt_length: int, config: PretrainedConfig, report: Report) -> None:
    """Prompt and completion against what vLLM and the model take.

    Raises:
        ValueError: if a row does not fit.
    """
    row = max_prompt_length + args.max_completion_length
    report.heading("Lengths")
    report.add("tokens per row", f"{row} = {max_prompt_length} prompt + {args.max_completion_length} completion")
    positions = num_positions(config) or float("inf")
    limit = args.vllm_max_model_length
    if args.use_vllm and args.vllm_mode == "colocate" and limit is not None:  # a server has a limit of its own
        if limit > positions:
            raise ValueError(
                f"vllm_max_model_length={limit} is more than the {positions} positions of the model; lower it to "
                f"{min(row, positions)}."
            )
        if row > limit:
            raise ValueError(
                f"vllm_max_model_length={limit} is less than max_prompt_length + max_completion_length = {row}; raise "
                f"it to {row}, or lower one of those."
            )
    if row > positions:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} and max_prompt_length={max_prompt_length} exceed the "
            f"{positions} positions of the model; lower max_completion_length to {positions - max_prompt_length}."
        )


def training_setup(
    args: GRPOConfig, model_args: ModelConfig, config: PretrainedConfig, row_tokens: int
) -> TrainingSetup:
    """What the memory estimate needs, from the settings of a run."""
    peft_config = get_peft_config(model_args)
    adapter_parameters = 0
    if peft_config is not None:
        try:
            with torch.device("meta"):
                model = get_peft_model(empty_model(config), peft_config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ValueError(
                f"lora_target_modules={peft_config.target_modules!r} does not fit the model ({_first_line(error)}); "
                "name linear layers of the model, or 'all-linear'."
            ) from error
        adapter_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = (args.model_init_kwargs or {}).get("dtype") or model_args.dtype
    if dtype == "auto":
        dtype = config.dtype or "float32"
    return TrainingSetup(
        sharding=Sharding.from_environment(args.world_size),
        micro_batch=args.per_device_train_batch_size,
        row_tokens=row_tokens,
        weight_bytes=4 if str(dtype).endswith("float32") else 2,
        compute_bytes=2 if args.bf16 or args.fp16 else 4,
        adapter_parameters=adapter_parameters,
        has_reference=args.beta != 0.0 and not adapter_parameters,
        gradient_checkpointing=args.gradient_checkpointing,
        vllm_share=args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else None,
        vllm_ranks=args.vllm_tensor_parallel_size,
        vllm_sleeps=args.vllm_enable_sleep_mode,
        generation_rows=0 if args.use_vllm else args.per_device_train_batch_size * args.steps_per_generation,
    )


@dataclass(frozen=True)
class Device:
    """What the estimate is compared with.

    Attributes:
        name: for the report.
        memory: bytes of one GPU, or of the machine.
        is_gpu: whether it is a GPU.
        ranks: ranks that share it.
    """

    name: str
    memory: float
    is_gpu: bool
    ranks: int = 1

    @classmethod
    def of(cls, args: GRPOConfig) -> "Device":
        """The device of this rank."""
        if torch.cuda.is_available() and not args.use_cpu:
            properties = torch.cuda.get_device_properties(args.device)
            return cls(properties.name, properties.total_memory, is_gpu=True)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        name = "this machine" if ranks == 1 else f"this machine, {ranks} ranks"
        return cls(name, psutil.virtual_memory().total, is_gpu=False, ranks=ranks)


def check_precision(args: GRPOConfig, device: Device, report: Report) -> None:
    """Mixed precision that a CPU has to emulate."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name) and not device.is_gpu and cpu_dtype(dtype) != dtype:
            report.warnings.append(
                f"{name}=True: this CPU has no instructions for it and takes several times as long over a product as "
                f"in float32; set {name}=False."
            )


def check_memory(
    args: GRPOConfig, setup: TrainingSetup, config: PretrainedConfig, device: Device, report: Report
) -> None:
    """The estimate against the device.

    Raises:
        ValueError: if what no batch size changes exceeds the device, or vLLM's share holds no sequence.
    """
    shape = ModelShape.from_config(config)
    overhead = DEVICE_OVERHEAD if device.is_gpu else 0
    if not device.is_gpu and setup.vllm_share is not None:  # vLLM takes a fixed size there
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * GIB
        share = (cache + 2 * shape.num_parameters) / device.memory
        setup = replace(setup, vllm_share=share, vllm_sleeps=False)
    estimate = estimate_memory(shape, setup, device.memory)
    certain, peak = (device.ranks * (size + overhead) for size in (estimate.certain, estimate.peak))
    report.heading(f"Memory per rank, an estimate ({setup.sharding}; docs/memory.md)")
    report.add("parameters", f"{shape.num_parameters:,}" + _adapter_note(setup))
    for name, size in (estimate.state | estimate.training | estimate.generation).items():
        report.add(name, gib(size))
    if estimate.engine:
        report.add("vLLM", gib(estimate.engine))
    if overhead:
        report.add("context and slack", gib(overhead))
    report.add("peak", f"{gib(peak)} of {gib(device.memory)} ({device.name})")
    if certain > device.memory:
        raise ValueError(
            f"model_name_or_path={config.name_or_path!r} needs {gib(certain)} before the first token "
            f"({setup.sharding}, {setup.sharding.num_ranks} rank(s)), but there are {gib(device.memory)}; use more "
            "ranks with accelerate_configs/zero3.yaml, use_peft, vllm_enable_sleep_mode, or a smaller model."
        )
    if device.is_gpu and estimate.kv_tokens is not None:
        _check_cache(args, setup, config, estimate.kv_tokens, device, report)
    if peak > device.memory:
        report.warnings.append(
            f"per_device_train_batch_size={args.per_device_train_batch_size} with rows of {setup.row_tokens} tokens "
            "may not fit: lower it (and raise gradient_accumulation_steps as much), set gradient_checkpointing, or "
            "lower max_completion_length."
        )


def _check_cache(
    args: GRPOConfig, setup: TrainingSetup, config: PretrainedConfig, kv_tokens: int, device: Device, report: Report
) -> None:
    """Refuse a KV cache that does not hold the longest sequence: vLLM would not start."""
    report.add("KV cache", f"{kv_tokens:,} tokens, {kv_tokens // setup.row_tokens} full rows")
    longest = args.vllm_max_model_length or num_positions(config) or setup.row_tokens
    if kv_tokens < longest:
        raise ValueError(
            f"vllm_gpu_memory_utilization={args.vllm_gpu_memory_utilization} of {gib(device.memory)} leaves room for "
            f"{kv_tokens} tokens beside the weights, less than a sequence of {longest} "
            f"(vllm_max_model_length={args.vllm_max_model_length}); raise it, raise vllm_tensor_parallel_size, or "
            f"lower vllm_max_model_length to {setup.row_tokens}."
        )


def _adapter_note(setup: TrainingSetup) -> str:
    return f", of which {setup.adapter_parameters:,} in the adapter are trained" if setup.adapter_parameters else ""


def check_disk(args: GRPOConfig, setup: TrainingSetup, config: PretrainedConfig, report: Report) -> None:
    """Room for the checkpoints of the run."""
    if args.save_strategy == "no":
        return
    size = checkpoint_bytes(ModelShape.from_config(config), setup)
    folder = Path(args.output_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    count = (args.save_total_limit or 1) + 1  # one more while the new one is written
    report.add("a checkpoint on disk", f"{gib(size)} of {gib(free)} free")
    if count * size > free:
        report.warnings.append(
            f"save_total_limit={args.save_total_limit}: {count} checkpoints of {gib(size)} exceed the {gib(free)} "
            "that are free in output_dir; free some, or lower save_total_limit."
        )


@dataclass(frozen=True)
class LeftOut:
    """Problems of the data that are not trained on.

    Attributes:
        long: how many have prompts over `max_prompt_length`.
        unreadable: the accepted answers that no verifier parses: every rollout would be wrong, at the full price.
    """

    long: int = 0
    unreadable: Sequence[str | list[str]] = ()


def unreadable_answers(dataset: Dataset) -> list[int]:
    """Indices of the problems whose answers no verifier parses.

    Raises:
        ValueError: if that is all of them.
    """
    indices = unverifiable_answers(dataset["answer"])
    if indices and len(indices) == len(dataset):
        raise ValueError(
            f"answer_column holds no answer that a verifier can parse, e.g. {dataset[0]['answer']!r}; set "
            "answer_column to the column of final answers."
        )
    return indices


def leave_out(dataset: Dataset, indices: Sequence[int], num_long: int) -> tuple[Dataset, LeftOut]:
    """The data set without the problems at `indices`, whose answers cannot be read, and what is left out in all."""
    kept = dataset.select(sorted(set(range(len(dataset))) - set(indices))) if indices else dataset
    return kept, LeftOut(num_long, [dataset[index]["answer"] for index in indices])


def check_data(dataset: Dataset, left_out: LeftOut, report: Report) -> None:
    """Problems that are trained on, and those that are not."""
    report.heading("Data")
    report.add("problems", f"{len(dataset)}, {left_out.long} more left out for prompts over max_prompt_length")
    report.add("answers no verifier parses", len(left_out.unreadable))
    if left_out.unreadable:
        report.warnings.append(
            f"{len(left_out.unreadable)} problems are left out: no verifier parses their answers, e.g. "
            f"{left_out.unreadable[0]!r}."
        )


def thinking_behaviour(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None, tags: ThinkingTags | None = None
) -> str:
    """What the chat template does about thinking, in a sentence; `tags` are those of `</think>` by default."""
    tags = tags or ThinkingTags()
    if tokenizer.chat_template is None:
        return "none; the prompt is the bare text"
    prompt = render_prompt(tokenizer, prompt_for("1 + 1 =", "{problem}"), chat_template_kwargs)
    opening, state = tags.opening or "the thinking", tags.state_of_prompt(prompt)
    if state == "closed":
        return f"closes {opening} in the prompt: the model is asked not to think"
    if state == "opened":
        return f"opens {opening} in the prompt: completions start inside the thinking"
    return f"leaves {opening} to the model (prompts end in {prompt.rpartition('1 + 1 =')[2][-20:]!r})"


def check_vocabulary(args: MethodConfig, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
    """Chat template and the end of thinking.

    Raises:
        ValueError: if the end of thinking is unknown to the vocabulary.
    """
    end, thinking = args.end_of_thinking, EndOfThinking(tokenizer, args.end_of_thinking)
    report.heading("Tokenizer")
    report.add("chat template", thinking_behaviour(tokenizer, args.chat_template_kwargs, thinking.tags))
    if not thinking.in_vocabulary:
        raise ValueError(
            f"end_of_thinking={end!r} is not in the vocabulary of the tokenizer; set it to the text that ends "
            "thinking for this model, or take a model that has it."
        )
    report.add(repr(end), "one token" if len(thinking.token_ids) == 1 else f"{len(thinking.token_ids)} tokens")


def check_heads(args: GRPOConfig, config: PretrainedConfig, report: Report) -> None:
    """Layers and heads of the model.

    Raises:
        ValueError: for heads that vLLM cannot split over its ranks.
    """
    text = config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    report.heading("Heads")
    report.add("layers x heads", f"{layers} x {heads}")
    ranks = args.vllm_tensor_parallel_size
    if args.use_vllm and (heads % ranks or args.world_size % ranks):
        raise ValueError(
            f"vllm_tensor_parallel_size={ranks} does not divide the {heads} heads of the model and the "
            f"{args.world_size} ranks; set it to a common divisor."
        )


def preflight(
    args: MethodConfig,
    model_args: ModelConfig,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    left_out: LeftOut,
    max_prompt_length: int,
    credit: CreditMethod | None = None,
) -> Report:
    """Check a run and say what it will take.

    Args:
        args, model_args: settings of training and model.
        config: of the model, see `load_model_config`.
        tokenizer: of the model.
        dataset: with the columns `prompt` and `answer`, of the problems that are trained on.
        left_out: those that are not.
        max_prompt_length: tokens of a prompt at most.
        credit: credit method beside the trainer's own.

    Raises:
        ValueError: for the first thing that cannot work, naming field, value and fix.
    """
    if args.hub_token is not None:
        raise ValueError(
            "hub_token is set: it would be written into training_args.bin, which is pushed with the model. Leave it "
            "out and log in with `hf auth login`, or set the environment variable HF_TOKEN."
        )
    report = Report()
    name = model_args.model_name_or_path
    report.heading(f"Model {name}")
    check_heads(args, config, report)
    check_batch(args, len(dataset), report)
    check_lengths(args, max_prompt_length, config, report)
    check_sampling(args, max_prompt_length, report)
    setup = training_setup(args, model_args, config, max_prompt_length + args.max_completion_length)
    device = Device.of(args)
    check_precision(args, device, report)
    check_memory(args, setup, config, device, report)
    check_disk(args, setup, config, report)
    check_vocabulary(args, tokenizer, report)
    report.heading("Method")
    args.preflight(config, tokenizer, report)
    if credit is not None:
        credit.preflight(config, tokenizer, report)
    check_data(dataset, left_out, report)
    return report
