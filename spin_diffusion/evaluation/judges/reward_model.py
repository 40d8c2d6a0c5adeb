"""A reward model: any sequence classifier of transformers with one logit, as published for preference training.

`reward_model=PATH`: a folder or a hub id with safetensors and a tokenizer. Where its tokenizer has a chat template, the
prompt is the user's turn and the answer the assistant's; otherwise the two are encoded as a pair.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.scorers._checkpoints import HUB_ERRORS, HUB_ID
from spin_diffusion.evaluation.scorers._inputs import full_precision
from spin_diffusion.evaluation.specs import About
from spin_diffusion.store.deadline import fill_template
from spin_diffusion.store.input_error import InputError, one_line
from spin_diffusion.store.run_dir import file_hash
from spin_diffusion.store.weights import load_whole

ABOUT = About(
    title="Reward model",
    scale="logit; its zero and its unit are the model's own, so only differences say something",
    role="held-out",
    text="the classifier's chat template, or prompt and answer as a pair; of what is too long the first token and the "
    "end are read",
)

BATCH = 16
"""Answers that the classifier gets at a time; the scores do not depend on it."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(device: str, path: str | None = None) -> Judge:
    """The judge; `path` is a folder or hub id.

    Raises:
        InputError: no path, no such model, no safetensors, more than one logit, weights without a trained head.
    """
    if path is None:
        raise InputError("which reward model? Give reward_model=PATH, a folder or hub id of a sequence classifier")
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = _folder(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{path} has no .safetensors file: other formats are not read")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{path} is an adapter (adapter_config.json): merge it into its model, and give that")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.num_labels != 1:
            raise InputError(f"{path} has {config.num_labels} logits, and a reward model has one")
        if getattr(config, "quantization_config", None):
            raise InputError(f"{path}: its weights are quantised: give the reward model in full numbers")
        # A language model without a trained head would look like a judge if what is missing were filled
        model = load_whole(
            AutoModelForSequenceClassification, folder, where=str(path), config=config, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # the libraries below raise bare Exceptions
        raise InputError(f"{path} is no sequence classifier that transformers can load: {one_line(error)}") from error
    checkpoint = {file.name: file_hash(file) for file in weights}
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, device, checkpoint)


class RewardModel:
    """(answers, log-likelihood) -> logits; the log-likelihood is not used."""

    def __init__(self, model: Any, tokenizer: Any, device: str, checkpoint: dict[str, str]) -> None:
        self.model, self.tokenizer, self.device, self.checkpoint = model, tokenizer, device, checkpoint
        text_config = model.config.get_text_config()
        self.pad: int | None = text_config.pad_token_id
        # Tokenizers without a limit say 1e30
        limits = (getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.longest = min(limit for limit in limits if limit)

    def __call__(self, answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
        """The logit of each answer."""
        encoded = [self._encode(answer) for answer in answers]
        # Longest first: a batch is padded least, and one that does not fit into the memory fails at once
        order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]["input_ids"]))
        # Without a token for padding the classifier cannot tell where a row ends
        batch = BATCH if self.pad is not None else 1
        scores = [0.0] * len(answers)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            with full_precision(self.device):
                logits = self.model(**self._padded([encoded[place] for place in places])).logits
            for place, score in zip(places, logits[:, 0].float().tolist(), strict=True):
                scores[place] = score
        return scores

    def truncated(self, answers: list[Answer]) -> list[bool]:
        """Which answers, with their prompts, are longer than what the classifier reads."""
        return [len(self._tokens(answer)["input_ids"]) > self.longest for answer in answers]

    def _tokens(self, answer: Answer) -> dict[str, list[int]]:
        """What the tokenizer makes of prompt and answer: input_ids and whatever else the classifier takes."""
        if self.tokenizer.chat_template is None:
            found = self.tokenizer(answer.prompt, answer.text, verbose=False)
        else:
            turns = [{"role": "user", "content": answer.prompt}, {"role": "assistant", "content": answer.text}]
            text = fill_template(
                str(self.tokenizer.chat_template),
                lambda: self.tokenizer.apply_chat_template(turns, tokenize=False),
            )
            # The template has written the special tokens
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}

    def _encode(self, answer: Answer) -> dict[str, list[int]]:
        """The same, cut to what the classifier reads: its verdict comes off the last token, or off the first."""
        tokens = self._tokens(answer)
        if not tokens["input_ids"]:
            raise InputError(f"the reward model's tokenizer makes nothing of the prompt {answer.id} and its answer")
        if len(tokens["input_ids"]) <= self.longest:
            return tokens
        return {name: row[:1] + row[1 - self.longest :] for name, row in tokens.items()}

    def _padded(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """(batch, tokens) on the device, padded on the right."""
        width = max(len(row["input_ids"]) for row in rows)
        found = {
            name: [
                row[name] + [(self.pad or 0) if name == "input_ids" else 0] * (width - len(row[name])) for row in rows
            ]
            for name in rows[0]
        }
        found["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {name: torch.tensor(value, device=self.device) for name, value in found.items()}


def _folder(path: str) -> Path:
    """The folder of a reward model, from the hub if need be."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if not HUB_ID.fullmatch(path):
        raise InputError(f"{path} is no folder, and a hub id is written ORG/NAME")
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=_FILES))
    except HUB_ERRORS as error:
        raise InputError(
            f"{path!r} is no folder, and cannot be had from the hub: {one_line(error)}; check the name and the "
            "connection, or give the path of a local copy"
        ) from error
