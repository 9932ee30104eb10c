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


def get_length_penalised_accuracy_reward(num_generations: int, penalty: float = 0.2):
    r"""TRL reward function: correctness less a penalty for length within the prompt's group (AttnPO, TLMRE).

    A rank must hold whole groups, as TRL hands a reward function only its own share. `AttnPOTrainer` needs no such
    function: it penalises over all ranks. `AttnRLTrainer` refuses it, as trees have no whole groups.

    Args:
        num_generations: completions per prompt, contiguous.
        penalty: weight of the length, in [0, 1].

    Returns:
        A reward function; it raises a ValueError where a rank's completions are no whole groups.
    """

    def length_penalised_accuracy_reward(completions, answer, completion_ids, **kwargs) -> list[float]:
        import torch

        from ..attnpo.credit import length_penalised_rewards

        if len(completions) % num_generations:
            raise ValueError(
                f"num_generations={num_generations} does not divide the {len(completions)} completions of a rank; "
                "choose per_device_train_batch_size * steps_per_generation as a multiple of it."
            )
        correct = torch.tensor(math_accuracy_reward(completions, answer, **kwargs)).view(-1, num_generations)
        lengths = torch.tensor([len(ids) for ids in completion_ids]).view(-1, num_generations)
        return length_penalised_rewards(correct, lengths, penalty).flatten().tolist()

    length_penalised_accuracy_reward.needs_groups = True
    return length_penalised_accuracy_reward
