"""Sampling from a vLLM server in training: weights pushed to it, and never a sample of others.

Each push gives the weights a version of their own, which the server keeps. Before requests are sent and after the last
answer came, version and the log-probs of a probe are compared with those after the push; where they
differ, the weights are pushed again and the samples drawn again. What this sees: a server that was restarted, or that
someone else pushed to, with a version or with other weights. What it does not: weights that were changed and changed
back between the two looks, by someone who sets no version; and one of several data-parallel engines that differs.
"""

import logging
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from torch import Tensor
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from ..sampling.requests import GeneratedTokens, GenerationRequest, Progress, without_progress
from ..sampling.server import Sampling, ServerError, ServerFault, TokenGate, VLLMServer
from .adapter_sync import adapter_hindrance, adapter_weights, save_adapter
from .interruption import last_whole_checkpoint
from .weight_files import remove_weights, write_weights, write_whole


logger = logging.getLogger(__name__)

# How often weights are pushed and samples drawn again after a fault, before the run gives up.
ATTEMPTS = 3


@dataclass(frozen=True)
class ServerSettings:
    """What a trainer says of its server, beside TRL's own arguments.

    Attributes:
        weight_sync: "nccl" or "disk".
        lora_sync: "auto", "adapter" or "merged".
        folder: where weights are written for the server ("disk").
        request_seconds: how long one request may take.
        output_dir: of the run, whose last checkpoint an error names.
        probe: gives the sequence by whose log-probs weights are told apart.
        trainer_logps: log-probs of each token of a sequence but the first, under the trainer's weights; a collective.
        progress: shows how many samples the first rank has got.
    """

    weight_sync: str
    lora_sync: str
    folder: Path
    request_seconds: float
    output_dir: str
    probe: Callable[[], list[int]]
    trainer_logps: Callable[[Sequence[int]], list[float]]
    progress: Progress = without_progress


class AuthorizedClient(VLLMClient):
    """TRL's client, which moves weights by NCCL, with the API key."""

    def __init__(self, server: VLLMServer, group_port: int):
        self._server = server
        super().__init__(base_url=server.url, group_port=group_port)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0):
        self.session.headers.update(self._server.session.headers)
        self._server.wait()


def largest_difference(logps: Sequence[float], others: Sequence[float]) -> float:
    """Of log-probs of the same tokens; not a number where one of them is none."""
    return torch.tensor(logps).sub(torch.tensor(others)).abs().max().item()


class PendingSamples:
    """Samples that are being drawn while the trainer goes on.

    Args:
        requests: of all ranks; those of rank r follow those of the ranks before.
        own: which of them are this rank's.
    """

    def __init__(self, requests: Sequence[GenerationRequest], own: slice):
        self.requests, self.own = requests, own
        self.version: str | None = None  # of the weights they were sent for
        self.sampling: Sampling | None = None  # on the first rank

    @property
    def seconds(self) -> float:
        """From the first request to the last answer; on the first rank, after the samples were collected."""
        return self.sampling.seconds if self.sampling is not None else math.nan


class ServerGeneration(VLLMGeneration):
    """
    TRL's `VLLMGeneration` in server mode, with limits and seeds per request, and faults that it gets over.

    Every method but the properties is a collective: all ranks call it.

    Args:
        settings: see `ServerSettings`.
        kwargs: as for `VLLMGeneration`.
    """

    def __init__(self, settings: ServerSettings, **kwargs):
        self.settings = settings
        self.server: VLLMServer | None = None  # on the first rank
        self.vllm_client: VLLMClient | None = None  # on the first rank, where weights go by NCCL
        self.version: str | None = None  # of the weights that the server holds; None: to be pushed
        self.pushes = 0
        self._probed: list[float] = []
        self.by_adapter: bool | None = None  # how a LoRA travels; None before the first connection
        self._base_probed: list[float] | None = None  # without the adapter
        self._is_checked = self._has_warned = False
        super().__init__(mode="server", **kwargs)

    def _init_vllm(self) -> None:
        with self._telling():
            self.by_adapter = self._on_first(self._connect)
        self._run = self._on_first(lambda: uuid.uuid4().hex[:12])  # no other run pushes a version of this name
        self.accelerator.wait_for_everyone()

    # ---- the server -------------------------------------------------------------------------------------------------

    def _connect(self) -> bool:
        """Find the server, and what of it matters here; whether a LoRA goes to it as an adapter."""
        if self.server is None:
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            self.server = VLLMServer(url, self.server_timeout, self.settings.request_seconds)
        config = self.server.connect()
        self.server.weight_version()
        self._length = config["model_config"]["max_model_len"]
        if self.max_completion_length >= self._length:
            raise ServerError(
                f"the vLLM server at {self.server.url} has --max-model-len {self._length}, which leaves no room for a "
                f"prompt beside max_completion_length={self.max_completion_length}; start it with a greater one, or "
                "lower max_completion_length."
            )
        self._dtype = getattr(torch, config["model_config"]["dtype"].removeprefix("torch."))
        self._is_on_cpu = config["device_config"]["device"] == "cpu"
        scheduler = config["scheduler_config"]
        if self._is_on_cpu and self.server.gate.is_open:
            # See attn_trainers.sampling.vllm.engine_calls: seeds and prompts in chunks do not go together on a CPU.
            self.server.gate = TokenGate(scheduler["max_num_batched_tokens"] - scheduler["max_num_seqs"])
        mode = config["model_config"].get("logprobs_mode")
        if mode != "processed_logprobs":
            logger.warning(
                "The vLLM server at %s has --logprobs-mode %s; it must be processed_logprobs.", self.server.url, mode
            )
        by_adapter = self._takes_adapter()
        if self.settings.weight_sync == "nccl":
            self._open_communicator(config)
        return by_adapter

    def _takes_adapter(self) -> bool:
        """Whether the model's LoRA goes to the server as an adapter; what was begun so goes on so.

        Raises:
            ServerError: if it must and cannot.
        """
        lora_sync = self.settings.lora_sync
        if lora_sync == "merged" or self.by_adapter is False:
            return False
        hindrance = adapter_hindrance(self.model, None, self.accelerator.distributed_type == "FSDP")
        if hindrance is None and self.settings.weight_sync == "nccl":
            hindrance = "an adapter is read from a folder: set weight_sync='disk'"
        if hindrance is None:
            hindrance = self.server.adapter_hindrance(self.model.peft_config[self.model.active_adapters[0]].r)
        if hindrance is not None and (lora_sync == "adapter" or self.by_adapter):
            raise ServerError(
                f"lora_sync={lora_sync!r} cannot send an adapter ({hindrance}); else set it to 'merged'."
            )
        if is_peft_model(self.model):
            how = "as an adapter" if hindrance is None else f"merged into the weights: {hindrance}"
            logger.info("LoRA goes to the vLLM server %s.", how)
        return hindrance is None

    def _open_communicator(self, config: dict) -> None:
        """Join the server's workers by NCCL, anew after a restart."""
        if config["weight_transfer_config"] is None:
            raise ServerError(
                f"the vLLM server at {self.server.url} takes no weights by NCCL; start it with "
                "--weight-transfer-config "
                """'{"backend": "nccl"}', or set weight_sync='disk'."""
            )
        if self.vllm_client is not None:
            self.vllm_client.close_communicator()
        self.vllm_client = AuthorizedClient(self.server, self.group_port)
        self.vllm_client.init_communicator(device=self.accelerator.device)

    # ---- ranks in step ----------------------------------------------------------------------------------------------

    def _on_first(self, act: Callable[[], Any]) -> Any:
        """What the first rank's `act` gives, or raises, on all ranks."""
        outcome = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [(act(), None)]
            except ServerError as error:
                outcome = [(None, error)]
            except Exception as error:
                broadcast_object_list([(None, ServerError(f"the first rank failed: {error!r}"))], from_process=0)
                raise
        broadcast_object_list(outcome, from_process=0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def _persist(self, act: Callable[[], Any]) -> Any:
        """Repeat what a fault ended, once the server answers again."""
        with self._telling():
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return act()
                except ServerFault as fault:
                    self.version = None
                    if attempt == ATTEMPTS:
                        raise ServerError(f"{fault} That was attempt {attempt} of {ATTEMPTS}.") from fault
                    if self.accelerator.is_main_process:
                        logger.warning("%s The weights are pushed again once it answers.", fault)
                    self.by_adapter = self._on_first(self._connect)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say in an error how the run goes on."""
        try:
            yield
        except ServerError as error:
            checkpoint = last_whole_checkpoint(self.settings.output_dir)
            way_on = (
                f"The last whole checkpoint is {checkpoint}: the same command goes on from it."
                if checkpoint
                else "No checkpoint was saved yet."
            )
            raise ServerError(f"{error} {way_on}") from error

    # ---- weights ----------------------------------------------------------------------------------------------------

    def sync_weights(self) -> None:
        """Push the trainer's weights, and have the server name them."""
        self.version = None
        self._persist(self._push)

    def _push(self) -> None:
        self.pushes += 1
        version = f"{self._run}-{self.pushes}"
        self._on_first(lambda: self.server.set_weight_version(f"{version}-incomplete"))
        if self.by_adapter:
            self._push_adapter(version)
        elif self.settings.weight_sync == "nccl":
            super().sync_weights()
        else:
            self._push_by_disk(version)
        self._on_first(lambda: self._seal(version))
        if not self._is_checked:
            self._check_against_trainer()
        self.version = version

    def _push_by_disk(self, version: str) -> None:
        """Whole weights, through a folder that trainer and server see."""
        first = self.accelerator.is_main_process
        dtype = self._dtype if first else torch.float32
        written = write_weights(self.settings.folder, version, self._weights_for_files(), dtype, writes=first)
        self._on_first(lambda: self._have_read(*written, self.server.reload_weights))

    def _push_adapter(self, version: str) -> None:
        """The adapter alone, through the same folder; its version is its name."""
        weights = adapter_weights(self)

        def push() -> None:
            written = write_whole(self.settings.folder, version, partial(save_adapter, self.model, weights))
            self._have_read(*written, partial(self.server.load_adapter, version))

        self._on_first(push)

    def _have_read(self, path: Path, problem: Exception | None, read: Callable[[str], None]) -> None:
        """Have the server read what was written for it, of which nothing is left then."""
        folder = self.settings.folder
        if problem is not None:
            raise ServerError(
                f"weight_sync_dir={folder}: the weights could not be written ({problem}); make room there."
            )
        try:
            read(str(path.resolve()))
        finally:
            remove_weights(folder)

    def _weights_for_files(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by vLLM's names, with a tied output head of its own where vLLM packs a copy of it."""
        tied = getattr(self.model.config, "tie_word_embeddings", False) and getattr(self, "_is_on_cpu", False)
        for name, tensor in self._iter_named_params():
            yield name, tensor
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor

    def _seal(self, version: str) -> None:
        self.server.reset_prefix_cache()
        self._probed = self.server.logps(self.settings.probe())
        if self.by_adapter:
            self._check_base()
        self.server.set_weight_version(version)

    def _check_base(self) -> None:
        """That what the adapter is laid on is what it was at the first push.

        Raises:
            ServerError: if not: pushes of the adapter would not bring it back.
        """
        probed = self.server.logps(self.settings.probe(), of_base=True)
        self._base_probed = self._base_probed or probed
        apart = largest_difference(probed, self._base_probed)
        if not apart <= self._rounding:
            raise ServerError(
                f"the vLLM server at {self.server.url} has another base model than before (log-probs are off by "
                f"{apart:.2g}), and with lora_sync={self.settings.lora_sync!r} only the adapter is pushed; start it "
                "anew with the model that is trained, and let nobody else push weights to it."
            )

    def _difference(self) -> str | None:
        """How the server's weights differ from those of the latest push; `None` where they do not."""
        version = self.server.weight_version()
        if version != self.version:
            return f"it has weights of version {version!r} in place of {self.version!r}"
        apart = largest_difference(self.server.logps(self.settings.probe()), self._probed)
        if not apart <= self._rounding:
            return f"its log-probs are off by {apart:.2g} from those after the push"
        return None

    @property
    def _rounding(self) -> float:
        """How far apart log-probs may be for the dtype's rounding alone: 16 units in the last place of 1."""
        return max(1e-3, 16 * torch.finfo(self._dtype).eps)

    @property
    def _trainer_eps(self) -> float:
        """Rounding of the trainer's own forward."""
        computed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        dtypes = [next(self.model.parameters()).dtype, computed or torch.float32]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _check_against_trainer(self) -> None:
        """Compare the server's log-probs with the trainer's, once, after the first push.

        Raises:
            ServerError: if they differ: another model, or weights that did not arrive.
        """
        expected = self.settings.trainer_logps(self.settings.probe())

        def compare() -> None:
            apart = [abs(a - b) for a, b in zip(expected, self._probed, strict=True)]
            mean = math.fsum(apart) / len(apart)
            if not mean <= 4 * max(self._rounding, 16 * self._trainer_eps):
                raise ServerError(
                    f"the vLLM server at {self.server.url} gives log-probs that are off by {mean:.2g} from the "
                    "trainer's after equal weights were pushed: it serves another model or vocabulary, or cannot take "
                    "all of its weights; start it with the model that is trained."
                )

        self._on_first(compare)
        self._is_checked = True

    # ---- samples ----------------------------------------------------------------------------------------------------

    @property
    def _sampling(self) -> dict[str, object]:
        settings = {
            "repetition_penalty": self.repetition_penalty,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "logprobs": self.logprobs,
        }
        if self.structured_outputs_regex is not None:
            settings["structured_outputs"] = {"regex": self.structured_outputs_regex}
        return settings | self.generation_kwargs

    def submit(self, requests: Sequence[GenerationRequest]) -> PendingSamples:
        """Send the requests of all ranks; the server holds the trainer's weights as they were pushed last."""
        sizes = gather_object([len(requests)])
        first = sum(sizes[: self.accelerator.process_index])
        pending = PendingSamples(gather_object(list(requests)), slice(first, first + len(requests)))
        self._persist(lambda: self._send(pending))
        return pending

    def _send(self, pending: PendingSamples) -> None:
        if not pending.requests:
            return
        if self.version is not None:
            difference = self._on_first(self._difference)
            if difference is not None:
                if self.accelerator.is_main_process:
                    logger.warning(
                        "The vLLM server at %s is not as left: %s. It is pushed again.", self.server.url, difference
                    )
                self.version = None
        if self.version is None:
            self._push()
        pending.version = self.version

        def send() -> None:
            self._warn_of_cuts(pending.requests)
            pending.sampling = self.server.submit(pending.requests, self._sampling, pending.version)

        self._on_first(send)

    def _warn_of_cuts(self, requests: Sequence[GenerationRequest]) -> None:
        """Tell once of samples that the server ends before their limit, which it does in silence."""
        longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        if longest > self._length and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"The vLLM server at {self.server.url} has --max-model-len {self._length}, and ends completions there "
                f"that may be longer; start it with at least {longest}."
            )

    def collect(self, pending: PendingSamples) -> list[GeneratedTokens]:
        """Wait for this rank's samples; until then the trainer's weights must stay as when they were sent."""
        return self._persist(lambda: self._receive(pending))[pending.own]

    def _receive(self, pending: PendingSamples) -> list[GeneratedTokens]:
        if not pending.requests:
            return []
        if pending.version != self.version or self.version is None:  # what was sent is lost, or not to be trusted
            self._send(pending)

        def wait() -> list[GeneratedTokens]:
            samples = pending.sampling.wait(self.settings.progress)
            difference = self._difference()
            if difference is not None:
                raise ServerFault(f"the vLLM server at {self.server.url} changed while it sampled: {difference}.")
            return samples

        return self._on_first(wait)

    def generate(self, prompts, images, num_generations, profiler=None):
        """TRL's own call, as its trainer makes it: samples of equal prompts are drawn together."""
        limit = self.generation_kwargs.get("max_tokens", self.max_completion_length)
        requests = [GenerationRequest(list(ids), limit) for ids in prompts]
        with profiler or nullcontext():
            samples = self.collect(self.submit(requests))
        logps = [[[None if math.isnan(logp) else logp] for logp in sample.logps] for sample in samples]
        return prompts, [s.token_ids for s in samples], logps, [[[token] for token in s.token_ids] for s in samples]
