"""Capture leaves the model as it was, finds it in its wrappers, and refuses what it cannot read."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

from attn_trainers.attention import InfluenceObserver, forward_for_attention, observe_attention


class Recorder:
    """Keeps copies of what it is shown."""

    def __init__(self, layers=None):
        self.layers = None if layers is None else frozenset(layers)
        self.seen = []

    def observe(self, layer):
        assert not torch.is_grad_enabled()
        self.seen.append(
            (layer.layer_idx, layer.query.clone(), layer.key.clone(), layer.scaling, layer.sliding_window)
        )


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_same_record(left, right):
    assert len(left.seen) == len(right.seen) > 0
    for mine, theirs in zip(left.seen, right.seen, strict=True):
        assert mine[0] == theirs[0]
        assert mine[3:] == theirs[3:]
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=0)
        torch.testing.assert_close(mine[2], theirs[2], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_are_equal_to_the_bit(decoder, batch, implementation, mode):
    decoder.set_attn_implementation(implementation)
    decoder.train(mode == "train")
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "output_attentions": implementation == "eager"}
    plain = decoder(**inputs)
    observer = InfluenceObserver(batch.mask, batch.ranges)
    with observe_attention(decoder, observer):
        observed = decoder(**inputs)
    assert torch.equal(plain.logits[batch.mask.bool()], observed.logits[batch.mask.bool()])
    assert observed.logits.requires_grad
    if implementation == "eager":
        for mine, theirs in zip(plain.attentions, observed.attentions, strict=True):
            assert torch.equal(mine, theirs)
    assert all(influence.max() > 0 for influence in observer.result()[:2])


def test_everything_is_restored_also_after_an_exception(qwen2, batch):
    for implementation in ("sdpa", "eager"):
        qwen2.set_attn_implementation(implementation)
        registry, config = dict(AttentionInterface._global_mapping), copy.deepcopy(qwen2.config.to_dict())
        with pytest.raises(RuntimeError, match="stop here"):
            with observe_attention(qwen2, Recorder()):
                raise RuntimeError("stop here")
        forward_for_attention(qwen2, batch.ids, batch.mask, Recorder(layers=[0]))
        assert registry == AttentionInterface._global_mapping
        assert config == qwen2.config.to_dict()
        assert qwen2.config._attn_implementation == implementation
        assert not qwen2.model._forward_hooks
        observed = Recorder()
        with observe_attention(qwen2, observed):
            pass
        qwen2(input_ids=batch.ids, attention_mask=batch.mask)
        assert observed.seen == []


def test_only_the_observed_model_and_the_chosen_layers_are_shown(qwen2, batch):
    other = copy.deepcopy(qwen2)
    recorder = Recorder(layers=[2, 0])
    with torch.no_grad(), observe_attention(qwen2, recorder):
        other(input_ids=batch.ids, attention_mask=batch.mask)
        assert recorder.seen == []
        qwen2(input_ids=batch.ids, attention_mask=batch.mask)
    assert [record[0] for record in recorder.seen] == [0, 2]


def test_contexts_nest(qwen2, batch):
    outer, inner = Recorder(), Recorder(layers=[1])
    with torch.no_grad(), observe_attention(qwen2, outer), observe_attention(qwen2, inner):
        qwen2(input_ids=batch.ids, attention_mask=batch.mask)
    assert [record[0] for record in outer.seen] == [0, 1, 2]
    assert [record[0] for record in inner.seen] == [1]


def test_shapes_scaling_and_windows(decoder, batch):
    recorder = Recorder()
    forward_for_attention(decoder, batch.ids, batch.mask, recorder)
    kind = decoder.config.model_type
    windows = {"qwen2": [None, 16, 16], "mistral": [11] * 3}.get(kind, [None] * 3)
    if kind == "qwen2" and not decoder.config.use_sliding_window:
        windows = [None] * 3
    assert [record[4] for record in recorder.seen] == windows
    for _, query, key, scaling, _ in recorder.seen:
        assert query.shape == (3, 4, 307, 8)
        assert key.shape == (3, decoder.config.num_key_value_heads, 307, 8)
        assert scaling == 8**-0.5


def test_a_forward_of_its_own_stops_early_and_shows_the_same(decoder, batch):
    whole, early = Recorder(), Recorder(layers=[0, 1])
    forward_for_attention(decoder, batch.ids, batch.mask, whole)
    layers_run = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: layers_run.append(index))
        for index, layer in enumerate(decoder.model.layers)
    ]
    forward_for_attention(decoder, batch.ids, batch.mask, early)
    for hook in hooks:
        hook.remove()
    assert layers_run == [0, 1]
    whole.seen.pop()
    assert_same_record(whole, early)


def test_wrapped_models(qwen2, batch, process_group):
    direct = Recorder()
    forward_for_attention(qwen2, batch.ids, batch.mask, direct)
    lora = peft.get_peft_model(copy.deepcopy(qwen2), peft.LoraConfig(target_modules=["q_proj"]))  # B = 0: no change
    for wrapped in (DistributedDataParallel(copy.deepcopy(qwen2)), lora, DistributedDataParallel(lora)):
        recorder = Recorder()
        forward_for_attention(wrapped, batch.ids, batch.mask, recorder)
        assert_same_record(direct, recorder)


def test_adapters_count(qwen2, batch):
    lora = peft.get_peft_model(
        copy.deepcopy(qwen2), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted, base = Recorder(layers=[0]), Recorder(layers=[0])
    forward_for_attention(lora, batch.ids, batch.mask, adapted)
    with lora.disable_adapter():
        forward_for_attention(lora, batch.ids, batch.mask, base)
    assert not torch.allclose(adapted.seen[0][1], base.seen[0][1])
    assert torch.equal(adapted.seen[0][2], base.seen[0][2])


def test_sharded_models_are_run_whole_through_their_wrapper(qwen2, batch, process_group):
    direct = Recorder(layers=[0])
    forward_for_attention(qwen2, batch.ids, batch.mask, direct)
    sharded = copy.deepcopy(qwen2)
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    heads_run = []
    sharded.lm_head.register_forward_hook(lambda *_: heads_run.append(1))
    recorder = Recorder(layers=[0])
    forward_for_attention(sharded, batch.ids, batch.mask, recorder)
    assert heads_run == [1]
    assert_same_record(direct, recorder)


def test_architectures_off_the_interface_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"model=BloomForCausalLM: .*AttentionInterface"):
        with observe_attention(model, Recorder()):
            pass
    with pytest.raises(ValueError, match="model=Linear holds no transformers model"):
        with observe_attention(torch.nn.Linear(2, 2), Recorder()):
            pass


def test_attention_that_is_no_plain_softmax_is_refused(batch):
    config = Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    model = Gemma2ForCausalLM(config).eval()  # caps its logits
    with pytest.raises(ValueError, match="Gemma2Attention uses softcap"):
        forward_for_attention(model, batch.ids, batch.mask, Recorder())


def test_layers_of_another_kind_are_refused(qwen2):
    qwen2.config.layer_types[1] = "chunked_attention"
    for layers in (None, [1, 2]):
        with pytest.raises(ValueError, match=r"layers=\[1\] of Qwen2Model are \['chunked_attention'\] layers"):
            with observe_attention(qwen2, Recorder(layers)):
                pass
    with observe_attention(qwen2, Recorder(layers=[0, 2])):
        pass


def test_a_forward_that_skips_a_needed_layer_is_refused(qwen2, batch):
    qwen2.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match=r"model=Qwen2Model: .*showed no attention of layers \[1\]"):
        forward_for_attention(qwen2, batch.ids, batch.mask, Recorder())


def test_a_cache_is_refused(qwen2, batch):
    ids = batch.sequence(2)[None]
    with torch.no_grad():
        cache = qwen2(input_ids=ids[:, :10], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="key length=37, query length=27"):
            with observe_attention(qwen2, Recorder()):
                qwen2(input_ids=ids[:, 10:], past_key_values=cache)


def test_importing_attention_imports_no_trainer():
    code = "import sys, attn_trainers.attention; assert not {'trl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
