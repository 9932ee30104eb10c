"""What is made for a vLLM engine, and read from it."""

import random
from types import SimpleNamespace

import pytest

from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.sampling.vllm import Admission, admission_of, run_requests, sampled_logps, sampling_params


def test_the_sampled_tokens_log_prob_is_found_by_its_id_not_its_rank():
    def entry(logprob, rank):
        return SimpleNamespace(logprob=logprob, rank=rank)

    output = SimpleNamespace(
        token_ids=[7, 3], logprobs=[{9: entry(-0.1, 1), 7: entry(-2.5, 4)}, {3: entry(-0.2, 1), 8: entry(-1.9, 2)}]
    )
    assert sampled_logps(output) == [-2.5, -0.2]


def engine_config(**cache):
    scheduler = SimpleNamespace(max_num_batched_tokens=100, max_num_seqs=10)
    return SimpleNamespace(scheduler_config=scheduler, cache_config=SimpleNamespace(**cache))


@pytest.mark.parametrize(("on_cpu", "seed", "bounded"), [(False, 1, False), (True, None, False), (True, 1, True)])
def test_only_seeded_requests_on_a_cpu_are_held_back(on_cpu, seed, bounded):
    config = engine_config(block_size=16, num_gpu_blocks=40)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    requests = [GenerationRequest([0], 5), GenerationRequest([0], 5, seed)]
    assert admission_of(llm, requests, on_cpu) == (Admission(90, 16, 30) if bounded else None)


@pytest.mark.parametrize(
    ("prompt", "waiting", "running", "allowed"),
    [
        (90, [], [5], True),
        (91, [], [5], False),  # longer than a step takes beside the running ones: alone ...
        (91, [], [], True),
        (1, [91], [], False),  # ... and nothing beside it until it is prefilled
        (40, [30, 20], [], True),
        (41, [30, 20], [], False),
        (15, [], [16] * 14, True),  # 14 x 2 blocks, one for the prompt and its first token: 29
        (16, [], [16] * 14, True),
        (32, [], [16] * 14, False),
    ],
)
def test_a_prompt_is_taken_where_it_is_prefilled_whole_and_the_cache_has_room(prompt, waiting, running, allowed):
    assert Admission(90, 16, 30).allows(prompt, waiting, running) is allowed


class FakeEngine:
    """Schedules as vLLM does: running requests first, then those that wait in their order, as far as tokens go."""

    def __init__(self, max_num_batched_tokens: int, max_num_seqs: int):
        self.vllm_config = engine_config(block_size=16, num_gpu_blocks=10**6)
        self.vllm_config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
        self.vllm_config.scheduler_config.max_num_seqs = max_num_seqs
        self.waiting, self.running, self.most_running, self.steps = [], [], 0, 0

    def add_request(self, name, prompt, params, lora_request):
        assert lora_request is None
        state = {"name": name, "prompt": prompt["prompt_token_ids"], "left": params.max_tokens, "seed": params.seed}
        self.waiting.append(state)

    def step(self):
        scheduler = self.vllm_config.scheduler_config
        room = scheduler.max_num_batched_tokens - len(self.running)
        while self.waiting and len(self.running) < scheduler.max_num_seqs and room > 0:
            length = len(self.waiting[0]["prompt"])
            assert length <= room, "a prompt is split"
            room -= length
            self.running.append(self.waiting.pop(0))
        self.most_running, self.steps = max(self.most_running, len(self.running)), self.steps + 1
        outputs = []
        for state in self.running:
            state["left"] -= 1
            sample = SimpleNamespace(token_ids=[state["seed"] + state["left"]], logprobs=None)
            name = f"{state['name']}-suffix"
            outputs.append(SimpleNamespace(request_id=name, outputs=[sample], finished=state["left"] == 0))
        self.running = [state for state in self.running if state["left"]]
        return outputs


def test_requests_are_taken_as_room_comes_and_no_prompt_is_split():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    draw = random.Random(0)
    requests = [GenerationRequest([0] * draw.randint(1, 95), draw.randint(1, 60), 1000 * i) for i in range(60)]
    engine = FakeEngine(max_num_batched_tokens=100, max_num_seqs=10)
    finished = list(run_requests(SimpleNamespace(llm_engine=engine), requests, {}, on_cpu=True))
    order = [index for index, _ in finished]
    assert sorted(order) == list(range(60)) and order != sorted(order)
    for index, sample in finished:
        request = requests[index]
        assert sample.token_ids == [request.seed + left for left in reversed(range(request.max_tokens))]
        assert sample.logps is None
    assert engine.most_running == 10
    # Groups of as many prompts as a step takes would wait for the longest answer of each.
    groups, used = [[]], 0
    for request in requests:
        used += len(request.prompt_ids)
        if used > 90 and groups[-1]:
            groups.append([])
            used = len(request.prompt_ids)
        groups[-1].append(request.max_tokens)
    assert engine.steps < sum(map(max, groups)) / 2


def test_limit_and_seed_are_the_requests_own():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = {"temperature": 0.5, "max_tokens": 99, "seed": 3}
    params = sampling_params(settings, GenerationRequest([1], max_tokens=7, seed=11))
    assert (params.temperature, params.max_tokens, params.seed) == (0.5, 7, 11)
    assert sampling_params(settings, GenerationRequest([1], max_tokens=7)).seed is None
    assert settings == {"temperature": 0.5, "max_tokens": 99, "seed": 3}
