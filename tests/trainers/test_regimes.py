"""Whatever a run switches on, one expert moves and nothing else, bit for bit."""

import pytest
import torch
from datasets import Dataset
from torch.optim.swa_utils import AveragedModel

from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM, RouterSFTConfig, freeze_except
from flexolmo_hf.errors import ConfigurationError
from tests.conftest import dense_model
from tests.modeling.test_expert_sets import named_model
from tests.trainers.conftest import TEXT
from tests.trainers.test_expert import Watch
from tests.trainers.test_freezing import belongs_to, state

REGIMES = {
    "fused adamw": {"optim": "adamw_torch_fused"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "rmsprop": {"optim": "rmsprop"},
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 1e-3},
    "recomputed frozen experts": {"recompute_frozen": True, "gradient_checkpointing": False},
    "recomputed twice over": {"recompute_frozen": True, "gradient_checkpointing": True},
    "recomputed, bf16 autocast": {"recompute_frozen": True, "gradient_checkpointing": False, "bf16": True},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "smoothed labels": {"label_smoothing_factor": 0.1, "lm_z_loss_coef": 0.0},
    "several epochs": {"max_steps": -1, "num_train_epochs": 2},
}


def expert_of(tokenizer, **sizes):
    dense = dense_model(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes)
    return FlexOlmoForCausalLM.from_dense(dense, expert="math", router_bias=True)


def assert_only_the_expert_moved(before, after):
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    for key in moved:
        assert belongs_to(key, 1) or ".mlp.gate." in key, key
        if ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0]), key
    assert all(key in moved for key in before if belongs_to(key, 1))


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated:")
@pytest.mark.parametrize("changes", REGIMES.values(), ids=REGIMES.keys())
def test_only_the_expert_moves(trainer, model, changes):
    before = state(model)
    trainer(TEXT, **changes).train()
    assert {mixture.recompute_frozen for mixture in model.mixtures} == {changes.get("recompute_frozen", False)}
    assert_only_the_expert_moved(before, state(model))


def test_an_optimizer_with_8_bit_states_moves_only_the_expert(trainer, tokenizer):
    pytest.importorskip("torchao", reason="torchao is optional")
    # torchao keeps the states of tensors below 4096 elements in fp32.
    wide = expert_of(tokenizer, intermediate_size=128)
    before = state(wide)
    run = trainer(TEXT, using=wide, optim="adamw_torch_8bit")
    # torchao compiles its step, which takes far longer than the run.
    with torch.compiler.set_stance("force_eager"):
        run.train()
    optimizer = run.optimizer.optimizer
    kinds = {
        name: {type(optimizer.state[parameter][moment]).__name__ for moment in ("exp_avg", "exp_avg_sq")}
        for name, parameter in wide.named_parameters()
        if parameter.requires_grad
    }
    assert len(kinds) == 2 * (3 + 2)
    assert {name for name, kind in kinds.items() if kind == {"OptimState8bit"}} == {
        n for n in kinds if ".experts." in n
    }
    assert_only_the_expert_moved(before, state(wide))


def test_a_quantised_model_is_refused(trainer, model, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is optional")
    from transformers import TorchAoConfig

    model.save_pretrained(tmp_path / "saved")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantised = FlexOlmoForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=config)
    with pytest.raises(ConfigurationError, match="quantised weights do not learn"):
        trainer(TEXT, using=quantised)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"activation_offloading": True}, {"optim": "paged_adamw_8bit"}, {"fp16": True}], ids=str
)
def test_only_the_expert_moves_on_a_device(trainer, model, changes):
    if "optim" in changes:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    before = state(model)
    trainer(TEXT, use_cpu=False, **changes).train()
    assert_only_the_expert_moved(before, {key: value.cpu() for key, value in state(model).items()})


def test_adapters_beside_what_is_frozen_are_refused(model, settings, tokenizer):
    peft = pytest.importorskip("peft")
    before = state(model)
    with pytest.raises(ConfigurationError, match="trained with lora_r in the settings"):
        ExpertSFTTrainer(
            model=model,
            args=settings(),
            train_dataset=Dataset.from_list(TEXT),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(target_modules="all-linear", r=2),
        )
    assert all(torch.equal(before[key], value) for key, value in state(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fp16", "activation_offloading"])
def test_what_has_no_effect_on_a_cpu_is_refused_there(trainer, name):
    with pytest.raises(ConfigurationError, match=f"{name} is on, and this run is on a CPU"):
        trainer(TEXT, **{name: True})


def test_float16_of_a_launcher_is_refused_on_a_cpu(monkeypatch, trainer):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigurationError, match="fp16 is on, and this run is on a CPU"):
        trainer(TEXT)


def test_float16_autocast_with_scaled_gradients_moves_only_the_expert(model, input_ids):
    before, scaler = state(model), torch.amp.GradScaler("cpu")
    freeze_except(model, "math")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    dtypes = set()
    model.expert_modules("math")[0].register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids, labels=input_ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    after = state(model)
    assert dtypes == {torch.float16}
    # No step was left out.
    assert scaler.get_scale() == 2.0**16
    assert all(value.isfinite().all() for value in after.values())
    assert_only_the_expert_moved(before, after)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "frozen experts recomputed"])
def test_offloading_activations_changes_no_gradient(monkeypatch, input_ids, recompute):
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    model = named_model(router_bias=True).train()
    freeze_except(model, "math")
    for mixture in model.mixtures:
        mixture.recompute_frozen = recompute
    model(input_ids, labels=input_ids).loss.backward()
    kept = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    # TRL takes its tensors from an accelerator; here the CPU stands for one, and they are copied out and back.
    with monkeypatch.context() as pretending:
        pretending.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        offloading = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)
    with offloading:
        loss = model(input_ids, labels=input_ids).loss
    moved_out = [entry for entry in offloading.tracker.values() if entry[1]]
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(moved_out) > 10
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.slow
def test_a_compiled_run_moves_only_the_expert(trainer, model):
    before = state(model)
    trainer(TEXT, torch_compile=True, gradient_checkpointing=False).train()
    assert_only_the_expert_moved(before, {key.removeprefix("_orig_mod."): value for key, value in state(model).items()})


def test_clipping_looks_at_the_trained_parameters_alone(trainer, model):
    run = trainer(TEXT, max_grad_norm=1e-3, max_steps=1, logging_steps=1)
    norms = []

    class Look(Watch):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            trained = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append((len(trained), torch.nn.utils.get_total_norm(trained).item()))

    run.add_callback(Look(lambda: None))
    run.train()
    assert norms == [(2 * (3 + 2), pytest.approx(1e-3, rel=1e-3))]


def test_an_average_of_weights_holds_the_frozen_ones_as_they_are(trainer, model):
    run, steps = trainer(TEXT, max_steps=3), []
    average = AveragedModel(model)
    run.add_callback(Watch(lambda: (average.update_parameters(model), steps.append(state(model)))))
    run.train()
    averaged = average.module.state_dict()
    for key, value in model.state_dict().items():
        mean = torch.stack([step[key] for step in steps]).mean(dim=0)
        if ".mlp.gate." in key:
            assert torch.equal(averaged[key][0], value[0]), key
            assert not torch.equal(averaged[key][1], value[1]), key
            torch.testing.assert_close(averaged[key], mean)
        elif belongs_to(key, 1):
            assert not torch.equal(averaged[key], value), key
            torch.testing.assert_close(averaged[key], mean)
        else:
            assert torch.equal(averaged[key], value), key


@pytest.mark.parametrize("at_construction", [True, False])
def test_averaging_that_takes_every_parameter_for_trained_is_refused(model, settings, tokenizer, at_construction):
    from datasets import Dataset
    from trl import BEMACallback

    def make(**given):
        rows = Dataset.from_list(TEXT)
        return ExpertSFTTrainer(model, settings(), train_dataset=rows, processing_class=tokenizer, **given)

    with pytest.raises(ConfigurationError, match="AveragedModel"):
        if at_construction:
            make(callbacks=[BEMACallback()])
        else:
            make().add_callback(BEMACallback())


@pytest.mark.parametrize("kind", [ExpertSFTConfig, RouterSFTConfig])
def test_smoothed_labels_are_refused_beside_the_output_z_loss(tmp_path, kind):
    values = {"output_dir": str(tmp_path), "bf16": False, "label_smoothing_factor": 0.1}
    values |= {"expert": "math"} if kind is ExpertSFTConfig else {}
    with pytest.raises(ConfigurationError, match="lm_z_loss_coef=0"):
        kind(**values)
    assert kind(**values, lm_z_loss_coef=0.0).label_smoothing_factor == 0.1


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:")
def test_a_loss_function_of_the_callers_is_refused_beside_the_output_z_loss(model, settings, tokenizer):
    from datasets import Dataset

    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    given = {"train_dataset": Dataset.from_list(TEXT), "processing_class": tokenizer, "compute_loss_func": loss_of}
    before = state(model)
    with pytest.raises(ConfigurationError, match="lm_z_loss_coef=0"):
        ExpertSFTTrainer(model, settings(), **given).train()
    assert all(torch.equal(before[key], value) for key, value in state(model).items())
    ExpertSFTTrainer(model, settings(lm_z_loss_coef=0.0), **given).train()
    assert_only_the_expert_moved(before, state(model))


@pytest.mark.parametrize("per_token", [4, 2], ids=["dense", "top-k"])
def test_recomputing_frozen_experts_changes_no_gradient_and_keeps_fewer_activations(input_ids, per_token):
    gradients, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = named_model(per_token, router_bias=True, intermediate_size=256).train()
        freeze_except(model, "math")
        for mixture in model.mixtures:
            mixture.recompute_frozen = recompute
        bytes_kept = []

        def count(tensor, into=bytes_kept):
            into.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        kept.append(sum(bytes_kept))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.parametrize(
    ("groups", "parts"),
    [(["embeddings"], ["embed_tokens"]), (["lm_head", "attention"], ["lm_head", "self_attn"]), (["norms"], ["norm"])],
    ids=str,
)
def test_shared_weights_move_only_where_it_is_said_and_the_package_says_so(trainer, model, tmp_path, groups, parts):
    from flexolmo_hf import ExpertPackage
    from flexolmo_hf.composition.training_record import read_training_record

    before = state(model)
    run = trainer(TEXT, unfreeze=groups, save_strategy="steps", save_steps=2)
    run.train()
    after = state(model)
    for key in before:
        if ".mlp." not in key:
            said = any(part in key for part in parts) and not (groups == ["norms"] and "self_attn" in key)
            assert torch.equal(before[key], after[key]) != said, key
    package = ExpertPackage.from_model(model, "math", **read_training_record(tmp_path / "run" / "checkpoint-2"))
    assert package.manifest.unfrozen == groups
    assert package.manifest.training["shared weights trained"] == ", ".join(groups)


def test_the_anchor_is_trained_only_where_it_is_said(trainer, model):
    before = state(model)
    with pytest.raises(ConfigurationError, match="allow_training_anchor"):
        trainer(TEXT, expert="public")
    trainer(TEXT, expert="public", allow_training_anchor=True).train()
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert {key for key in moved if belongs_to(key, 0)}
    assert not {key for key in moved if belongs_to(key, 1)}
