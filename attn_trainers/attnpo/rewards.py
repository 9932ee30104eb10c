"""The correctness that AttnPO shortens by."""

from ..rewards import math_accuracy_reward
from ..rewards.math import ends_of_thinking
from ..thinking import END_OF_THINKING, ThinkingTags, answer_start, check_answer


def get_closed_thinking_accuracy_reward(
    end_of_thinking: str = END_OF_THINKING, answer: str = "tag", accuracy_reward=math_accuracy_reward
):
    r"""TRL reward function: correctness of responses whose thinking is told from their answer, 0 for all others.

    With `answer="tag"` the thinking must end once. A response without an end has no final answer, though its thinking
    may hold one, and one with several, or that opens its thinking again, has no thinking to shorten: AttnPO's
    published grader calls them wrong. A response that begins with the opening, as a model writes it whose chat
    template does not, is graded like one whose template wrote it.

    Args:
        end_of_thinking: text that ends the thinking, as in the trainer's setting. Where it is a special token, the
            completions must come with it (`EndOfThinking.text`).
        answer: as in the trainer's setting, experimental but for "tag": with "last_boxed" a response counts as closed
            when it holds a closed, filled `\boxed{}`, with "last_paragraph" when it holds any text, of which only the
            last paragraph is graded.
        accuracy_reward: a reward function that grades strings by the column `answer`.

    Returns:
        A reward function of the name `closed_thinking_accuracy_reward`.

    Raises:
        ValueError: for an empty `end_of_thinking` or an unknown `answer`.
    """
    tags, place = ThinkingTags(end_of_thinking), answer
    check_answer(place)

    def closed_thinking_accuracy_reward(
        completions, answer, log_metric=None, end_of_thinking=None, **kwargs
    ) -> list[float]:
        # The trainers here pass their setting, which wins over the one the function was made with.
        ends = ends_of_thinking(end_of_thinking or tags.end, len(completions))
        texts = [whole_text(completion, end) for completion, end in zip(completions, ends, strict=True)]
        # A response that is wrong anyway is not graded.
        graded = [_graded_text(text, ThinkingTags(end), place) for text, end in zip(texts, ends, strict=True)]
        return accuracy_reward(graded, answer, log_metric=log_metric)

    return closed_thinking_accuracy_reward


def whole_text(completion: str | list[dict], end_of_thinking: str) -> str:
    """Text of a completion with its thinking, which a tokenizer's response template puts beside the content."""
    if isinstance(completion, str):
        return completion
    message = completion[-1]
    content, thinking = message.get("content") or "", message.get("reasoning_content")
    return content if thinking is None else f"{thinking}{end_of_thinking}{content}"


def _graded_text(text: str, tags: ThinkingTags, answer: str) -> str:
    """What is graded of a response; empty where its thinking is not told from its answer."""
    if answer == "tag":
        return tags.answer_text(text) if tags.closes_once(text) else ""
    start = answer_start(text, answer)
    if start is None:
        return ""
    # Several boxes may be one answer, so all of them are shown to the grader, which takes the last.
    return text if answer == "last_boxed" else text[start:]


closed_thinking_accuracy_reward = get_closed_thinking_accuracy_reward()
"""`get_closed_thinking_accuracy_reward` for responses that end their thinking with `</think>`."""


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
