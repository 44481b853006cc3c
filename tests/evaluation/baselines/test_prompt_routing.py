"""Each row is computed by the expert that was chosen for it, from a query that its scored tokens are no part of."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexolmo_hf.errors import ConfigurationError, EmptyExpertSetError, NotFlexOlmoError, UnknownArgumentError
from flexolmo_hf.evaluation import bits_per_byte
from flexolmo_hf.evaluation.baselines import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.baselines.label_sets import Label, LabelSet
from flexolmo_hf.evaluation.baselines.prompt_router import Choice
from tests.conftest import byte_tokenizer, dense_model
from tests.evaluation.baselines.chat import chat_model
from tests.modeling.test_expert_sets import named_model, poison

WORDS = {"public": "general", "math": "sums", "code": "programs", "news": "reports"}
LABELS = LabelSet("test", "{labels} {text}", tuple(Label(word, name, "") for name, word in WORDS.items()))
# The first letter of a query decides.
BY_LETTER = {"m": "math", "c": "code", "p": "public"}
PROMPTS = ["m: two plus two is", "c: for x in", "p: once upon", "m: then"]
ROUTED = ["math", "code", "public", "math"]


def by_letter(router, asked):
    def choose(text):
        asked.append(text)
        return Choice(BY_LETTER[text[0]], {})

    return choose


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def dense(tokenizer):
    return {name: dense_model(vocab_size=len(tokenizer)) for name in ("public", "math", "code")}


@pytest.fixture
def mixture(tokenizer):
    return named_model(vocab_size=len(tokenizer))


@pytest.fixture(params=["dense", "mixture"])
def routed(request, tokenizer):
    """A routed model whose choices are known, and for each expert the function that gives its logits."""
    experts = request.getfixturevalue(request.param)
    model = PromptRoutedForCausalLM.from_models(experts, tokenizer, labels=LABELS, chat=chat_model(), prefix=4)
    model.asked = []
    model.router.choose = by_letter(model.router, model.asked)

    def alone(name):
        if request.param == "dense":
            return experts[name]
        sets = ["public"] if name == "public" else ["public", name]
        return lambda ids, **options: experts(ids, active_experts=sets, **options)

    def generated(name, *args, **options):
        if request.param == "dense":
            return experts[name].generate(*args, **options)
        return experts.generate(*args, active_experts=["public", *{name} - {"public"}], **options)

    model.alone, model.generated = alone, generated
    return model


def encoded(tokenizer, prompts, side):
    tokenizer.padding_side = side
    return tokenizer(prompts, padding=True, return_tensors="pt")


def expected(model, tokenizer, text, prefix):
    """Logits of one text without padding: the public expert's before the last token of the query, then the other's."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    public, chosen = (model.alone(name)(ids).logits[0] for name in ("public", BY_LETTER[text[0]]))
    return torch.cat([public[: prefix - 1], chosen[prefix - 1 :]])


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_public_scores_the_query_and_the_chosen_expert_the_rest(routed, tokenizer, side):
    batch = encoded(tokenizer, PROMPTS, side)
    logits = routed(**batch).logits

    for row, text in enumerate(PROMPTS):
        found = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(found, expected(routed, tokenizer, text, 4), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_queries_may_differ_in_length(routed, tokenizer):
    batch = encoded(tokenizer, PROMPTS[:2], "right")
    logits = routed(**batch, query_tokens=torch.tensor([7, 2])).logits

    for row, (text, prefix) in enumerate(zip(PROMPTS[:2], (7, 2), strict=True)):
        found = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(found, expected(routed, tokenizer, text, prefix), atol=1e-4, rtol=1e-4)
    assert set(routed.asked) == {PROMPTS[0][:7], PROMPTS[1][:2]}


@torch.no_grad()
def test_no_token_takes_part_in_the_choice_of_who_predicts_it(routed, tokenizer):
    ids = tokenizer("m: two plus", return_tensors="pt")["input_ids"]
    whole = routed(ids).logits
    for length in range(1, ids.shape[1]):
        torch.testing.assert_close(routed(ids[:, :length]).logits, whole[:, :length], atol=1e-4, rtol=1e-4)
    changed = ids.clone()
    changed[0, 5:] = 9
    torch.testing.assert_close(routed(changed).logits[:, :5], whole[:, :5], atol=1e-4, rtol=1e-4)
    assert set(routed.asked) == {"m: t"}


def test_bits_per_byte_is_the_public_models_for_the_query_and_the_chosen_ones_after_it(tokenizer, dense):
    model = PromptRoutedForCausalLM.from_models(dense, tokenizer, labels=LABELS, chat=chat_model(), prefix=4)
    model.router.choose = by_letter(model.router, [])
    texts = PROMPTS[:3]
    found = bits_per_byte(model, tokenizer, texts, batch_size=2)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            public, chosen = (
                dense[name](ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
                for name in ("public", BY_LETTER[text[0]])
            )
        nats -= (public[:3].sum() + chosen[3:].sum()).item()

    assert found.bits == pytest.approx(nats / torch.tensor(2.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_each_prompt_is_continued_by_its_own_expert(routed, tokenizer, options):
    batch = encoded(tokenizer, PROMPTS, "left")
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    found = routed.generate(**batch, **settings)
    copies = options.get("num_return_sequences", 1)

    for row, name in enumerate(ROUTED):
        alone = routed.generated(
            name, batch["input_ids"][[row]], attention_mask=batch["attention_mask"][[row]], **settings
        )
        for copy in range(copies):
            made = alone[copy]
            assert torch.equal(found[row * copies + copy][: len(made)], made)
            assert (found[row * copies + copy][len(made) :] == tokenizer.pad_token_id).all()
    assert routed.asked == list(dict.fromkeys(PROMPTS))


def test_the_models_own_generation_settings_are_those_of_whoever_answers(routed, tokenizer):
    batch = encoded(tokenizer, PROMPTS, "left")
    routed.generation_config.max_new_tokens = 2
    by_default, said = routed.generate(**batch), routed.generate(**batch, max_new_tokens=3)

    assert by_default.shape[1] == batch["input_ids"].shape[1] + 2
    assert said.shape[1] == batch["input_ids"].shape[1] + 3


@torch.no_grad()
def test_positions_may_be_given_once_for_all_rows(routed, tokenizer):
    ids = encoded(tokenizer, [prompt[:7] for prompt in PROMPTS], "right")["input_ids"]
    positions = torch.arange(7).unsqueeze(0)

    torch.testing.assert_close(routed(ids, position_ids=positions).logits, routed(ids).logits)


@torch.no_grad()
def test_an_expert_that_is_switched_off_cannot_be_chosen(tokenizer, mixture):
    mixture.set_active_experts(["public", "math"])
    model = PromptRoutedForCausalLM.from_models(mixture, tokenizer, labels=LABELS, chat=chat_model(), prefix=4)
    batch = encoded(tokenizer, PROMPTS, "right")
    before = model(**batch).logits
    poison(mixture, ["code", "news"])

    assert model.experts == ["public", "math"]
    assert [label.word for label in model.router.labels.labels] == ["general", "sums"]
    assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
def test_logits_to_keep_and_labels_mean_what_they_mean_elsewhere(routed, tokenizer):
    ids = encoded(tokenizer, [prompt[:7] for prompt in PROMPTS], "right")["input_ids"]
    full = routed(ids, labels=ids)
    by_hand = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    torch.testing.assert_close(full.loss, by_hand)
    assert torch.equal(routed(ids, logits_to_keep=3).logits, full.logits[:, -3:])
    assert torch.equal(routed(ids, logits_to_keep=torch.tensor([1, 5])).logits, full.logits[:, [1, 5]])


def test_a_query_is_handed_on_whole_for_the_chat_model_to_cut(routed):
    query = "m: " + "x" * 500
    routed.choose([query, query])

    assert routed.asked == [query]


def test_what_was_chosen_is_counted(routed, tokenizer):
    with torch.no_grad():
        routed(**encoded(tokenizer, PROMPTS, "right"))
    routed.router.choose = lambda text: Choice("public", {}, understood=False)
    routed.choose(["x", "y", "x"])

    assert {name: count for name, count in routed.choices.items() if count} == {"math": 2, "code": 1, "public": 4}
    assert routed.not_understood == 3


def test_a_saved_model_is_loaded_whole(tmp_path, tokenizer, routed):
    batch = encoded(tokenizer, PROMPTS, "right")
    del routed.router.choose
    routed.save_pretrained(tmp_path / "routed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "routed")

    assert isinstance(loaded, PromptRoutedForCausalLM)
    assert not loaded.training
    assert loaded.config.prefix == 4
    assert loaded.router.labels == routed.router.labels
    assert AutoTokenizer.from_pretrained(tmp_path / "routed").get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, routed(**batch).logits)


def test_a_model_that_was_left_out_does_not_lie_beside_the_others(tmp_path, tokenizer, dense, refused):
    options = {"labels": LABELS, "chat": chat_model()}
    PromptRoutedForCausalLM.from_models(dense, tokenizer, **options).save_pretrained(tmp_path)
    fewer = PromptRoutedForCausalLM.from_models({"public": dense["public"]}, tokenizer, **options)

    with refused(ConfigurationError, "model-code", "model-math"):
        fewer.save_pretrained(tmp_path)


def test_tokenizers_are_read_from_the_revision_that_was_asked_for(tmp_path, tokenizer, dense, monkeypatch):
    options = {"labels": LABELS, "chat": chat_model()}
    PromptRoutedForCausalLM.from_models(dense, tokenizer, **options).save_pretrained(tmp_path)
    asked, read = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k.get("revision")) or read(*a, **k)
    )
    PromptRoutedForCausalLM.from_pretrained(tmp_path, revision="a-branch")

    assert asked == ["a-branch", "a-branch"]


def test_cost_counts_the_chat_model_and_what_one_answer_takes(tokenizer, dense, mixture):
    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    chat = chat_model()
    by_models = PromptRoutedForCausalLM.from_models(dense, tokenizer, labels=LABELS, chat=chat).cost()
    by_mixture = PromptRoutedForCausalLM.from_models(mixture, tokenizer, labels=LABELS, chat=chat).cost()
    of_two_experts = size(mixture) - 2 * sum(size(module) for module in mixture.expert_modules("code"))

    assert by_models.parameters == size(chat[0]) + sum(map(size, dense.values()))
    assert by_models.parameters_per_token == size(dense["math"])
    assert by_mixture.parameters == size(chat[0]) + size(mixture)
    assert by_mixture.parameters_per_token == of_two_experts
    assert by_models.chat_tokens_per_query > 20


def test_the_chat_model_never_trains(tokenizer, dense):
    model = PromptRoutedForCausalLM.from_models(dense, tokenizer, labels=LABELS, chat=chat_model()).train()

    assert model.training and model.answerers[0].training
    assert not model.chat.training


def test_what_does_not_fit_is_refused(tokenizer, dense, routed):
    options = {"labels": LABELS, "chat": chat_model()}
    make = PromptRoutedForCausalLM.from_models
    ids = torch.ones(2, 6, dtype=torch.long)

    with pytest.raises(EmptyExpertSetError):
        make({}, tokenizer, **options)
    with pytest.raises(ConfigurationError, match="no 'public'"):
        make({"math": dense["math"]}, tokenizer, **options)
    with pytest.raises(ConfigurationError, match=r"no label for \['poems'\]"):
        make({**dense, "poems": dense["math"]}, tokenizer, **options)
    with pytest.raises(ConfigurationError, match="differ in size"):
        make({**dense, "news": dense_model()}, tokenizer, **options)
    with pytest.raises(NotFlexOlmoError):
        make(dense["public"], tokenizer, **options)
    with pytest.raises(ConfigurationError, match="prefix is 0"):
        make(dense, tokenizer, prefix=0, **options)
    with pytest.raises(ConfigurationError, match="past_key_values"):
        routed(ids, past_key_values=object())
    with pytest.raises(ConfigurationError, match="attention_mask"):
        routed(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ConfigurationError, match="query_tokens"):
        routed(ids, query_tokens=torch.ones(3))
    with pytest.raises(ConfigurationError, match="query_tokens is below 1"):
        routed(ids, query_tokens=0)
    with pytest.raises(ConfigurationError, match="output_loading_info"):
        PromptRoutedForCausalLM.from_pretrained("anywhere", output_loading_info=True)
    with pytest.raises(UnknownArgumentError, match="active_expert"):
        routed(ids, active_experts=["public"])
    with pytest.raises(ConfigurationError, match="no prompt"):
        routed.generate()


def test_several_models_give_sequences_and_nothing_else(tokenizer, dense):
    model = PromptRoutedForCausalLM.from_models(dense, tokenizer, labels=LABELS, chat=chat_model())
    model.router.choose = by_letter(model.router, [])
    with pytest.raises(ConfigurationError, match="Several models"):
        model.generate(**encoded(tokenizer, PROMPTS, "left"), return_dict_in_generate=True)
