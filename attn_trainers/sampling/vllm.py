"""What trainers and evaluation alike must know of a vLLM engine."""

from collections.abc import Sequence


def whole_prompt_calls(llm, requests: Sequence) -> list[list]:
    """Seeded requests (with `prompt_ids`) in groups to give to a vLLM engine on a CPU one after the other.

    A request with a seed has a generator of its own. Where a prompt is prefilled in chunks, vLLM takes back what the
    sampler drew from it in between, which CPU generators cannot do: so a group holds no more prompt tokens than one
    engine step takes.
    """
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    room = scheduler.max_num_batched_tokens - scheduler.max_num_seqs
    calls: list[list] = [[]]
    used = 0
    for request in requests:
        used += len(request.prompt_ids)
        if used > room and calls[-1]:
            calls.append([])
            used = len(request.prompt_ids)
        calls[-1].append(request)
    return calls
