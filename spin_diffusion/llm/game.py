"""LanguageGame: the rounds' contract (`selfplay.game.Game`) for causal language models.

A score is log p(answer | prompt), a number of its own. So the opponent's scores are computed once per round and kept,
and no opponent is in memory while the player is trained: until then the player's weights are the opponent's.
"""

import copy
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spin_diffusion.data.rows import Message, TextExample
from spin_diffusion.llm.base import LanguageBase, load_model
from spin_diffusion.llm.chat import Chat
from spin_diffusion.llm.generation import Drawn, Vllm, draw_answers
from spin_diffusion.llm.logprobs import AnswerScorer, language_model, places_of
from spin_diffusion.llm.settings import GenerationSettings, LanguageModelSettings
from spin_diffusion.samples.sample import Batch, Row
from spin_diffusion.selfplay.device import relative_distance, sent
from spin_diffusion.selfplay.game import PairScores, ScoredBatch
from spin_diffusion.selfplay.health import check_prediction
from spin_diffusion.store.files import tensors_hash, weights_hash
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.run_dir import write_folder
from spin_diffusion.store.weights import load_whole

PLAYER, OPPONENT = "player", "opponent"
"""Adapters on one base."""
MODEL, ADAPTER = "model", "adapter"
"""Folders that a round's player is saved in."""


class LanguageGame:
    """Player and opponent are weights, or adapters, of one base checkpoint and its tokenizer."""

    level_name = "answer lengths"
    remedies = dict.fromkeys(
        ("forgetting", "forgetting_quarter"), ", or give --objective_options '{sft_weight: 0.1}' or take space"
    )
    # A sum of log-probabilities in another batch: kernels and padding round differently
    start_tolerance = {"no": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
    prompt_columns = ("id", "prompt", "prompt_ids")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: LanguageBase,
        *,
        settings: LanguageModelSettings,
        generation: GenerationSettings,
        accelerator: Accelerator,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Args: base: what `model` was loaded from."""
        self.base = base
        self.tokenizer, self.settings, self.generation, self.accelerator = tokenizer, settings, generation, accelerator
        # Use leaves traces in a tokenizer, and what is saved must not depend on what was done before
        self._untouched = copy.deepcopy(tokenizer)
        self.chat = Chat(tokenizer, max_length=settings.max_length, max_new_tokens=generation.max_new_tokens)
        self.model: PreTrainedModel | PeftModel = model.to(accelerator.device)
        _without_dropout(self.model)
        self.base_hash = weights_hash(model)  # before it has an adapter, which begins at random
        if settings.use_lora:
            self.model = _with_adapters(model, settings)
            fresh = get_peft_model_state_dict(self.model, adapter_name=PLAYER)
            self._fresh = {name: tensor.clone() for name, tensor in fresh.items()}
        if gradient_checkpointing:
            language_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
            if settings.use_lora:
                language_model(self.model).enable_input_require_grads()
        # transformers recomputes activations only in training mode; dropout is off in any case
        self.model.train(gradient_checkpointing)
        self.player = AnswerScorer(self.model)
        self._opponent_hash = ""
        self._is_opponent = False
        """Whether the weights in memory are the opponent's, without adapters."""
        self._folder: Path | None = None
        """Where the player's present weights lie; None = they are the base's."""
        self._vllm: Vllm | None = None

    # Real samples

    def real_row(self, example: TextExample) -> Row:
        """An example as a stored row of token ids.

        Raises:
            LeftOut: it cannot be used.
        """
        # With its place: equal rows are draws of their own, and so must the opponent's answers to them be
        said = json.dumps([example.where, example.prompt, example.completion, example.rejected])
        answer = self.chat.answer_ids(example.prompt, example.completion)
        row: Row = {
            "id": hashlib.sha256(said.encode()).hexdigest()[:16],
            "prompt": transcript(example.prompt),
            "prompt_ids": self.chat.prompt_ids(example.prompt),
            "tokens": answer.ids,
            "text": example.completion,
            "finish": "length" if answer.cut else "stop",
        }
        if example.rejected is not None:
            row["loser_tokens"] = self.chat.answer_ids(example.prompt, example.rejected).ids
        return row

    # The contract

    def generate(
        self, rows: list[Row], seeds: list[int], done: Callable[[int], None] = lambda samples: None
    ) -> list[Row]:
        """One answer by the opponent per row, as token ids."""
        with self._as_opponent():
            drawn = self.draw([row["prompt_ids"] for row in rows], seeds, done=done)
        return [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "prompt_ids": row["prompt_ids"],
                "tokens": answer.ids,
                "text": self.chat.text(answer.ids),
                "finish": answer.finish,
                "seed": seed,
                "sampler": self.sampler_settings,
            }
            for row, seed, answer in zip(rows, seeds, drawn, strict=True)
        ]

    @property
    def sampler_settings(self) -> str:
        """How the opponent's answers are drawn, as JSON."""
        sampler = asdict(self.generation) | {"max_length": self.settings.max_length}
        del sampler["vllm_memory_share"]  # no answer depends on it
        return json.dumps(sampler, sort_keys=True)

    def encode(self, rows: list[Row]) -> dict[str, Tensor]:
        """Prompt and answer as one row of tokens, filled up with 0 to the shard's longest, and where each ends."""
        encoded = {}
        for prefix in ("", "loser_") if "loser_tokens" in rows[0] else ("",):
            whole = [torch.tensor(row["prompt_ids"] + row[f"{prefix}tokens"], dtype=torch.int32) for row in rows]
            encoded[f"{prefix}tokens"] = pad_sequence(whole, batch_first=True)
            encoded[f"{prefix}begin"] = torch.tensor([len(row["prompt_ids"]) for row in rows], dtype=torch.int32)
            encoded[f"{prefix}end"] = torch.tensor([len(ids) for ids in whole], dtype=torch.int32)
        return encoded

    def encoder_hash(self) -> str:
        """A constant: the rows hold the tokens, and nothing else decides how they are laid out."""
        return key_of(encoder="tokens")

    def opponent_scores(self, tensors: dict[str, Tensor]) -> Tensor:
        """log p(answer | prompt) of each row, (rows,) nats, by the forward pass that trains, not by the sampler."""
        with self._as_opponent():
            return self._score_all(tensors)

    def opponent_hash(self) -> str:
        """Hash of the adapter that is the opponent; without adapters, of the weights as they were at `promote`."""
        if self.settings.use_lora:
            return tensors_hash(get_peft_model_state_dict(self.model, adapter_name=OPPONENT))
        return self._opponent_hash

    @torch.no_grad()
    def distance(self, weights: Iterable[Tensor] | None = None) -> float | None:
        """Relative, of the adapters; the weights of an opponent without one are not in memory."""
        if not self.settings.use_lora:
            return None
        player, opponent = (get_peft_model_state_dict(self.model, adapter_name=name) for name in (PLAYER, OPPONENT))
        return relative_distance((player[name], tensor) for name, tensor in opponent.items())

    def player_hash(self) -> str:
        """Hash of the weights that are trained, as they are now."""
        if self.settings.use_lora:
            return tensors_hash(get_peft_model_state_dict(self.model, adapter_name=PLAYER))
        return weights_hash(self.model)

    def scores(self, player: Callable[..., Any], batch: Batch) -> ScoredBatch:
        """The player's scores of both sides in one batch, beside the opponent's that were kept."""
        if torch.is_grad_enabled():  # from here on the weights are the player's, and need the memory
            self._is_opponent = False
            self._forget_vllm()
        found = self._score(player, batch.sides)
        length = sent(batch.real["end"] - batch.real["begin"], found.device) / (self.generation.max_new_tokens + 1)
        opponent_real = sent(batch.real["opponent_score"], found.device)
        if not batch.generated:
            return ScoredBatch(PairScores.of_real(found, opponent_real), length)
        real, generated = found.split([len(batch.ids), len(found) - len(batch.ids)])
        copies = len(generated) // len(real)
        _check_same_prompts(batch, copies)
        return ScoredBatch(
            PairScores(
                real.repeat_interleave(copies),
                generated,
                opponent_real.repeat_interleave(copies),
                sent(batch.generated["opponent_score"], found.device),
            ),
            length.repeat_interleave(copies),
        )

    def promote(self) -> None:
        """The player's weights become the opponent's: a copy of the adapter, or else these very weights until they
        change."""
        if self.settings.use_lora:
            player = get_peft_model_state_dict(self.model, adapter_name=PLAYER)
            copied = {name: tensor.clone() for name, tensor in player.items()}
            set_peft_model_state_dict(self.model, copied, adapter_name=OPPONENT)
        else:
            self._opponent_hash = weights_hash(self.model)
            self._is_opponent = True
        self._forget_vllm()

    def save(self, directory: Path, *, prove: bool = True) -> list[Path]:
        """Write `model/` as AutoModelForCausalLM.from_pretrained reads it, or `adapter/` as PEFT does; with the
        tokenizer."""
        target = directory / (ADAPTER if self.settings.use_lora else MODEL)
        if self.accelerator.is_main_process:
            write_folder(target, self._write)
            if prove:
                self._prove(target)
        if directory.name.startswith("round-"):
            self._folder = target
        return [target]

    def _write(self, folder: Path) -> None:
        if self.settings.use_lora:
            # It lies on the base as it was given, with the adapters that were merged into it
            config = copy.copy(self.model.peft_config[PLAYER])
            config.base_model_name_or_path, config.revision = self.base.name, self.base.revision
            config.save_pretrained(folder)
            weights = get_peft_model_state_dict(self.model, adapter_name=PLAYER)
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            self.model.save_pretrained(folder)
        self._untouched.save_pretrained(folder)

    def restore(self, directory: Path | None) -> None:
        """Load what `save` wrote below `directory`, or the base, into the player's parameters in place."""
        self._is_opponent = False
        self._forget_vllm()
        if self.settings.use_lora:
            weights = self._fresh if directory is None else load_peft_weights(str(directory / ADAPTER), device="cpu")
            set_peft_model_state_dict(self.model, weights, adapter_name=PLAYER)
            self._folder = directory / ADAPTER if directory is not None else None
            return
        self._folder = directory / MODEL if directory is not None else None
        self.model.load_state_dict(self._load(self._folder).state_dict())

    # Answers

    def draw(
        self, prompts: list[list[int]], seeds: list[int], done: Callable[[int], None] = lambda answers: None
    ) -> list[Drawn]:
        """One answer per prompt and seed by the weights in memory."""
        if self.generation.engine == "vllm":
            self._vllm = self._vllm or Vllm(
                self.base.name if self.settings.use_lora or self._folder is None else self._folder,
                self.generation,
                end_ids=self.chat.end_ids,
                max_length=self.settings.max_length,
                precision=self.accelerator.mixed_precision,
                device=self.accelerator.device.type,
                adapter=self._folder if self.settings.use_lora else None,
                rank=self.settings.rank,
                hub=self.base.options(),
            )
            drawn = self._vllm.draw(prompts, seeds)
            done(len(drawn))
            return drawn
        trained = self.model.training
        self.model.eval()  # the cache is off while activations are recomputed
        drawn = draw_answers(
            language_model(self.model),
            prompts,
            seeds,
            self.generation,
            end_ids=self.chat.end_ids,
            pad_id=self.chat.pad_id,
            max_length=self.settings.max_length,
            autocast=self.accelerator.autocast,
            done=done,
        )
        self.model.train(trained)
        return drawn

    def log_likelihood(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """The player's log p(answer | prompt) of each pair of token ids, in nats."""
        rows = [{"prompt_ids": prompt, "tokens": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        return self._score_all(self.encode(rows)).tolist()

    # Parts

    def _forget_vllm(self) -> None:
        """Its engine ends, and what it held of the memory is free."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
            gc.collect()

    @torch.no_grad()
    def _score_all(self, tensors: dict[str, Tensor]) -> Tensor:
        """Scores of encoded rows by the active weights, (rows,) on the CPU; rows of like length share a batch."""
        order = torch.argsort(tensors["end"], descending=True)
        scores = torch.zeros(len(order))
        for places in order.split(self.settings.score_batch_size):
            part = {name: tensor[places] for name, tensor in tensors.items()}
            scores[places] = self._score(self.player, [part]).cpu()
        return scores

    def _score(self, model: Callable[..., Tensor], sides: list[dict[str, Tensor]]) -> Tensor:
        """Scores of the rows of all sides, one after the other."""
        tokens = [row[:end] for side in sides for row, end in zip(side["tokens"], side["end"].tolist(), strict=True)]
        ids, device = pad_sequence(tokens, batch_first=True), self.accelerator.device
        begin, end = (torch.cat([side[name] for side in sides])[:, None] for name in ("begin", "end"))
        column = torch.arange(ids.shape[1])[None]
        places = places_of((column >= begin) & (column < end))
        with self.accelerator.autocast():
            return model(sent(ids, device), sent(places, device))

    @contextmanager
    def _as_opponent(self) -> Iterator[None]:
        """The opponent's adapter active; without adapters, the certainty that the weights are the opponent's."""
        if not self.settings.use_lora:
            assert self._is_opponent, "the weights in memory are not the opponent's any more"
            yield
            return
        self.model.set_adapter(OPPONENT)
        try:
            yield
        finally:
            self.model.set_adapter(PLAYER)

    def _load(self, folder: Path | None) -> PreTrainedModel:
        """A fresh copy of saved weights, or of the base's, on the CPU."""
        if folder is None:
            return load_model(self.base)
        return load_whole(AutoModelForCausalLM, folder, where=str(folder), local_files_only=True)

    def _prove(self, path: Path) -> None:
        """Load what was saved afresh: it must score what the player scores, and answer."""
        fresh = self._load(None) if self.settings.use_lora else self._load(path)
        if self.settings.use_lora:
            fresh = PeftModel.from_pretrained(fresh, path)
        fresh = fresh.to(self.accelerator.device).eval()
        ids = torch.tensor([[place % fresh.config.get_text_config().vocab_size for place in range(1, 9)]])
        rows = [{"tokens": ids.int(), "begin": torch.tensor([2]), "end": torch.tensor([8])}]
        with torch.no_grad():
            ours, theirs = self._score(self.player, rows), self._score(AnswerScorer(fresh), rows)
        check_prediction(ours, path)
        difference = (ours - theirs).abs().item()
        tolerance = self.start_tolerance[self.accelerator.mixed_precision] * max(1.0, ours.abs().item())
        assert difference <= tolerance, f"{path}: loaded afresh it scores something else (by {difference:.3g} nats)"


def _check_same_prompts(batch: Batch, copies: int) -> None:
    """Assert that the generated answers of each pair answer its prompt: rows that slip would train on nonsense."""
    begin = batch.real["begin"].repeat_interleave(copies)
    longest = int(begin.max())
    prompts = batch.real["tokens"][:, :longest].repeat_interleave(copies, dim=0)
    asked = torch.arange(longest) < begin[:, None]
    same = torch.equal(begin, batch.generated["begin"]) and torch.equal(
        prompts * asked, batch.generated["tokens"][:, :longest] * asked
    )
    assert same, f"generated answers to other prompts than their pairs' ({', '.join(batch.ids[:4])}, ...)"


def transcript(prompt: str | list[Message]) -> str:
    """A prompt as one text for people: the question where there is only one, else all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _without_dropout(model: nn.Module) -> None:
    """Dropout would make the two models' scores differ at step 0, in training mode too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _with_adapters(model: PreTrainedModel, settings: LanguageModelSettings) -> PeftModel:
    """The model with two adapters, of which the player's is active and trained. Both begin as nothing."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=settings.lora_target_modules or "all-linear",
    )
    try:
        model = get_peft_model(model, config, adapter_name=PLAYER)
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {str(error).splitlines()[0]}") from error
    model.add_adapter(OPPONENT, config)
    model.set_adapter(PLAYER)
    return model
