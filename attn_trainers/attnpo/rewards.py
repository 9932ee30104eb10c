"""The correctness that AttnPO shortens by."""

from ..rewards import math_accuracy_reward


def closed_thinking_accuracy_reward(completions, answer, log_metric=None, **kwargs) -> list[float]:
    """TRL reward function: `math_accuracy` of responses that close their thinking once, 0 for all others.

    A response without `</think>` has no final answer, though its thinking may hold one, and one with several, or with
    a `<think>` of its own, has no thinking to shorten: AttnPO's published grader calls them wrong.

    Args:
        completions: strings, or lists of messages of which the last counts.
        answer: one accepted answer or list of accepted answers per completion.
        log_metric: TRL's; receives what `math_accuracy_reward` logs.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    closed = ["<think>" not in text and text.count("</think>") == 1 for text in texts]
    # A response that is wrong anyway is not graded.
    graded = [text if is_closed else "" for text, is_closed in zip(texts, closed, strict=True)]
    return math_accuracy_reward(graded, answer, log_metric=log_metric)
