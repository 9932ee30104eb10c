"""Every private name of TRL and transformers that the package overrides, calls or reads, with what it must be.

A change there must be looked at, not slipped past.
"""

import ast
import inspect
from collections import defaultdict, deque

import pytest
import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from attn_trainers.base.checkpoints import restart_order
from attn_trainers.launch.engine import TOKENS_PER_ENGINE_STEP
from tests.helpers import ROOT


# Methods that are overridden or called, with their parameters.
HOOKS = {
    "_prepare_inputs": ["self", "generation_batch"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_get_train_sampler": ["self", "dataset"],
    "_tokenize_prompts": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_get_output_dir": ["self", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
}
# Attributes of a trainer that are read or set.
ATTRIBUTES = {
    "_tokenizer",
    "_metrics",
    "_logs",
    "_pending_metrics",
    "_pending_extra_logs",
    "_buffered_inputs",
    "_step",
    "_dist",
    "_last_loaded_step",
    "_name",
    "_is_vlm",
    "_entropy_bonus_enabled",
    "_last_world_entropy",
}
OTHER = {"_iter_named_params", "_get_per_token_logps_and_entropies", "_run_epoch", "_maybe_log_save_evaluate"}
# Modules that hold trainers or parts of them.
TRAINERS = ["base/*.py", "attnrl/*.py", "attnpo/trainer.py", "rhythm/trainer.py"]


def test_the_version_is_the_one_that_was_read():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize("name", HOOKS)
def test_signature_of_a_hook(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == HOOKS[name]


def test_signature_of_the_log_prob_forward():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]


def test_the_log_prob_forward_runs_under_the_runs_autocast():
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "with self.accelerator.autocast():" in source


def test_an_epoch_is_run_by_a_method_that_takes_keywords():
    parameters = inspect.signature(Trainer._run_epoch).parameters
    assert all(p.kind is not p.POSITIONAL_ONLY for p in parameters.values())
    names = {"epoch", "epochs_trained", "resume_from_checkpoint", "steps_trained_in_current_epoch"}
    assert names <= parameters.keys()


def test_the_order_of_an_epoch_is_one_permutation_of_the_samplers_generator():
    sampler = RepeatSampler(range(7), mini_repeat_count=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(7, generator=generator).tolist() for _ in range(3)]
    assert [list(sampler) for _ in range(3)] == orders
    restart_order(sampler, 2)
    assert list(sampler) == orders[2]


def test_logs_saves_and_evaluations_of_an_update_are_asked_for_in_one_place():
    assert inspect.getsource(Trainer._run_epoch).count("self._maybe_log_save_evaluate(") == 2
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert all(f"self.control.should_{what}" in source for what in ("log", "evaluate", "save"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_model_dir, tiny_tokenizer) -> GRPOTrainer:
    args = GRPOConfig(
        str(tmp_path_factory.mktemp("hooks")), report_to="none", use_cpu=True, bf16=False, num_generations=2
    )
    data = Dataset.from_list([{"prompt": "1"}])
    return GRPOTrainer(
        str(tiny_model_dir), lambda **_: [0.0], args, train_dataset=data, processing_class=tiny_tokenizer
    )


def test_attributes_of_a_trainer_are_what_they_are_taken_for(trainer):
    assert isinstance(trainer._tokenizer, PreTrainedTokenizerBase)
    assert set(trainer._metrics) == {"train", "eval"}
    assert all(
        isinstance(values, defaultdict) and values.default_factory is list for values in trainer._metrics.values()
    )
    assert {"prompt", "completion", "rewards", "advantages", "extra"} <= set(trainer._logs)
    assert isinstance(trainer._logs["prompt"], deque) and isinstance(trainer._logs["advantages"], deque)
    assert isinstance(trainer._logs["rewards"]["any"], deque) and isinstance(trainer._logs["extra"]["any"], deque)
    for pending in (trainer._pending_metrics, trainer._pending_extra_logs):
        assert isinstance(pending, defaultdict) and pending.default_factory is list
    assert trainer._buffered_inputs is None and trainer._step == 0
    assert trainer._entropy_bonus_enabled is False and trainer._last_world_entropy == float("inf")
    assert list(inspect.signature(trainer._dist.summon_full_params).parameters) == ["module", "kwargs"]
    assert trainer._name == "GRPO" and trainer._is_vlm is False
    assert (trainer.reward_func_names, trainer.reward_weights.tolist()) == (["<lambda>"], [1.0])
    assert isinstance(trainer.eos_token_ids, list | set | tuple) and trainer.eos_token_ids
    assert trainer.ref_model is None and isinstance(trainer.model, torch.nn.Module)


def test_weights_are_pushed_again_when_the_step_has_moved_on():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "if self.state.global_step != self._last_loaded_step" in source


def test_every_private_name_of_the_parents_is_known():
    """Names with one underscore that trainers use and the package does not define are listed above."""
    used, defined = set(), set()
    for pattern in TRAINERS:
        for path in (ROOT / "attn_trainers").glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined |= {node.name} if not _calls_super(node) else set()
                if isinstance(node, ast.Attribute) and _is_self(node.value):
                    (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
                if isinstance(node, ast.FunctionDef) and _calls_super(node):
                    used.add(node.name)
    private = {name for name in used - defined if name.startswith("_") and not name.startswith("__")}
    assert {"_metrics", "_compute_loss", "_pending_extra_logs"} <= private
    assert private <= HOOKS.keys() | ATTRIBUTES | OTHER, private - HOOKS.keys() - ATTRIBUTES - OTHER


def _is_self(node: ast.expr) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "trainer"))


def _calls_super(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    return any(
        isinstance(one, ast.Attribute) and one.attr == node.name and isinstance(one.value, ast.Call)
        for one in ast.walk(node)
    )


def test_evaluation_metrics_have_one_prefix_whatever_the_data_set():
    assert 'metrics = {f"eval_{key}": val for key, val in metrics.items()}' in inspect.getsource(GRPOTrainer.log)


def test_the_loss_takes_advantages_per_token():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1:" in source
    for key in ("old_per_token_logps", "importance_sampling_ratio", "ref_per_token_logps", "num_items_in_batch"):
        assert f'inputs["{key}"]' in source or f'inputs.get("{key}")' in source


def test_what_trl_lets_an_engine_compute_at_once():
    source = inspect.getsource(VLLMGeneration._init_vllm)
    assert f"max_num_batched_tokens={TOKENS_PER_ENGINE_STEP}," in source


@pytest.mark.parametrize("name", ["_iter_named_params", "sync_weights"])
def test_signature_of_the_weight_sync(name):
    assert list(inspect.signature(getattr(VLLMGeneration, name)).parameters) == ["self"]


def test_a_sleeping_engine_says_that_its_weights_are_gone():
    assert "self._llm_weights_sleeping = " in inspect.getsource(VLLMGeneration)


def test_old_log_probs_are_made_under_the_condition_that_the_credit_trainers_repeat():
    source = " ".join(inspect.getsource(GRPOTrainer._generate_and_score_completions).split())
    condition = (
        "if self.args.gradient_accumulation_steps % generate_every != 0 or ( self.use_vllm and "
        "self.vllm_importance_sampling_correction ): old_per_token_logps, _, _ = "
        "self._get_per_token_logps_and_entropies( self.model,"
    )
    assert condition in source


def test_the_first_forward_of_a_generation_batch_over_the_policy_is_the_one_for_old_log_probs():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.index("old_per_token_logps, _, _ = self._get_per_token") < source.index("if self.beta != 0.0:")
    assert source.index("self._get_per_token") < source.index("self._calculate_rewards(")


def test_names_by_which_attention_is_read_and_packed():
    from transformers import AttentionInterface, PreTrainedModel, Qwen2Config

    assert isinstance(AttentionInterface._global_mapping, dict) and "sdpa" in AttentionInterface._global_mapping
    assert callable(PreTrainedModel._can_set_attn_implementation)
    assert PreTrainedModel._supports_attention_backend in (True, False) and PreTrainedModel._is_stateful is False
    assert hasattr(Qwen2Config(), "_attn_implementation")


def test_the_fused_head_gives_log_probs_and_entropies():
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "labels=labels, fused_lm_head=True" in source
    assert "outputs.log_probs" in source and "outputs.entropy" in source


def test_trackers_are_reached_through_the_callbacks_that_connect_them():
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    assert "self._trackio = trackio" in inspect.getsource(TrackioCallback.__init__)
    assert "self._wandb = wandb" in inspect.getsource(WandbCallback.__init__)
    assert "self.tb_writer = tb_writer" in inspect.getsource(TensorBoardCallback.__init__)


def test_completions_are_logged_in_training_and_evaluation_alike():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'self._logs["prompt"].extend(gather_object(prompts))' in source
    assert '**self._logs["extra"],' in inspect.getsource(GRPOTrainer.log)


def test_the_engine_is_made_by_a_name_that_can_stand_for_another_and_asked_without_an_adapter():
    source = inspect.getsource(VLLMGeneration)
    assert source.count("self.llm = LLM(") == 1 and source.count("self.llm.generate(") == 1
    assert "lora_request" not in source and "max_model_len=self.max_model_length" in source


def test_a_mixture_of_experts_that_has_a_kernel_takes_new_weights_for_packed_ones():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts, FusedMoEKernel
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    # What packs has this method: experts and methods, not the kernel around the experts.
    kinds = (QuantizeMethodBase, FusedMoEExperts, FusedMoEKernel)
    assert [hasattr(kind, "process_weights_after_loading") for kind in kinds] == [True, True, False]
    source = inspect.getsource(UnquantizedFusedMoEMethod._setup_kernel)
    assert "is_weight_update = self.moe_kernel is not None" in source and "if not is_weight_update:" in source


def test_the_server_side_of_trls_generation_is_what_its_subclass_takes_it_for():
    assert list(inspect.signature(VLLMGeneration._init_vllm).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration.generate).parameters) == [
        "self",
        "prompts",
        "images",
        "num_generations",
        "profiler",
    ]
    source = inspect.getsource(VLLMGeneration.__init__)
    assert source.rstrip().endswith("self._init_vllm()")
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "_, completion_ids, logprobs, _ = self.vllm_generation.generate(" in source
    # The trainer's constructor connects where use_vllm is set, and needs it for nothing else but a check of vespo.
    source = inspect.getsource(GRPOTrainer.__init__)
    assert source.count("if self.use_vllm:") == 1 and source.count("self.use_vllm") == 3


def test_trls_client_checks_the_server_before_it_asks_for_anything():
    from trl.generation.vllm_client import VLLMClient

    assert list(inspect.signature(VLLMClient.check_server).parameters) == ["self", "total_timeout", "retry_interval"]
    source = inspect.getsource(VLLMClient.__init__)
    assert source.index("self.session = ") < source.index("self.check_server(") < source.index("self._get(")
    assert "self.communicator" in inspect.getsource(VLLMClient.close_communicator)


def test_the_servers_endpoints_are_where_they_are_called():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.entrypoints.serve.dev.cache import api_router as cache
    from vllm.entrypoints.serve.dev.rlhf import api_router as weights
    from vllm.entrypoints.serve.dev.rpc import api_router as rpc

    routes = {route.path for module in (cache, weights, rpc) for route in module.router.routes}
    assert {"/reset_prefix_cache", "/weight_info", "/update_weight_version", "/collective_rpc"} <= routes


def test_bars_go_where_trl_and_vllm_take_them():
    llm = pytest.importorskip("vllm").LLM
    annotation = str(inspect.signature(llm.generate).parameters["use_tqdm"].annotation)
    assert "Callable" in annotation
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert source.count("zip(self.reward_funcs,") == source.count("self.reward_funcs,") == 1
