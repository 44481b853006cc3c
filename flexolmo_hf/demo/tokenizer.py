"""A byte-level BPE tokenizer of a few thousand tokens, learned from the public text alone.

OLMo-2's own vocabulary of 100,278 tokens would dwarf a model of a few million parameters. Byte level means that any
text can be written, also the owners', without an unknown token.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, longest: int) -> PreTrainedTokenizerFast:
    """Learn a tokenizer.

    Args:
        texts: Public documents.
        vocabulary: Number of tokens, the two special ones and the 256 bytes included.
        longest: Tokens the model can read at once.

    Returns:
        The tokenizer, which adds no token by itself. Saved with ``save_pretrained``, it loads with ``AutoTokenizer``.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
