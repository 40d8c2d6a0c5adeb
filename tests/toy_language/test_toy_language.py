"""The toy language: its probabilities, its exact judge, and what the build wrote beside them."""

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_diffusion.evaluation.judges import Answer, load_judge
from spin_diffusion.store.folder import FORMAT, MARKER
from spin_diffusion.store.input_error import InputError

TOY_LANGUAGE = Path(__file__).resolve().parents[2] / "assets" / "toy_language"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tested_toy_language_{name}", TOY_LANGUAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build, compare = load("build"), load("compare")
exact = build.exact
language = exact.language
TWO_PROMPTS = (language.PROMPTS[0], language.PROMPTS[-1])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY_LANGUAGE / "base")


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(TOY_LANGUAGE / "base").eval()


@pytest.fixture(scope="module")
def log_q(base, tokenizer) -> dict[str, dict[str, float]]:
    """log-likelihood of every answer to two prompts under the base, with the end token: prompt -> answer -> nats."""
    log_likelihood = build.log_likelihood_of(base, tokenizer)
    return {
        prompt: dict(zip(texts, log_likelihood([prompt] * len(texts), texts), strict=True))
        for prompt in TWO_PROMPTS
        for texts in [list(language.answers(prompt))]
    }


def perfect(dialect: str):
    """The log-likelihood of a model that is the dialect."""

    def log_likelihood(prompts: list[str], completions: list[str]) -> list[float]:
        return [
            math.log(language._answers(prompt, dialect)[completion])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    return log_likelihood


def rows(name: str) -> list[tuple[str, str]]:
    """Prompt and answer of each row."""
    found = []
    for line in (TOY_LANGUAGE / "data" / f"{name}.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


@pytest.mark.parametrize("dialect", language.DIALECTS)
def test_probabilities_sum_to_one_over_the_same_support(dialect):
    for prompt in language.PROMPTS:
        probabilities = language.answers(prompt, dialect)
        assert abs(math.fsum(probabilities.values()) - 1) < 1e-12
        assert min(probabilities.values()) > 0
        assert probabilities.keys() == language.answers(prompt).keys()
        assert 300 <= len(probabilities) <= 1000


def test_prompts_and_dialects_are_told_apart():
    known = [tuple(language.answers(prompt, d).values()) for prompt in language.PROMPTS for d in language.DIALECTS]
    assert len(language.PROMPTS) == 24
    assert len(set(known)) == len(known)


def test_what_answers_returns_can_be_changed_without_harm():
    language.answers(language.PROMPTS[0]).clear()
    assert language.answers(language.PROMPTS[0])


def test_verb_and_ending_agree_with_the_subject():
    for prompt, answer in itertools.chain(*([(p, a) for a in language.answers(p)] for p in language.PROMPTS)):
        is_plural = re.search(r"\b(most|two)\b", answer) is not None
        animal = prompt.split()[-1]
        verb = answer.removesuffix(".").split(language.PLURALS[animal] if is_plural else animal)[1].split()[0]
        assert verb.endswith("s") != is_plural, answer
        assert not re.search(r"\b(it|its)\b" if is_plural else r"\b(they|their)\b", answer), answer


@pytest.mark.parametrize("dialect", language.DIALECTS)
@pytest.mark.parametrize("new_rng", [random.Random, np.random.default_rng])
def test_draws_are_as_frequent_as_stated(dialect, new_rng):
    prompt, number = language.PROMPTS[5], 20000
    rng = new_rng(0)
    drawn = Counter(language.draw(prompt, rng, dialect) for _ in range(number))
    probabilities = language.answers(prompt, dialect)
    assert drawn.keys() <= probabilities.keys()
    frequent = [answer for answer, p in probabilities.items() if p * number >= 10]
    observed = [drawn[answer] for answer in frequent]
    expected = [probabilities[answer] * number for answer in frequent]
    # What is rarer than the chi-square approximation allows is one class.
    observed.append(number - sum(observed))
    expected.append(number - sum(expected))
    assert chisquare(observed, expected).pvalue > 1e-3
    others = language.answers(prompt, next(d for d in language.DIALECTS if d != dialect))
    of_other = [others[answer] * number for answer in frequent]
    assert chisquare(observed, [*of_other, number - sum(of_other)]).pvalue < 1e-9


def test_an_unknown_prompt_or_dialect_is_an_error():
    with pytest.raises(ValueError, match="not a prompt of the toy language"):
        language.answers("tell me about a cat")
    with pytest.raises(ValueError, match="no dialect 'slang'"):
        language.draw(language.PROMPTS[0], random.Random(0), "slang")


@pytest.mark.parametrize("prompt", TWO_PROMPTS)
def test_kl_is_what_the_plain_formula_gives_token_by_token(prompt, base, tokenizer, log_q):
    # Answers of one length make a batch without padding; the conversation is put together by hand.
    before = [tokenizer.bos_token_id, *ids_of(tokenizer, "<|user|>", prompt), *ids_of(tokenizer, "<|assistant|>", "")]
    after = {a: [*tokenizer.encode(a), tokenizer.eos_token_id] for a in language.answers(prompt)}
    total = 0.0
    for _, group in itertools.groupby(sorted(after, key=lambda a: len(after[a])), key=lambda a: len(after[a])):
        texts = list(group)
        ids = torch.tensor([before + after[text] for text in texts])
        with torch.no_grad():
            log_p = base(input_ids=ids).logits.double().log_softmax(-1)
        for row, text in enumerate(texts):
            log_model = sum(
                log_p[row, position - 1, ids[row, position]].item() for position in range(len(before), ids.shape[1])
            )
            p = language.answers(prompt)[text]
            total += p * (math.log(p) - log_model)
    found = exact.kl(lambda prompts, texts: [log_q[q][a] for q, a in zip(prompts, texts, strict=True)], [prompt])
    assert found == pytest.approx({prompt: total}, abs=1e-4)


def ids_of(tokenizer, role: str, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(role), *tokenizer.encode(text, add_special_tokens=False)]


def test_a_perfect_model_has_no_divergence():
    for dialect in language.DIALECTS:
        assert max(map(abs, exact.kl(perfect(dialect), dialect=dialect).values())) < 1e-12
    apart = exact.kl(perfect("neighbour"))
    assert list(apart) == list(language.PROMPTS)
    assert min(apart.values()) > 0.5
    assert 1 < np.mean(list(apart.values())) < 3


@pytest.mark.parametrize("prompt", TWO_PROMPTS)
def test_the_base_speaks_the_neighbour_dialect_and_ends_its_answers(prompt, log_q):
    mass = math.fsum(math.exp(value) for value in log_q[prompt].values())
    # Without the end token the answers' beginnings would count as well; more than 1 is a wrong sum.
    assert 0.98 < mass <= 1 + 1e-6
    divergence = {
        dialect: exact.kl(lambda prompts, texts: [log_q[prompt][a] for a in texts], [prompt], dialect)[prompt]
        for dialect in language.DIALECTS
    }
    assert divergence["neighbour"] < 0.1
    assert 1 < divergence["data"] < 4


def test_the_end_token_is_part_of_an_answer(base, tokenizer):
    prompt = language.PROMPTS[0]
    beginning, answer = build.log_likelihood_of(base, tokenizer)([prompt] * 2, ["the", "the cat sleeps."])
    assert beginning < -6  # many answers begin so, none ends so
    assert answer > beginning
    ids, attention, is_answer = build.tokenize(tokenizer, [prompt], ["the cat sleeps."])
    assert tokenizer.decode(ids[is_answer.bool()]) == "the cat sleeps.</s>"
    assert attention.all()


def answer_to(prompt: str, text: str = "a cat.") -> Answer:
    return Answer(id=prompt, k=0, prompt=prompt, text=text, reference=None, finish="stop", num_tokens=3)


def test_the_judge_gives_minus_the_divergence_of_each_answers_prompt():
    asked: list[str] = []

    def log_likelihood(prompts: list[str], completions: list[str]) -> list[float]:
        asked.extend(prompts)
        return perfect("neighbour")(prompts, completions)

    judge = load_judge(str(TOY_LANGUAGE / "exact.py"), "cpu")
    first, second = TWO_PROMPTS
    scores = judge([answer_to(first), answer_to(second), answer_to(first, "")], log_likelihood)
    expected = exact.kl(perfect("neighbour"), [first, second])
    assert scores == pytest.approx([-expected[first], -expected[second], -expected[first]], abs=1e-12)
    assert len(asked) == len(language.answers(first)) + len(language.answers(second))  # each prompt once
    assert (judge.name, judge.about.role) == ("exact", "truth")


def test_the_judge_refuses_other_prompts_in_one_line():
    judge = load_judge(str(TOY_LANGUAGE / "exact.py"), "cpu")
    with pytest.raises(InputError, match="'tell me a joke' is not a prompt of the toy language") as caught:
        judge([answer_to("tell me a joke")], perfect("data"))
    assert "\n" not in str(caught.value)


def test_the_tokenizer_returns_every_sentence(tokenizer):
    texts = sorted({*language.PROMPTS, *(a for prompt in language.PROMPTS for a in language.answers(prompt))})
    ids = tokenizer(texts).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.unk_token_id not in itertools.chain.from_iterable(ids)
    assert len(tokenizer) <= 200
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_a_conversation_starts_with_its_prompts_tokens_and_ends_with_the_end_token(base, tokenizer):
    for prompt in language.PROMPTS:
        for answer in list(language.answers(prompt))[::50]:
            messages = build.conversation(prompt, answer)
            for system in ([], [{"role": "system", "content": "be brief."}]):
                whole = tokenizer.apply_chat_template(system + messages).input_ids
                before = tokenizer.apply_chat_template(system + messages[:1], add_generation_prompt=True).input_ids
                assert whole[: len(before)] == before
                assert tokenizer.decode(whole[len(before) :]) == answer + tokenizer.eos_token
                assert len(whole) <= base.config.max_position_embeddings
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}])


def test_the_base_answers_in_sentences_of_the_language(base, tokenizer):
    prompt = language.PROMPTS[3]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    out = base.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=32, num_return_sequences=64)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert sum(text in language.answers(prompt) for text in texts) >= 60
    config = json.loads((TOY_LANGUAGE / "base" / "generation_config.json").read_text())
    assert set(config) == {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert config["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("name, per_prompt", [("train", 500), ("held_out", 20)])
def test_the_data_is_drawn_from_the_data_dialect(name, per_prompt, tmp_path):
    found = rows(name)
    assert Counter(prompt for prompt, _ in found) == dict.fromkeys(language.PROMPTS, per_prompt)
    known = {prompt: language.answers(prompt) for prompt in language.PROMPTS}
    surprise = -np.mean([math.log(known[prompt][answer]) for prompt, answer in found])  # KeyError = not of the language
    entropy = np.mean([-sum(p * math.log(p) for p in probabilities.values()) for probabilities in known.values()])
    assert surprise == pytest.approx(entropy, abs=5 * 1.4 / math.sqrt(len(found)))
    stream = 1 if name == "train" else 2
    build.write_rows(tmp_path / "rows.jsonl", per_prompt, random.Random(f"0 {stream}"))
    assert (tmp_path / "rows.jsonl").read_bytes() == (TOY_LANGUAGE / "data" / f"{name}.jsonl").read_bytes()


def test_hashes_match_the_files():
    hashes = json.loads((TOY_LANGUAGE / "hashes.json").read_text())
    files = [path for name in ("data", "base") for path in (TOY_LANGUAGE / name).rglob("*") if path.is_file()]
    found = {p.relative_to(TOY_LANGUAGE).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert found == hashes
    assert sum(p.stat().st_size for p in files if p.parent.name == "base") < 2_000_000
    assert sum(p.stat().st_size for p in files if p.parent.name == "data") < 3_000_000


def test_the_comparison_s_runs_are_played_by_its_workers_in_its_folder(tmp_path) -> None:
    args = ["--rounds", "1", "--seeds", "0", "--real_answers", "40", "--epochs", "1", "--workers", "1"]
    for method, data in itertools.product(compare.METHODS, compare.DATA):
        folder = compare.folder_of(method, data, 0, argparse.Namespace(output_dir=tmp_path / "out"))
        if (method, data) != ("SFT", "fixed"):
            folder.mkdir(parents=True)
            (folder / "kl.json").write_text("[2.0, 1.0]")
    (tmp_path / "out" / MARKER).write_text(json.dumps({"program": "comparison on the toy language", "format": FORMAT}))
    script = [sys.executable, str(TOY_LANGUAGE / "compare.py"), "--output_dir", str(tmp_path / "out"), *args]
    done = subprocess.run(script, capture_output=True, text=True, cwd=TOY_LANGUAGE.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = json.loads((tmp_path / "out/fixed-sft-0/kl.json").read_text())
    assert 0 < after < before
    assert (tmp_path / "out/comparison.png").is_file() and "| SFT |" in done.stdout


def test_the_known_limits_stand_beside_the_comparison(tmp_path, capsys, monkeypatch) -> None:
    class Now(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: object) -> None:
            super().__init__(1)

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(compare, "play", lambda method, data, seed, args: [2.0, 1.0 + 0.1 * seed])
    assert compare.main(["--output_dir", str(tmp_path), "--rounds", "1", "--seeds", "0", "1"]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "comparison.md").read_text()):
        table, limits = text.split("What this does not show:")
        assert "| SPACE | 2.000 | 1.049 |" in table
        for said in ("SPIN with beta 1 is as stable", "fixed set of real answers is over-fitted by every method",
                     "small, exactly known language"):  # fmt: skip
            assert said in limits, said
