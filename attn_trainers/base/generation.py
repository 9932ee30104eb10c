"""Completions of arbitrary prefixes, each with a length limit of its own, through vLLM or transformers.

TRL's `VLLMGeneration.generate` builds one `SamplingParams` for all prompts. Branching needs one per request, since a
continuation may only use what its prefix left of the completion budget. `GenerationMixin` adds that to a
`GRPOTrainer`, and with it a weight sync that is right on GPU and CPU.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from trl.extras.profiling import profiling_context
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from ..sampling.requests import GeneratedTokens, GenerationRequest, Progress, without_progress
from ..sampling.transformers import generate_batch
from ..sampling.vllm import limit_cpu_cache, run_requests
from .adapter_sync import check_tied_ends, push_adapter, takes_adapter
from .cpu_reload import reload_packed_weights
from .engine import engine_settings
from .forwards import without_dropout
from .progress import ProgressMixin
from .server import PendingSamples, ServerGeneration, ServerSettings
from .sync_check import SyncReadings, engine_logps, probe_tokens, push_error


logger = logging.getLogger(__name__)


def sync_vllm_weights(vllm_generation: VLLMGeneration) -> None:
    """Push the trainer's weights to vLLM.

    On a GPU this is TRL's own sync, but for an engine that takes adapters; a server has its own (`ServerGeneration`).
    An engine on a CPU loads its layers anew.
    """
    on_cpu = vllm_generation.accelerator.device.type == "cpu"
    if takes_adapter(vllm_generation):
        push_adapter(vllm_generation)
    elif vllm_generation.mode == "colocate" and on_cpu:
        reload_packed_weights(vllm_generation.llm, vllm_generation._iter_named_params())
    else:
        vllm_generation.sync_weights()


def vllm_generate(
    vllm_generation: VLLMGeneration, requests: Sequence[GenerationRequest], progress: Progress = without_progress
) -> list[GeneratedTokens]:
    """Sample every request in one vLLM call. The engine must be awake; sampling settings are the trainer's.

    Under tensor parallelism all ranks of a group run the group's requests together, each keeps its own.
    """
    settings = {
        "n": 1,
        "repetition_penalty": vllm_generation.repetition_penalty,
        "temperature": vllm_generation.temperature,
        "top_p": vllm_generation.top_p,
        "top_k": vllm_generation.top_k,
        "min_p": vllm_generation.min_p or 0.0,
        "logprobs": vllm_generation.logprobs,
        "detokenize": bool(vllm_generation.generation_kwargs.get("stop")),  # stop strings are looked for in text
    } | vllm_generation.generation_kwargs
    first, all_requests = 0, list(requests)
    if vllm_generation.tensor_parallel_size > 1:
        gathered = [None] * vllm_generation.tensor_parallel_size
        torch.distributed.all_gather_object(gathered, list(requests), group=vllm_generation.tp_group)
        rank = torch.distributed.get_rank(group=vllm_generation.tp_group)
        first = sum(map(len, gathered[:rank]))
        all_requests = [request for part in gathered for request in part]
        if is_peft_model(vllm_generation.model):
            # As TRL does: what NCCL still cleans up after the small reduction of an adapter's gradients can race with
            # the engine's own collectives.
            torch.distributed.barrier(device_ids=[vllm_generation.accelerator.local_process_index])
    if not all_requests:
        return []
    on_cpu = vllm_generation.accelerator.device.type == "cpu"
    sampled = run_requests(vllm_generation.llm, all_requests, settings, on_cpu)
    finished = dict(progress(sampled, "Sampling", len(all_requests)))
    return [finished[index] for index in range(first, first + len(requests))]


def check_room(requests: Sequence[GenerationRequest]) -> None:
    """Refuse a request that leaves no room for a token."""
    for request in requests:
        if request.max_tokens < 1:
            raise ValueError(
                f"max_tokens={request.max_tokens} leaves nothing to generate; a request needs at least 1."
            )


class GenerationMixin(ProgressMixin):
    """Generation with per-request limits, for a `GRPOTrainer` subclass (named before it in the bases)."""

    def __init__(self, model, reward_funcs, args, *more, **kwargs):
        limit_cpu_cache()
        if not (args.use_vllm and args.vllm_mode == "server"):
            with engine_settings(self):
                super().__init__(model, reward_funcs, args, *more, **kwargs)
            if self.use_vllm:
                check_tied_ends(self.model)
            return
        # TRL would connect in its constructor, to which its client is fixed and which needs a CUDA device.
        args.use_vllm = False
        try:
            super().__init__(model, reward_funcs, args, *more, **kwargs)
        finally:
            args.use_vllm = True
        self.use_vllm = True
        check_tied_ends(self.model)
        self.vllm_generation = self._server_generation()
        self._last_loaded_step = -1

    def _server_generation(self) -> ServerGeneration:
        """What TRL's constructor would make, with the settings that it does not know."""
        args = self.args
        settings = ServerSettings(
            weight_sync=args.weight_sync_path(self.accelerator.device.type),
            lora_sync=args.lora_sync,
            folder=Path(args.weight_sync_dir or Path(args.output_dir) / "server_weights"),
            request_seconds=args.vllm_server_request_timeout,
            output_dir=args.output_dir,
            # A server with a smaller vocabulary refuses the last token of this one.
            probe=lambda: [*self._probe, self.model.config.get_text_config().vocab_size - 1],
            trainer_logps=self._sequence_logps,
            progress=self.progress,
        )
        return ServerGeneration(
            settings,
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
            logprobs=0,
            generation_kwargs=args.generation_kwargs,
        )

    def train(self, *args, **kwargs):
        # The step alone does not tell: a run that is taken up, or a second one, has other weights at the same step.
        self._last_loaded_step = -1
        return super().train(*args, **kwargs)

    def _sync_vllm_if_stale(self) -> None:
        """Push the weights if they changed since the last push, or if vLLM's sleep discarded them.

        Raises:
            ValueError: if the first push shows that vLLM then computes something else than the trainer.
        """
        engine = self.vllm_generation
        asleep = engine.mode == "colocate" and engine.enable_sleep_mode and engine._llm_weights_sleeping
        if asleep or self.state.global_step != self._last_loaded_step:
            checking = engine.mode == "colocate" and not self._sync_is_checked
            # A resumed trainer has other weights than those that the engine loaded at its start.
            as_loaded = self._probe_engine() if checking and not asleep and self.state.global_step == 0 else None
            try:
                with profiling_context(self, "sync_weights"):
                    sync_vllm_weights(engine)
            except (KeyError, RuntimeError) as error:  # a name or a shape that the engine does not know
                if not checking:
                    raise
                raise ValueError(push_error(self.model.config.architectures, error)) from error
            self._last_loaded_step = self.state.global_step
            if checking:
                self._check_sync(as_loaded)

    # Whether the first push was looked at.
    _sync_is_checked = False

    def _sequence_logps(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of each token of a sequence but the first, at temperature 1; one forward, on every rank.

        The forward is TRL's own: under ZeRO-3 all forwards of a model must go the same way through its modules.
        """
        ids = torch.tensor([list(tokens)], device=self.accelerator.device)  # (1, T)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), without_dropout(self.model), checkpointing, self._at_temperature_1():
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                self.model, ids, torch.ones_like(ids), ids.size(1) - 1, batch_size=1
            )
        return logps[0].float().tolist()

    @contextmanager
    def _at_temperature_1(self) -> Iterator[None]:
        """TRL's fused head divides by the temperature that it was made with: put another in its place for a while."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if is_peft_model(model) else model
        forward = model.forward
        add_fused_lm_head(model, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        try:
            yield
        finally:
            model.forward = forward

    @cached_property
    def _probe(self) -> list[int]:
        """The start of the training data, which an engine can take: it samples one token more."""
        tokens = probe_tokens((example["prompt"] for example in self.train_dataset), self._tokenizer)
        return tokens[: (self.args.vllm_max_model_length or len(tokens) + 1) - 1]

    def _probe_engine(self) -> torch.Tensor:
        """Log-probs (T - 1,) of the probe in vLLM."""
        engine = self.vllm_generation
        if engine.enable_sleep_mode:
            engine.llm.wake_up(tags=["kv_cache"])
        return engine_logps(engine.llm, self._probe)

    def _check_sync(self, as_loaded: torch.Tensor | None) -> None:
        """Compare vLLM with the trainer after the first push; all ranks end alike."""
        own = torch.tensor(self._sequence_logps(self._probe))  # (T - 1,)
        before = None if as_loaded is None else (as_loaded - own).abs().mean().item()
        readings = SyncReadings((self._probe_engine() - own).abs().mean().item(), before, own.std().item())
        if self.max_over_ranks(not readings.is_right):
            raise ValueError(readings.error(self.model.config.architectures))
        self._sync_is_checked = True

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self.use_vllm:
            self._sync_vllm_if_stale()  # the parent then finds the weights fresh
        return super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
        )

    @contextmanager
    def _vllm_awake(self) -> Iterator[VLLMGeneration]:
        """One wake/sleep bracket with current weights around everything generated in it; a server never sleeps."""
        engine = self.vllm_generation
        self._sync_vllm_if_stale()
        if engine.enable_sleep_mode:
            engine.llm.wake_up(tags=["kv_cache"])
        try:
            yield engine
        finally:
            if engine.enable_sleep_mode:
                engine.llm.sleep(level=2)
                engine._llm_weights_sleeping = True

    def generate_requests(self, requests: Sequence[GenerationRequest]) -> list[GeneratedTokens]:
        """Sample this rank's requests, in their order. Every rank must call it, also without a request.

        Raises:
            ValueError: if a request leaves no room for a token.
        """
        check_room(requests)
        if self.use_vllm:
            with self._vllm_awake() as engine, profiling_context(self, "vLLM.generate"):
                if engine.mode == "server":
                    return engine.collect(engine.submit(requests))
                return vllm_generate(engine, requests, self.progress)
        return self._transformers_generate(requests)

    def submit_requests(self, requests: Sequence[GenerationRequest]) -> PendingSamples:
        """Have a server sample this rank's requests with the weights of now, while the trainer goes on.

        Every rank must call it, and later `collect_requests`, before the weights change.
        """
        check_room(requests)
        self._sync_vllm_if_stale()
        return self.vllm_generation.submit(requests)

    def collect_requests(self, pending: PendingSamples) -> list[GeneratedTokens]:
        """The samples of `submit_requests`, in its order."""
        with profiling_context(self, "vLLM.generate"):
            return self.vllm_generation.collect(pending)

    def _transformers_generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedTokens]:
        """Sample with `model.generate`, in chunks of like prompt length, as many chunks on every rank."""
        chunk_size = self.args.per_device_train_batch_size * self.args.steps_per_generation
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        chunks = [order[start : start + chunk_size] for start in range(0, len(order), chunk_size)]
        num_chunks = self.max_over_ranks(len(chunks))
        results: list[GeneratedTokens | None] = [None] * len(requests)
        idle = GenerationRequest([self._tokenizer.eos_token_id], max_tokens=1)
        with self.progress(None, "Sampling", len(requests)) as bar:
            for chunk in chunks + [[]] * (num_chunks - len(chunks)):
                tokens = self._transformers_generate_chunk([requests[i] for i in chunk] or [idle])
                for i, token_ids in zip(chunk, tokens, strict=False):  # an idle chunk's token is nobody's
                    results[i] = GeneratedTokens(token_ids, None)
                bar.update(len(chunk))
        return results

    def _transformers_generate_chunk(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        with (
            profiling_context(self, "transformers.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            without_dropout(model),  # else samples would be of another policy than the one whose log-probs are read
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            return generate_batch(model, requests, self.generation_config, self.accelerator.device)

    def max_over_ranks(self, value: int) -> int:
        """Largest value on any rank; a collective."""
        return int(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max())
