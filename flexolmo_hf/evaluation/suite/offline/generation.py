"""Answers in a model's own words: the likeliest token each time, many prompts at once, until a text that ends them.

Shape letters: B prompts in a batch, T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion

# A cached token costs memory but no work: so many of them count as one of `batch_tokens`.
_CACHED = 8


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[OpenQuestion],
    *,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    active_experts: Sequence[str] | None = None,
) -> list[str]:
    """Let a model answer questions.

    Args:
        model: The model. It is put into evaluation mode for the time.
        tokenizer: Its tokenizer.
        questions: Prompts, each with the texts that end its answer and the longest answer in tokens.
        batch_tokens: Tokens of the prompts that are read at once, padding included.
        max_length: Tokens a model may see. A prompt loses its beginning where it leaves no room for the longest answer;
            an answer is never longer than half of it. None for what the model's configuration says.
        active_experts: For FlexOlmo models, the experts in force; None for those that are.

    Returns:
        One text per question, in their order, without what ended it.
    """
    room = max_length or model.config.get_text_config().max_position_embeddings
    call = {} if active_experts is None else {"active_experts": active_experts}
    answers = [""] * len(questions)
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(tokenizer, questions, batch_tokens, room):
            first = questions[batch[0][0]]
            texts = _write(model, tokenizer, [tokens for _, tokens in batch], first, room, call)
            for (index, _), text in zip(batch, texts, strict=True):
                answers[index] = text
    finally:
        model.train(was_training)
    return answers


def _batches(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[OpenQuestion], batch_tokens: int, room: int
) -> Iterator[list[tuple[int, list[int]]]]:
    encoded = tokenizer([question.context for question in questions], verbose=False)["input_ids"]
    prompts = [
        (index, tokens[-(room - _longest(question, room)) :])
        for index, (question, tokens) in enumerate(zip(questions, encoded, strict=True))
    ]
    # Those that end alike share batches, the longest first.
    prompts.sort(key=lambda prompt: (questions[prompt[0]].stop, questions[prompt[0]].max_tokens, -len(prompt[1])))
    batch: list[tuple[int, list[int]]] = []
    for prompt in prompts:
        if batch:
            before, question = questions[batch[0][0]], questions[prompt[0]]
            alike = (before.stop, before.max_tokens) == (question.stop, question.max_tokens)
            longest = len(batch[0][1])
            memory = (longest + question.max_tokens) / _CACHED
            if not alike or (len(batch) + 1) * max(longest, memory) > batch_tokens:
                yield batch
                batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _longest(question: OpenQuestion, room: int) -> int:
    return max(1, min(question.max_tokens, room // 2))


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    question: OpenQuestion,
    room: int,
    call: dict[str, Any],
) -> list[str]:
    longest = max(1, *(len(tokens) for tokens in prompts))
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, tokens in enumerate(prompts):
        ids_BT[row, longest - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
        mask_BT[row, longest - len(tokens) :] = 1
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    written = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=_longest(question, room), do_sample=False, eos_token_id=end, pad_token_id=padding
        ),
        stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, question.stop, longest)]),
        **call,
    )
    texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [cut(text, question.stop) for text in texts]


def cut(text: str, stop: Sequence[str]) -> str:
    """Return what comes before the first of some texts."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


class _Stops(StoppingCriteria):
    """Differs from upstream's stop strings in that it reads the text, and needs no table of the whole vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt: int):
        self.tokenizer, self.stop, self.prompt = tokenizer, stop, prompt
        # A token is at least a byte; one more may begin within the text.
        self.tail = 1 + max((len(end.encode()) for end in stop), default=0)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Tell which rows have come to their end with the newest token. What has ended is not asked again."""
        if not self.stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        start = max(self.prompt, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(end in text for end in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
