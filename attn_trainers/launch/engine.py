"""What a run asks of its vLLM engine, before there is one."""

from trl import GRPOConfig

from ..base.report import Report


TOKENS_PER_ENGINE_STEP = 4096
"""What TRL lets a colocated engine compute at once (`max_num_batched_tokens`); no setting changes it."""


def check_sampling(args: GRPOConfig, max_prompt_length: int, report: Report) -> None:
    """What TRL fixes of a colocated engine, and what vLLM's log-probs are worth.

    Raises:
        ValueError: if the engine would not start.
    """
    if not args.use_vllm:
        return
    given = {"top_p": (args.top_p, 1.0), "top_k": (args.top_k, 0), "min_p": (args.min_p, None)}
    cut = [f"{name}={value}" for name, (value, off) in given.items() if value not in (off, None, 0.0)]
    if cut and args.vllm_importance_sampling_correction:
        report.warnings.append(
            f"{', '.join(cut)}: vLLM's log-probs are those among the tokens that were kept, the trainer's among all, "
            "so vllm_importance_sampling_correction scales the loss down by the kept probability "
            "(huggingface/trl#6789); sample from all tokens, or switch the correction off."
        )
    if args.vllm_mode != "colocate":
        return
    sequences = args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation
    if sequences > TOKENS_PER_ENGINE_STEP:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} x steps_per_generation="
            f"{args.steps_per_generation} asks vLLM for {sequences} sequences at once, but TRL lets it compute "
            f"{TOKENS_PER_ENGINE_STEP} tokens a step; lower generation_batch_size."
        )
    row, limit = max_prompt_length + args.max_completion_length, TOKENS_PER_ENGINE_STEP
    chunks = f"; a prefix of {row} is read in {-(-row // limit)}" if row > limit else ""
    report.add("tokens per engine step", f"at most {limit}, fixed by TRL{chunks}")
    if 2 * sequences > limit:
        report.warnings.append(
            f"{sequences} sequences at once take most of the {limit} tokens that TRL lets vLLM compute a step "
            "(max_num_batched_tokens): new prompts wait; lower generation_batch_size, or use more ranks."
        )
