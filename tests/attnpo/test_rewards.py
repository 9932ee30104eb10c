import pytest

from attn_trainers.attnpo.rewards import closed_thinking_accuracy_reward, get_closed_thinking_accuracy_reward


def test_only_responses_that_close_their_thinking_once_can_be_right():
    texts = [
        "Let me see.</think>The answer is \\boxed{7}.",
        "Let me see. \\boxed{7}",
        "a</think>b</think>\\boxed{7}",
        "<think>a</think><think>\\boxed{7}",
        "a</think>\\boxed{8}",
        "a \\boxed{7}</think>so it is.",
    ]
    expected = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    logged = {}
    assert closed_thinking_accuracy_reward(texts, ["7"] * 6, log_metric=logged.__setitem__) == expected
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert closed_thinking_accuracy_reward(messages, ["7"] * 6) == expected
    assert logged == {"grading/timeouts": 0.0, "grading/kills": 0.0}


def test_thinking_that_a_response_template_put_beside_the_content_is_closed():
    closed = {"role": "assistant", "reasoning_content": "It may be \\boxed{8}.", "content": "\\boxed{7}"}
    cut_off = {"role": "assistant", "content": "It may be \\boxed{7}."}
    twice = closed | {"content": "b</think>\\boxed{7}"}
    assert closed_thinking_accuracy_reward([[closed], [cut_off], [twice]], ["7"] * 3) == [1.0, 0.0, 0.0]


def test_a_model_that_opens_its_thinking_is_graded_like_one_whose_template_does():
    texts = ["<think>\na</think>\\boxed{7}", "\n<think>a</think>\\boxed{8}", "<think>a<think>b</think>\\boxed{7}"]
    assert closed_thinking_accuracy_reward(texts, ["7"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("end", "opening"), [("[/THINK]", "[THINK]"), ("</seed:think>", "<seed:think>"), ("<|end_of_thought|>", "")]
)
def test_any_text_may_end_the_thinking(end, opening):
    reward = get_closed_thinking_accuracy_reward(end)
    assert reward.__name__ == closed_thinking_accuracy_reward.__name__ == "closed_thinking_accuracy_reward"
    texts = [
        f"{opening}Perhaps \\boxed{{12}}.{end}It is 7.",
        f"Perhaps \\boxed{{7}}.{end}It is 12.",
        f"a{end}b{end}7",
        "a</think>7",
    ]
    assert reward(texts, ["7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert closed_thinking_accuracy_reward(texts, ["7"] * 4) == [0.0, 0.0, 0.0, 1.0]


def test_responses_without_tags_are_closed_where_their_answer_is_found():
    texts = ["So \\boxed{5} and\n\n\\boxed{7}.", "It is 7.", "\\boxed{7}\n\nIs it 8?", "Perhaps 8.\n\nIt is 7.", ""]
    boxed, paragraph = (get_closed_thinking_accuracy_reward(answer=a) for a in ("last_boxed", "last_paragraph"))
    assert boxed(texts, ["7"] * 5) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert paragraph(texts, ["7"] * 5) == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert boxed(["\\boxed{2} and \\boxed{3}"], ["2, 3"]) == [1.0]


def test_settings_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match="end_of_thinking='' is empty"):
        get_closed_thinking_accuracy_reward("")
    with pytest.raises(ValueError, match="answer='boxed' is unknown; set it to one of tag, last_boxed"):
        get_closed_thinking_accuracy_reward(answer="boxed")
