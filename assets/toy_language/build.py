"""Build the toy language's tokenizer, base model and data. On one CPU core, a few minutes:

    python assets/toy_language/build.py --output_dir assets/toy_language

In order: `data/train.jsonl` and `data/held_out.jsonl`, conversations in the data dialect; `base/`, a byte-pair
tokenizer with a chat template and a small Llama trained by maximum likelihood on the neighbour dialect; `hashes.json`.
The base speaks the language, but with other probabilities than the data: what is left to learn is known exactly, and
printed. Data and tokenizer come out the same everywhere, the weights on machines that round alike.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the model is too small for more

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError

HERE = Path(__file__).resolve().parent
TOKENS = 64
"""Positions of the model: prompt, answer and special tokens."""
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
# Every turn opens with its own special token: no merge crosses from the prompt into the answer, so a conversation's
# tokens begin with those of its prompt, and the answer needs no leading space.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' + message['role'] + '; known: system, user, assistant') -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def _load(name: str):
    """A module beside this file, by its path: the toy language is no package."""
    spec = importlib.util.spec_from_file_location(f"toy_language_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


exact = _load("exact")
language = exact.language


# Data


def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer, as chat templates take them."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, per_prompt: int, rng: random.Random) -> None:
    """Conversations in the data dialect, as many for each prompt, in random order, one {"messages": [...]} a line."""
    rows = [conversation(prompt, language.draw(prompt, rng)) for prompt in language.PROMPTS for _ in range(per_prompt)]
    rng.shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


# Model


def new_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair tokens of the language's sentences; frequent words are one token, rare ones several."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz,.?!'"),
        show_progress=False,
    )  # fmt: skip
    pairs = [(prompt, answer) for prompt in language.PROMPTS for answer in language.answers(prompt)]
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], chat_template=CHAT_TEMPLATE,
        model_max_length=TOKENS, model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 0.1 M parameters."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS, tie_word_embeddings=True, use_cache=True, **ids,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(**ids)
    return model


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], answers: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Conversations, padded on the right.

    Returns:
        ids (rows, length), attention (rows, length) and is_answer (rows, length): 1 where a token belongs to the
        answer or is its end token.
    """
    starts = {
        prompt: len(
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True).input_ids
        )
        for prompt in dict.fromkeys(prompts)
    }
    texts = tokenizer.apply_chat_template(
        [conversation(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)], tokenize=False
    )
    batch = tokenizer(texts, padding="longest", padding_side="right", add_special_tokens=False, return_tensors="pt")
    start = torch.tensor([starts[prompt] for prompt in prompts])
    is_answer = (torch.arange(batch.input_ids.shape[1]) >= start[:, None]) * batch.attention_mask
    return batch.input_ids, batch.attention_mask, is_answer


def answer_log_likelihood(model: LlamaForCausalLM, ids: Tensor, attention: Tensor, is_answer: Tensor) -> Tensor:
    """log p(answer and end token | prompt) in nats, (rows,)."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
    log_p = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (log_p * is_answer[:, 1:]).sum(1)


def log_likelihood_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int = 512):
    """What `exact.kl` asks: (prompts, completions) -> log p(completion and end token | prompt) in nats."""

    @torch.no_grad()
    def log_likelihood(prompts: list[str], completions: list[str]) -> list[float]:
        rows = tokenize(tokenizer, prompts, completions)
        order = rows[1].sum(1).argsort()  # by length: little padding in a batch
        values = torch.empty(len(prompts))
        for part in order.split(batch_size):
            length = int(rows[1][part].sum(1).max())
            values[part] = answer_log_likelihood(model, *(tensor[part, :length] for tensor in rows))
        return values.tolist()

    return log_likelihood


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Fit the model in place to the neighbour dialect: fresh answers every step, to prompts drawn evenly."""
    rng = np.random.default_rng((args.seed, 3))
    # Every answer is tokenized once; a fresh sample is then a row of these.
    known = [language.answers(prompt, "neighbour") for prompt in language.PROMPTS]
    rows = tokenize(
        tokenizer,
        [prompt for prompt, answers in zip(language.PROMPTS, known, strict=True) for _ in answers],
        [answer for answers in known for answer in answers],
    )
    probabilities = np.concatenate([list(answers.values()) for answers in known])
    cumulative = np.cumsum(probabilities / probabilities.sum())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
    model.train()
    for step in (progress := tqdm(range(args.steps), desc="base", mininterval=1 if sys.stderr.isatty() else 20)):
        drawn = np.searchsorted(cumulative, rng.random(args.batch_size), side="right").clip(max=len(cumulative) - 1)
        index = torch.from_numpy(drawn)
        length = int(rows[1][index].sum(1).max())
        loss = -answer_log_likelihood(model, *(tensor[index, :length] for tensor in rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(nats_per_answer=f"{loss.item():.3f}")
    model.eval()


# The build


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file the build wrote, by its path in the folder."""
    files = [path for name in ("data", "base") for path in sorted((folder / name).rglob("*")) if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")


def spread(values: dict[str, float] | list[float]) -> str:
    """Mean, smallest and largest of one value per prompt."""
    values = list(values.values()) if isinstance(values, dict) else values
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f} by prompt)"


def log_likelihood_of_neighbour(prompts: list[str], completions: list[str]) -> list[float]:
    """log p(completion | prompt) of the neighbour dialect itself, in nats."""
    known = {prompt: language.answers(prompt, "neighbour") for prompt in set(prompts)}
    return [float(np.log(known[prompt][answer])) for prompt, answer in zip(prompts, completions, strict=True)]


def report(folder: Path) -> None:
    """Print what is known exactly of the language and of the saved base."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    data = {prompt: language.answers(prompt) for prompt in language.PROMPTS}
    entropies = [-sum(p * np.log(p) for p in answers.values()) for answers in data.values()]
    neighbour = exact.kl(log_likelihood_of_neighbour)
    log_likelihood = log_likelihood_of(model, tokenizer)
    lengths = {answer: len(tokenizer(answer).input_ids) + 1 for answers in data.values() for answer in answers}
    mean_length = np.mean([sum(p * lengths[answer] for answer, p in answers.items()) for answers in data.values()])
    start = time.perf_counter()
    of_base = exact.kl(log_likelihood)
    print(f"entropy of the data, nats: {spread(entropies)}")
    print(f"KL(data || neighbour), nats: {spread(neighbour)}")
    print(f"KL(data || base), nats: {spread(of_base)}, in {time.perf_counter() - start:.1f} s")
    print(f"KL(neighbour || base), nats: {spread(exact.kl(log_likelihood, dialect='neighbour'))}")
    print(f"base: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    print(f"tokens of an answer with its end token: {mean_length:.2f} on average, at most {max(lengths.values())}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=500, help="rows of train.jsonl per prompt")
    parser.add_argument("--held_out_rows", type=int, default=20, help="rows of held_out.jsonl per prompt")
    parser.add_argument("--vocabulary", type=int, default=176, help="tokens, the special ones included")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=128, help="answers per step")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    args = parser.parse_args(argv)
    if args.output_dir.resolve() != HERE:
        try:
            take_folder(args.output_dir, "toy language")
        except InputError as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    for name, per_prompt, stream in (("train", args.rows, 1), ("held_out", args.held_out_rows, 2)):
        write_rows(args.output_dir / "data" / f"{name}.jsonl", per_prompt, random.Random(f"{args.seed} {stream}"))
    tokenizer = new_tokenizer(args.vocabulary)
    model = new_model(tokenizer)
    train(model, tokenizer, args)
    model.save_pretrained(args.output_dir / "base")
    tokenizer.save_pretrained(args.output_dir / "base")
    write_hashes(args.output_dir)
    report(args.output_dir)


if __name__ == "__main__":
    main()
