import pytest
from transformers import AutoTokenizer

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.demo import results
from flexolmo_hf.demo.settings import DOMAINS
from flexolmo_hf.demo.tokenizer import train_tokenizer
from flexolmo_hf.evaluation import bits_per_byte
from flexolmo_hf.evaluation.data.documents import write_documents

TEXTS = {"public": ["A public text."], "math": ["Let $x$ be 3."], "code": ["def f(x):\n    return x\n", "x = 1\n"]}


@pytest.fixture
def merged(tmp_path):
    """An untrained model with three experts that differ, and held-out texts."""
    folder = tmp_path / "merged"
    tokenizer = train_tokenizer([text * 9 for texts in TEXTS.values() for text in texts], vocabulary=280, longest=64)
    tokenizer.save_pretrained(folder)
    config = FlexOlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_experts=3,
        num_experts_per_tok=3,
        expert_names=["public", "math", "code"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    FlexOlmoForCausalLM(config).save_pretrained(folder)
    for domain, texts in TEXTS.items():
        write_documents(tmp_path / "heldout" / f"{domain}.jsonl", texts)
    return folder


def test_every_set_is_measured_on_every_domain_with_that_set_in_force(merged):
    found = results.measure(merged, merged.parent / "heldout", sequence=16)["bits_per_byte"]

    model, tokenizer = FlexOlmoForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert list(found) == ["public", "public+math", "public+code", "public+math+code"]
    for name, row in found.items():
        with model.use_experts(*name.split("+")):
            expected = {d: bits_per_byte(model, tokenizer, TEXTS[d], max_length=16) for d in DOMAINS}
        assert row == pytest.approx(expected, rel=1e-5)
    assert len({row["math"] for row in found.values()}) == len(found)


def test_every_set_continues_every_prompt_the_same_way_each_time(merged):
    first, second = (results.measure(merged, merged.parent / "heldout", sequence=16)["samples"] for _ in range(2))

    assert first == second
    assert set(first) == {"+".join(experts) for experts in results.EXPERT_SETS}
    for texts in first.values():
        assert all(
            texts[domain].startswith(prompt) and texts[domain] != prompt for domain, prompt in results.PROMPTS.items()
        )


def test_prompt_starts_a_document_as_in_training_and_the_sample_does_not_show_it(merged, monkeypatch):
    model, tokenizer = FlexOlmoForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    read = []
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: read.append(input_ids) or input_ids)

    text = results.continue_text(model, tokenizer, "def ")

    assert read[0].tolist() == [[tokenizer.eos_token_id, *tokenizer("def ")["input_ids"]]]
    assert text == "def "
