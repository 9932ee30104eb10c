from attn_trainers.attnpo.rewards import closed_thinking_accuracy_reward


def test_only_responses_that_close_their_thinking_once_can_be_right():
    texts = [
        "Let me see.</think>The answer is \\boxed{7}.",
        "Let me see. \\boxed{7}",
        "a</think>b</think>\\boxed{7}",
        "<think>a</think>\\boxed{7}",
        "a</think>\\boxed{8}",
        "a \\boxed{7}</think>so it is.",
    ]
    expected = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    logged = {}
    assert closed_thinking_accuracy_reward(texts, ["7"] * 6, log_metric=logged.__setitem__) == expected
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert closed_thinking_accuracy_reward(messages, ["7"] * 6) == expected
    assert logged == {"grading/timeouts": 0.0, "grading/kills": 0.0}
