"""A fine-tuned encoder is a classifier like the other, leaves no trace, and is refused when its files lack weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from flexolmo_hf import FineTunedClassifier, ProxySettings, select_proxy
from flexolmo_hf.errors import IncompleteCheckpointError, NonFiniteLossError
from tests.routing.proxy_corpora import WORDS, documents, encode, public_corpus

TEXTS = documents("garden", 40) + documents("algebra", 40)
PRIVATE = np.arange(80) >= 40
NOTHING = np.zeros((80, 1))


@pytest.fixture
def encoder(tmp_path):
    """The folder of a tiny BERT whose vocabulary is the words of the corpora."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(" ".join(WORDS.values()).split()))]
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
    ).save_pretrained(tmp_path / "BERT")
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=50,
        )
    ).save_pretrained(tmp_path / "BERT")
    return tmp_path / "BERT"


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are too small to be shared among threads, which would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(encoder, **changes):
    return FineTunedClassifier(encoder, **{"learning_rate": 1e-2, "epochs": 3, "device": "cpu", **changes})


def test_it_learns_to_tell_the_matters_apart(encoder):
    judge = quick(encoder)
    judge.fit(TEXTS, NOTHING, PRIVATE, seed=0)
    unseen = documents("garden", 30, seed=7) + documents("algebra", 30, seed=7)

    assert ((judge.log_odds(unseen, NOTHING[:60]) > 0) == (np.arange(60) >= 30)).mean() > 0.95


def test_few_private_documents_weigh_as_much_as_many_public_ones(encoder):
    # Of one and the same text nothing can be learned but how frequent each kind is: log(5 / 40) is -2.1.
    judge = quick(encoder, epochs=30, batch_size=45)
    judge.fit([TEXTS[0]] * 45, NOTHING[:45], PRIVATE[:45], seed=0)

    assert abs(judge.log_odds(TEXTS[:1], NOTHING[:1])[0]) < 0.5


def test_the_paper_s_learning_rate_is_the_default():
    assert FineTunedClassifier("any").learning_rate == 3e-6


def test_a_score_does_not_depend_on_what_is_scored_beside_it(encoder):
    judge = quick(encoder, batch_size=7, epochs=1)
    judge.fit(TEXTS[20:60], NOTHING[:40], PRIVATE[20:60], seed=0)
    texts = [text[: 30 * (1 + index % 5)] for index, text in enumerate(TEXTS[30:50])]
    together = judge.log_odds(texts, NOTHING[:20])

    assert together == pytest.approx([judge.log_odds([text], NOTHING[:1])[0] for text in texts], abs=1e-5)


def test_a_text_longer_than_the_encoder_reads_is_cut(encoder):
    judge = quick(encoder, epochs=1)
    judge.fit(TEXTS[30:50], NOTHING[:20], PRIVATE[30:50], seed=0)
    long = " ".join(TEXTS)

    assert judge.log_odds([long], NOTHING[:1]) == judge.log_odds([long + " ring" * 500], NOTHING[:1])


def test_the_seed_decides_and_torch_s_own_state_is_left_as_it_was(encoder):
    before = torch.random.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        judge = quick(encoder)
        judge.fit(TEXTS, NOTHING, PRIVATE, seed=seed)
        found.append(judge.log_odds(TEXTS, NOTHING))

    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_learning_writes_no_file_and_says_nothing(encoder, capfd):
    before = {file: file.stat().st_mtime_ns for file in encoder.rglob("*")}
    judge = quick(encoder)
    judge.fit(TEXTS, NOTHING, PRIVATE, seed=0)
    said = "".join(capfd.readouterr())

    assert {file: file.stat().st_mtime_ns for file in encoder.rglob("*")} == before
    assert str(encoder) not in said
    assert "BERT" not in said


def test_an_encoder_that_lacks_weights_is_refused(encoder):
    tensors = load_file(encoder / "model.safetensors")
    (gone,) = (key for key in tensors if key.endswith("attention.self.query.weight"))
    save_file({key: value for key, value in tensors.items() if key != gone}, encoder / "model.safetensors")

    with pytest.raises(IncompleteCheckpointError, match="query.weight"):
        quick(encoder).fit(TEXTS, NOTHING, PRIVATE, seed=0)


def test_a_loss_that_diverges_is_named(encoder):
    tensors = load_file(encoder / "model.safetensors")
    spoilt = {key: value * float("nan") if "query" in key else value for key, value in tensors.items()}
    save_file(spoilt, encoder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(NonFiniteLossError):
        quick(encoder).fit(TEXTS, NOTHING, PRIVATE, seed=0)


def test_proxy_data_can_be_chosen_by_a_fine_tuned_encoder(encoder):
    pytest.importorskip("sklearn")
    public, about = public_corpus()
    chosen = select_proxy(
        public,
        documents("algebra", 60, seed=1),
        n=15,
        encoder=encode,
        classifier=quick(encoder, epochs=1),
        settings=ProxySettings(train_public=150),
    )

    assert set(chosen.indices) <= about
    assert chosen.classifier.accuracy > 0.8
    assert chosen.settings["classifier"] == "FineTunedClassifier"


def test_the_encoder_itself_is_fine_tuned_when_nothing_else_is_named(encoder, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("sentence_transformers")
    tuned = []
    fit = FineTunedClassifier.fit
    monkeypatch.setattr(
        FineTunedClassifier, "fit", lambda self, *given, **named: tuned.append(self) or fit(self, *given, **named)
    )
    public, _ = public_corpus(about=30, others=30)
    chosen = select_proxy(public, documents("algebra", 30, seed=1), n=5, encoder=str(encoder), classifier="finetune")

    assert len(chosen) == 5
    assert [judge.model for judge in tuned] == [str(encoder)]
