"""A vLLM server as its clients see it: samples, weights and the version of those, over HTTP and JSON.

vLLM's server keeps a version of its weights that whoever pushes them sets, and that a restart forgets
(`/weight_info`, `/update_weight_version`; vLLM 0.31 with `VLLM_SERVER_DEV_MODE=1`). Those who push without setting it
are seen by a probe: the log-probs of a fixed sequence, which hang on all weights. An adapter has its version for its
name: each request asks for it by that, and each answer repeats it.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from functools import partial

import requests
from requests.adapters import HTTPAdapter

from .requests import GeneratedTokens, GenerationRequest, Progress, without_progress


CONNECTIONS = 64
# Tries of one request, and seconds before the second; each later pause is twice the one before.
TRIES, PAUSE = 3, 0.5
CONTROL_SECONDS = 30.0  # for a request that computes next to nothing
HEALTH_SECONDS = 5.0

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that a vLLM engine can be set to

_LOADS_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_SAYS_SO_IN_WORDS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # and not in JSON
_DEVELOPMENT = "start it with VLLM_SERVER_DEV_MODE=1 in its environment (vLLM 0.31 or later)"


class ServerError(RuntimeError):
    """The server cannot be used as it is; the message names its URL."""


class ServerFault(ServerError):
    """What may pass: the server is away, or failed at a request."""


class NotThere(ServerError):
    """The server does not know what it was asked for."""


def group_requests(batch: Sequence[GenerationRequest]) -> list[list[int]]:
    """Indices of the requests of each POST: those with a seed alone, others of equal prompt and limit together."""
    groups: dict[object, list[int]] = {}
    for index, request in enumerate(batch):
        key = (tuple(request.prompt_ids), request.max_tokens) if request.seed is None else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def engine_rank(rank: int) -> int:
    """Least rank that an engine can be set to and that has room for an adapter of a rank."""
    return next(size for size in ADAPTER_RANKS if size >= rank)


class TokenGate:
    """Lets requests through while their prompts hold no more tokens than `room` together; `None` lets all through."""

    def __init__(self, room: int | None):
        self.is_open = room is None
        self._room, self._used = room, 0
        self._changed = threading.Condition()

    @contextmanager
    def passed(self, tokens: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._room is None or not self._used or self._used + tokens <= self._room)
            self._used += tokens
        try:
            yield
        finally:
            with self._changed:
                self._used -= tokens
                self._changed.notify_all()


class Workers:
    """Up to `count` threads that end with the process, which must not wait for a server that hangs."""

    def __init__(self, count: int):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable]] = queue.SimpleQueue()
        self._missing = count  # threads to start as tasks come: on a busy machine each start waits

    def submit(self, act: Callable[[], object]) -> Future:
        future = Future()
        self._tasks.put((future, act))
        if self._missing:
            self._missing -= 1
            threading.Thread(target=self._work, name="vllm-server", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, act = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)


class VLLMServer:
    """
    Client of one vLLM server. Nothing that comes from it is run or unpickled: it is read as JSON and checked.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        start_seconds: how long `wait` waits for the server to answer.
        request_seconds: how long one sampling request or one reload of weights may take.
        api_key: sent as bearer token; by default `VLLM_API_KEY` of the environment.
    """

    def __init__(self, url: str, start_seconds: float, request_seconds: float, api_key: str | None = None):
        self.url = url.rstrip("/")
        self.start_seconds, self.request_seconds = start_seconds, request_seconds
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy of the environment is not meant for it, nor is a .netrc
        self.session.mount("http://", HTTPAdapter(pool_maxsize=CONNECTIONS))
        self.session.mount("https://", HTTPAdapter(pool_maxsize=CONNECTIONS))
        api_key = api_key or os.environ.get("VLLM_API_KEY")
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"
        self.model: str | None = None
        self.adapter: str | None = None  # that is sampled with
        self._info: dict = {}
        self.gate = TokenGate(None)
        self._workers: Workers | None = None

    # ---- plumbing ---------------------------------------------------------------------------------------------------

    def _once(self, method: str, path: str, seconds: float, body: object, params: Mapping | None) -> dict:
        try:
            answer = self.session.request(
                method, self.url + path, json=body, params=params, timeout=(CONTROL_SECONDS, seconds)
            )
        except requests.Timeout as error:
            raise ServerFault(f"the vLLM server at {self.url} did not answer {path} within {seconds:g} s.") from error
        except requests.RequestException as error:
            raise ServerFault(f"the vLLM server at {self.url} is away ({path}: {type(error).__name__}).") from error
        if answer.status_code >= 500:
            raise ServerFault(
                f"the vLLM server at {self.url} answered {answer.status_code} to {path}: {answer.text[:300]}"
            )
        if answer.status_code in (401, 403):
            raise ServerError(
                f"the vLLM server at {self.url} refused {path} ({answer.status_code}); set VLLM_API_KEY to its "
                "--api-key."
            )
        if answer.status_code != 200:
            kind = NotThere if answer.status_code == 404 else ServerError
            raise kind(f"the vLLM server at {self.url} answered {answer.status_code} to {path}: {answer.text[:300]}")
        if path in _SAYS_SO_IN_WORDS:
            return {}
        try:
            return answer.json() if answer.content else {}
        except ValueError as error:
            raise ServerFault(f"the vLLM server at {self.url} answered {path} with no JSON.") from error

    def _call(
        self, method: str, path: str, seconds=CONTROL_SECONDS, body=None, params=None, tries: int = TRIES
    ) -> dict:
        for pause in [PAUSE * 2**i for i in range(tries - 1)]:
            try:
                return self._once(method, path, seconds, body, params)
            except ServerFault:
                time.sleep(pause)
        return self._once(method, path, seconds, body, params)

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: if it does not within `start_seconds`.
        """
        deadline = time.monotonic() + self.start_seconds
        pause = PAUSE
        while True:
            try:
                self._once("GET", "/health", HEALTH_SECONDS, None, None)
                return
            except ServerFault as fault:
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"the vLLM server at {self.url} did not answer for vllm_server_timeout={self.start_seconds:g} "
                        f"s ({fault}) Start it, or correct vllm_server_base_url."
                    ) from fault
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    # ---- what it serves ---------------------------------------------------------------------------------------------

    def connect(self) -> dict:
        """Wait for the server and learn its model's name; returns its configuration (`vllm_config`)."""
        self.wait()
        models = self._call("GET", "/v1/models").get("data") or []
        if not models:
            raise ServerError(f"the vLLM server at {self.url} serves no model.")
        self.model = models[0]["id"]
        # The first time it looks at its whole environment.
        params = {"config_format": "json"}
        self._info = self._development("GET", "/server_info", seconds=4 * CONTROL_SECONDS, params=params)
        return self._info["vllm_config"]

    def adapter_hindrance(self, rank: int) -> str | None:
        """Why the server takes no adapter of a rank, and how it would; `None` if it does. After `connect`."""
        lora = self._info["vllm_config"].get("lora_config")
        if lora is None or not self._info.get("vllm_env", {}).get(_LOADS_ADAPTERS):
            return (
                f"the vLLM server at {self.url} takes no adapters: start it with --enable-lora --max-lora-rank "
                f"{engine_rank(rank)} and {_LOADS_ADAPTERS}=1 in its environment"
            )
        if lora["max_lora_rank"] < rank:
            return (
                f"the vLLM server at {self.url} takes adapters up to rank {lora['max_lora_rank']}: start it with "
                f"--max-lora-rank {engine_rank(rank)}"
            )
        if lora.get("target_modules"):
            return f"the vLLM server at {self.url} leaves out parts of it: start it without --lora-target-modules"
        return None

    def _development(self, method: str, path: str, **kwargs) -> dict:
        try:
            return self._call(method, path, **kwargs)
        except NotThere as error:
            raise ServerError(f"the vLLM server at {self.url} has no {path}; {_DEVELOPMENT}.") from error

    # ---- weights ----------------------------------------------------------------------------------------------------

    def weight_version(self) -> str:
        """Version that was set last, `default` after a start."""
        return str(self._development("GET", "/weight_info")["weight_version"])

    def set_weight_version(self, version: str) -> None:
        self._development("POST", "/update_weight_version", body={"new_version": version})

    def reload_weights(self, folder: str) -> None:
        """Load the safetensors files of a folder that the server sees."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._development("POST", "/collective_rpc", seconds=self.request_seconds, body=body, tries=1)

    def load_adapter(self, name: str, folder: str) -> None:
        """Sample with an adapter of a folder that the server sees, in place of the one before.

        The one before goes first, with what is still sampled with it: vLLM would look for its files again.

        Args:
            name: new to the server.
            folder: has the files as PEFT writes them.
        """
        former, self.adapter = self.adapter, name
        if former is not None:
            with suppress(NotThere):  # a server that was restarted
                self._call("POST", "/v1/unload_lora_adapter", body={"lora_name": former})
        self._development("POST", "/abort_requests", body={})
        body = {"lora_name": name, "lora_path": folder}
        try:
            self._call("POST", "/v1/load_lora_adapter", seconds=self.request_seconds, body=body, tries=1)
        except NotThere as error:
            raise ServerError(f"the vLLM server at {self.url} does not see the folder {folder}.") from error

    def reset_prefix_cache(self) -> None:
        """Drop what was computed with other weights.

        Raises:
            ServerFault: if the server still holds some, for a request that it works on.
        """
        for pause in [PAUSE * 2**i for i in range(TRIES)]:
            params = {"reset_running_requests": "true"}  # whose samples nobody trusts
            if self._development("POST", "/reset_prefix_cache", params=params).get("success", True):
                return
            time.sleep(pause)
        raise ServerFault(
            f"the vLLM server at {self.url} could not drop its prefix cache: someone else samples there."
        )

    def logps(self, tokens: Sequence[int], of_base: bool = False) -> list[float]:
        """Log-probs of each token of a sequence but the first, under the server's weights, without temperature.

        Args:
            tokens: (T,).
            of_base: whether the adapter is left out.
        """
        body = {"prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        choice = self._complete(body, None if of_base else self.adapter)["choices"][0]
        listed = choice["prompt_logprobs"][1:]
        return [_number(one.get(str(token), {}).get("logprob")) for one, token in zip(listed, tokens[1:], strict=True)]

    def _complete(self, body: Mapping, adapter: str | None) -> dict:
        """The answer to a completion request, by the adapter that was asked for or none."""
        model = adapter or self.model
        body = {"model": model, **body}
        try:
            answer = self._call("POST", "/v1/completions", seconds=self.request_seconds, body=body)
        except NotThere as error:
            if adapter is None:
                raise
            raise ServerFault(f"the vLLM server at {self.url} has lost the adapter {adapter}.") from error
        if adapter is not None and answer.get("model") != adapter:
            raise ServerFault(f"the vLLM server at {self.url} sampled with {answer.get('model')!r}, not {adapter!r}.")
        return answer

    # ---- samples ----------------------------------------------------------------------------------------------------

    def submit(
        self, batch: Sequence[GenerationRequest], settings: Mapping[str, object], version: str | None
    ) -> "Sampling":
        """Send requests, 64 at a time.

        Args:
            batch: what is to be sampled.
            settings: fields of the request body that all share.
            version: of the weights, which the samples are to carry.
        """
        if self._workers is None:
            self._workers = Workers(CONNECTIONS)
        groups = group_requests(batch)
        futures = [
            self._workers.submit(partial(self._sample, [batch[i] for i in group], settings, version, self.adapter))
            for group in groups
        ]
        return Sampling(groups, futures)

    def _sample(
        self, group: Sequence[GenerationRequest], settings: Mapping, version: str | None, adapter: str | None
    ) -> list[GeneratedTokens]:
        first = group[0]
        body = {
            "prompt": first.prompt_ids,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **settings,
            "n": len(group),
            "max_tokens": first.max_tokens,
        }
        if first.seed is not None:
            body["seed"] = first.seed
        with self.gate.passed(0 if first.seed is None else len(first.prompt_ids)):
            answer = self._complete(body, adapter)
        choices = sorted(answer.get("choices") or [], key=lambda choice: choice["index"])
        if len(choices) != len(group):
            raise ServerFault(f"the vLLM server at {self.url} gave {len(choices)} of {len(group)} samples.")
        return [self._parse(choice, first, version) for choice in choices]

    def _parse(self, choice: Mapping, request: GenerationRequest, version: str | None) -> GeneratedTokens:
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ServerFault(f"the vLLM server at {self.url} ended a sample by {choice.get('finish_reason')!r}.")
        tokens, echoed = choice.get("token_ids"), choice.get("prompt_token_ids")
        if tokens is None or echoed != request.prompt_ids or len(tokens) > request.max_tokens:
            raise ServerError(f"the vLLM server at {self.url} sampled something else than it was asked for.")
        logprobs = choice.get("logprobs")
        if logprobs is None:
            return GeneratedTokens(tokens, None, version)
        if logprobs["tokens"] != [f"token_id:{token}" for token in tokens]:
            raise ServerError(f"the vLLM server at {self.url} gave log-probs of other tokens than it sampled.")
        return GeneratedTokens(tokens, [_number(logp) for logp in logprobs["token_logprobs"]], version)


def _number(logp: float | None) -> float:
    return math.nan if logp is None else float(logp)


class Sampling:
    """Samples on their way.

    Args:
        groups: indices of the requests of each POST.
        futures: of each POST, the samples of its group.
    """

    def __init__(self, groups: Sequence[Sequence[int]], futures: Sequence[Future]):
        self._groups, self._futures = groups, futures
        self._start = self._end = time.monotonic()
        for future in futures:
            future.add_done_callback(self._note)

    def _note(self, _: Future) -> None:
        self._end = time.monotonic()

    @property
    def seconds(self) -> float:
        """From the first request to the latest answer."""
        return self._end - self._start

    def wait(self, progress: Progress = without_progress) -> list[GeneratedTokens]:
        """The samples, in the order of the requests.

        Raises:
            ServerError: if one of them failed; the others are not waited for.
        """
        try:
            results = dict(progress(self._arriving(), "Sampling", sum(map(len, self._groups))))
        except ServerError:
            for future in self._futures:
                future.cancel()
            raise
        return [results[index] for index in range(len(results))]

    def _arriving(self) -> Iterator[tuple[int, GeneratedTokens]]:
        group_of = dict(zip(self._futures, self._groups, strict=True))
        for future in as_completed(group_of):
            yield from zip(group_of[future], future.result(), strict=True)
