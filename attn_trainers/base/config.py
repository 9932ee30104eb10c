"""What the settings of all methods share: how values are checked, and what goes with advantages per token."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy
from trl import GRPOConfig

from .checkpoints import check_save_interval, steps_between_generations
from .options import check_choices, check_least
from .report import Report


# Losses that take advantages of shape (B, T).
PER_TOKEN_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo")


# How a LoRA goes to vLLM.
LORA_SYNCS = ("auto", "adapter", "merged")
# In what a colocated engine computes.
VLLM_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class MethodConfig(GRPOConfig):
    """
    Base of the methods' settings: [`~trl.GRPOConfig`] with the checks that all of them need.

    Parameters:
        end_of_thinking (`str`, *optional*, defaults to `"</think>"`):
            Text that ends the thinking part.
        accuracy_reward (`str`, *optional*):
            Name of the reward function that says whether a response is correct. Default: the first.
        lora_sync (`str`, *optional*, defaults to `"auto"`):
            How a LoRA goes to vLLM: by itself (`"adapter"`), merged into the whole weights (`"merged"`), or as an
            adapter where vLLM takes it (`"auto"`).
        vllm_dtype (`str`, *optional*, defaults to `"auto"`):
            In what a colocated engine computes: `"float32"`, `"bfloat16"`, `"float16"` or `"auto"`. That is vLLM's
            choice on a GPU (bfloat16 for float32 weights), and on a CPU what the trainer computes in (float32 where
            the CPU has no instructions for it).

        > Parameters that control reports

        log_line (`bool`, *optional*, defaults to `True`):
            Whether each log prints one line (reward, length, what the method watches) in place of all metrics. What
            goes to the log and the trackers is the same.
        log_pages (`bool`, *optional*, defaults to `False`):
            Whether each log has a page of one completion that shows where credit went, in `output_dir/pages` and in
            trackio, wandb and TensorBoard, those that `report_to` names.
        push_revisions (`bool`, *optional*, defaults to `False`):
            Whether each checkpoint is pushed to a branch of its own, `step-N`, of the model's repository. Needs
            `push_to_hub`. What goes to the main branch is `hub_strategy`'s.

        > Parameters that control a vLLM server (`vllm_mode="server"`)

        weight_sync (`str`, *optional*, defaults to `"auto"`):
            How weights reach the server: `"nccl"` (TRL's path, on GPUs), `"disk"` (files in a folder that both see),
            or `"auto"`: NCCL on a GPU, files elsewhere.
        weight_sync_dir (`str`, *optional*):
            Folder for `weight_sync="disk"`, of this run alone. Default: `server_weights` in `output_dir`.
        vllm_server_request_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds that one sampling request may take; a server that is slower counts as failed.
    """

    end_of_thinking: str = field(default="</think>", metadata={"help": "Text that ends the thinking part."})
    accuracy_reward: str | None = field(
        default=None, metadata={"help": "Name of the reward function that is the correctness. Default: the first."}
    )
    log_line: bool = field(default=True, metadata={"help": "Print one line at each log, not all metrics."})
    log_pages: bool = field(
        default=False, metadata={"help": "Show at each log where credit went in one completion: a page, trackers too."}
    )
    push_revisions: bool = field(
        default=False, metadata={"help": "Push each checkpoint to a branch step-N of the model's repository."}
    )
    lora_sync: str = field(
        default="auto",
        metadata={
            "help": "How a LoRA goes to vLLM: adapter, merged, or auto (as an adapter where vLLM takes it).",
            "choices": list(LORA_SYNCS),
        },
    )
    vllm_dtype: str = field(
        default="auto",
        metadata={"help": "In what a colocated vLLM engine computes.", "choices": list(VLLM_DTYPES)},
    )
    weight_sync: str = field(
        default="auto", metadata={"help": "How weights reach a vLLM server: 'auto', 'nccl' or 'disk'."}
    )
    weight_sync_dir: str | None = field(
        default=None, metadata={"help": "Folder that trainer and server see. Default: in output_dir."}
    )
    vllm_server_request_timeout: float = field(
        default=1800.0, metadata={"help": "Seconds that one request to a vLLM server may take."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, {"lora_sync": LORA_SYNCS, "vllm_dtype": VLLM_DTYPES})
        if self.lora_sync == "adapter" and not self.use_vllm:
            raise ValueError(
                f"lora_sync='adapter' does not go with use_vllm={self.use_vllm}: no engine takes an adapter; set "
                "lora_sync to 'auto'."
            )
        if self.vllm_dtype != "auto" and not (self.use_vllm and self.vllm_mode == "colocate"):
            raise ValueError(
                f"vllm_dtype={self.vllm_dtype!r} is for an engine in the trainer's own process; set it to 'auto' with "
                f"use_vllm={self.use_vllm} and vllm_mode={self.vllm_mode!r} (a server has its own --dtype)."
            )
        if not self.end_of_thinking:
            raise ValueError(
                f"end_of_thinking={self.end_of_thinking!r} is empty; set it to the text that ends thinking."
            )
        self.check_saves()
        if self.push_revisions and not self.push_to_hub:
            raise ValueError(
                "push_revisions=True with push_to_hub=False has no repository to push to; set push_to_hub=True."
            )
        if self.push_revisions and self.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "push_revisions=True with save_strategy='no' has no checkpoint to push; set save_strategy='steps'."
            )
        self._check_server()

    def _check_server(self) -> None:
        check_choices(self, {"weight_sync": ("auto", "nccl", "disk")})
        check_least(self, {"vllm_server_request_timeout": 1.0})
        if not (self.use_vllm and self.vllm_mode == "server"):
            return
        by_token = self.vllm_importance_sampling_mode in ("token_truncate", "token_mask")
        if self.loss_type == "vespo" and self.vllm_importance_sampling_correction and not by_token:
            # TRL's trainer checks it too, but where it connects to vLLM itself.
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} does not go with "
                "loss_type='vespo'; set it to 'token_truncate' or 'token_mask'."
            )
        if self.vllm_enable_sleep_mode:
            raise ValueError(
                "vllm_enable_sleep_mode=True is for an engine in the trainer's own process; set it to False with "
                "vllm_mode='server'."
            )

    def weight_sync_path(self, device: str) -> str:
        """`nccl` or `disk`, for a trainer on a type of device."""
        if self.weight_sync == "nccl" and device != "cuda":
            raise ValueError(f"weight_sync='nccl' needs a CUDA device, and this is {device!r}; set it to 'disk'.")
        if self.weight_sync == "auto":
            return "nccl" if device == "cuda" else "disk"
        return self.weight_sync

    @property
    def device(self) -> torch.device:
        """The device of this rank; a CPU without a number, with which `torch.load` would not know it at a resume."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def needs_whole_batches(self) -> bool:
        """Whether a data set that is smaller than a generation batch would give none."""
        return True

    @property
    def updates_per_batch(self) -> int:
        """Optimizer updates made on a full generation batch."""
        return steps_between_generations(self)

    def check_saves(self) -> None:
        """Refuse saves inside a generation batch, for methods whose batches are a fixed number of updates."""
        check_save_interval(self)

    def check_per_token_advantages(self, otherwise: str = "") -> None:
        """Refuse what does not take an advantage per token.

        Args:
            otherwise: another way out, for the error.
        """
        if self.loss_type not in PER_TOKEN_LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} does not take advantages per token; set it to one of "
                f"{', '.join(PER_TOKEN_LOSSES)} ('dapo' is the token mean, 'grpo' the mean per response){otherwise}."
            )
        if self.loss_type == "cispo" and not (self.epsilon_high is not None and self.epsilon_high > 1.0):
            raise ValueError(
                f"epsilon_high={self.epsilon_high} is the bound of the ratio itself with loss_type='cispo', and would "
                "hold it below 1; set it above 1 (published: 5.0)."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} does not go with advantages per token; "
                f"set it to 'token'{otherwise}."
            )

    def require(self, values: Mapping[str, tuple[object, str]], method: str) -> None:
        """Refuse fields that have another value than the method needs; `values` maps a field to value and reason."""
        for name, (value, reason) in values.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with {method} ({reason}); set it to {value!r}."
                )

    def preflight(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
        """What the method says of a run, and refuses, before the model is loaded.

        Args:
            model_config: of the model that is trained.
            tokenizer: of the model.
            report: receives lines and warnings.

        Raises:
            ValueError: for what cannot work, naming field, value and fix.
        """
