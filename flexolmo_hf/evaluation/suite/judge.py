"""A language model that rates continuations, the model being one that the user names.

B continuations in a batch, T tokens of a prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError

# A number at the very beginning, alone or followed by words; "4/5" and "4 out of 5" are 4, "2-3" is none.
_RATING = re.compile(
    r"\W*(?:(?:rating|score|answer|grade)\W*(?:is\W*)?)?(?<!-)(\d+)(?![\d.,]*\d|\s*(?:[-–]|to|or)\s*\d)"
    r"(?:\s*(?:/|out of)\s*(\d+))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class JudgeSettings:
    """What ``judge.yaml`` says.

    Attributes:
        samples: Continuations of each opening.
        temperature: They are drawn with.
        new_tokens: Length of a continuation at most.
        opening: For each kind of text, how long its opening is, in tokens or in lines.
        lowest: Worst rating.
        highest: Best rating.
        prompt: What the judge is asked, with places for kind, opening, continuation, lowest and highest.
    """

    samples: int
    temperature: float
    new_tokens: int
    opening: dict[str, dict[str, int]]
    lowest: int
    highest: int
    prompt: str

    def ask(self, kind: str, opening: str, continuation: str) -> str:
        """Write the prompt for one continuation."""
        return self.prompt.format(
            kind=kind, opening=opening, continuation=continuation, lowest=self.lowest, highest=self.highest
        )

    def read(self, answer: str) -> int | None:
        """Read a rating; None if the answer does not begin with a number of the scale."""
        found = _RATING.match(answer)
        if found is None or (found[2] is not None and int(found[2]) != self.highest):
            return None
        rating = int(found[1])
        return rating if self.lowest <= rating <= self.highest else None


@cache
def judge_settings() -> JudgeSettings:
    """Read ``judge.yaml``."""
    read: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "judge.yaml").read_text(encoding="utf-8"))
    return JudgeSettings(**read)


class Judge:
    """A chat model that answers one prompt for each continuation, without sampling.

    Attributes:
        name: Its name: of a path, the last component.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "judge"):
        """Take a model.

        Raises:
            ConfigurationError: If its tokenizer has no chat template: it was never taught to answer.
        """
        if tokenizer.chat_template is None:
            raise ConfigurationError(
                f"The judge {name!r} has no chat template, so it is no chat model.", "Name an instruction-tuned model."
            )
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str | None = None, dtype: Any = "auto") -> "Judge":
        """Load a judge from a folder or repository; without a device, to the accelerator if there is one."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, tokenizer, Path(path).name)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], *, batch_size: int = 8) -> list[str]:
        """Answer prompts, those of similar length together."""
        found: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found |= dict(zip(batch, self._answer([prompts[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _answer(self, prompts: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        given = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        written_BT = self.model.generate(
            **given, max_new_tokens=16, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        return self.tokenizer.batch_decode(written_BT[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
