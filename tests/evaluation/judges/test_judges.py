import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from spin_diffusion.evaluation.judges import Judge, load_judge
from spin_diffusion.evaluation.words import repeated_share, words
from spin_diffusion.store.input_error import InputError
from tests.evaluation.made_up_answers import WORDS, answer, sentence

TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}</s>"
SPECIAL = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>"]


def no_model(prompts: list[str], completions: list[str]) -> list[float]:
    raise AssertionError("this judge does not read the model")


def write_judge(folder: Path, returned: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"def load(device):\n    return lambda answers, log_likelihood: {returned}\n")
    return str(path)


# What every judge must do


def test_a_judge_is_found_by_its_name_and_by_its_file(tmp_path: Path) -> None:
    judge = load_judge("length", "cpu")
    assert judge.about.role == "drift" and isinstance(judge.score, Judge)
    assert judge([answer("a b c"), answer("a")], no_model) == [3.0, 1.0]
    mine = load_judge(write_judge(tmp_path, "[len(a.text) for a in answers]"), "cpu")
    assert mine.name == "mine" and mine([answer("four")], no_model) == [4.0]
    with pytest.raises(InputError, match="no 'lenght'.*did you mean length"):
        load_judge("lenght", "cpu")
    assert judge([], no_model) == []


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "a list of 2 numbers, got 1 of them"),
        ("(1.0, 2.0)", "a list of 2 numbers, got tuple"),
        ("[None, 1.0]", "must return numbers, got NoneType"),
        ("[1.0, float('nan')]", "mine returned nan for the prompt 'prompt 7'"),
        ("[-float('inf'), 0.0]", "mine returned -inf for the prompt 'prompt 0'"),
    ],
)
def test_what_a_judge_returns_is_checked(tmp_path: Path, returned: str, message: str) -> None:
    judge = load_judge(write_judge(tmp_path, returned), "cpu")
    with pytest.raises(InputError, match=message):
        judge([answer("a"), answer("b", "7")], no_model)


# Those without weights


def test_the_log_likelihood_is_asked_once_for_each_real_answer() -> None:
    asked = []

    def log_likelihood(prompts: list[str], completions: list[str]) -> list[float]:
        asked.append(list(zip(prompts, completions, strict=True)))
        return [-float(len(text)) for text in completions]

    answers = [answer("x", id_, k, reference="r" * (1 + int(id_))) for id_ in "01" for k in (0, 1)]
    judge = load_judge("log_likelihood", "cpu")
    assert judge(answers, log_likelihood) == [-1.0, -1.0, -2.0, -2.0]
    assert asked == [[("prompt 0", "r"), ("prompt 1", "rr")]]
    with pytest.raises(InputError, match="the prompt 3 has no real answer"):
        judge([answer("x", "3")], log_likelihood)
    with pytest.raises(InputError, match="log_likelihood returned -inf"):
        judge(answers, lambda prompts, completions: [-math.inf] * len(prompts))
    with pytest.raises(ValueError, match="1 log-likelihoods do not match 2"):
        judge(answers, lambda prompts, completions: [0.0])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e", 0.0), ("a b c a b c", 0.25), ("A b, c. a b, c.", 3 / 8), ("no no no no no", 2 / 3), ("a b", 0.0),
        ("", 0.0), ("\u732b\u304c\u597d\u304d\u732b\u304c\u597d\u304d", 2 / 6),
    ],
)  # fmt: skip
def test_repeated_runs_of_three_words_are_counted(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)
    assert load_judge("distinct", "cpu")([answer(text)], no_model) == [pytest.approx(1 - share)]


def test_words_of_every_script_are_words() -> None:
    assert words("Don't STOP!") == ["don", "'", "t", "stop", "!"]
    mixed = ["abc", "\u65e5", "\u672c", "\u0645\u0631\u062d\u0628\u0627"]
    assert words(mixed[0] + mixed[1] + mixed[2] + " " + mixed[3]) == mixed


# The reward model


def write_reward_model(folder: Path, template: bool = True, num_labels: int = 1, pad: int | None = 0, **config) -> Path:
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As released tokenizers do: the template must not get special tokens twice
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", "</s> $A $B", [("</s>", vocabulary["</s>"])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    fast.chat_template = TEMPLATE if template else None
    fast.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "vocab_size": len(vocabulary), "max_position_embeddings": 64, "num_labels": num_labels,
                 "pad_token_id": pad, "bos_token_id": None, "eos_token_id": 2}  # fmt: skip
        model = LlamaForSequenceClassification(LlamaConfig(**(sizes | config)))
        model.score.weight.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward"))


def some_answers() -> list:
    import random

    return [
        answer(sentence(random.Random(i), 1 + 7 * i % 23), str(i), prompt=sentence(random.Random(-i - 1), 3 + i % 5))
        for i in range(37)
    ]


def test_the_reward_depends_on_neither_order_nor_batch(reward_dir: Path) -> None:
    judge, answers = load_judge(f"reward_model={reward_dir}", "cpu"), some_answers()
    scores = judge(answers, no_model)
    alone = [judge([one], no_model)[0] for one in answers]
    backwards = judge(answers[::-1], no_model)[::-1]
    assert scores == pytest.approx(alone, abs=1e-5) and scores == pytest.approx(backwards, abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 30, "different answers have different rewards"
    assert set(judge.checkpoint) == {"model.safetensors"} and len(judge.checkpoint["model.safetensors"]) == 64
    assert judge.source == str(reward_dir)


def test_the_reward_is_the_logit_of_the_chat(reward_dir: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(reward_dir).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reward_dir)
    words = "<user> the fox <assistant> a dog </s>".split()
    tokens = tokenizer(words, is_split_into_words=True, add_special_tokens=False, return_tensors="pt")
    assert tokenizer.unk_token_id not in tokens["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=tokens["input_ids"]).logits.item()
    found = load_judge(f"reward_model={reward_dir}", "cpu")([answer("a dog", prompt="the fox")], no_model)
    assert found == [pytest.approx(expected, abs=1e-5)]


def test_without_a_template_or_a_token_for_padding_it_works_as_well(tmp_path: Path) -> None:
    pairs = load_judge(f"reward_model={write_reward_model(tmp_path / 'pairs', template=False)}", "cpu")
    unpadded = load_judge(f"reward_model={write_reward_model(tmp_path / 'unpadded', pad=None)}", "cpu")
    for judge in (pairs, unpadded):
        scores = judge(some_answers(), no_model)
        assert scores == pytest.approx([judge([one], no_model)[0] for one in some_answers()], abs=1e-5)


def test_what_is_too_long_is_cut_in_front_and_counted(reward_dir: Path) -> None:
    judge = load_judge(f"reward_model={reward_dir}", "cpu")
    short, long = answer("a dog", prompt="the fox"), answer("a dog", prompt="sun " * 100 + "the fox")
    assert judge.truncated([short, long]) == [False, True]
    other = answer("a bird", prompt=long.prompt)
    assert judge([long], no_model) != judge([other], no_model), "the answer is read to its end"


def test_a_reward_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="score.weight has numbers that are not finite"):
        load_judge(f"reward_model={folder}", "cpu")


def test_what_is_no_reward_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    two = write_reward_model(tmp_path / "two", num_labels=2)
    headless = write_reward_model(tmp_path / "headless")
    LlamaForCausalLM(LlamaForSequenceClassification.from_pretrained(headless).config).save_pretrained(headless)
    pickled = write_reward_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    broken = write_reward_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    quantised, adapter = write_reward_model(tmp_path / "quantised"), write_reward_model(tmp_path / "adapter")
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(config))
    (adapter / "adapter_config.json").write_text("{}")
    for spec, message in (
        ("reward_model", "which reward model"),
        (f"reward_model={tmp_path / 'gone'}", "gone is no folder"),
        ("reward_model=no/such", "'no/such' is no folder, and cannot be had from the hub"),
        (f"reward_model={tmp_path / 'empty'}", "has no .safetensors file"),
        (f"reward_model={pickled}", "has no .safetensors file"),
        (f"reward_model={two}", "has 2 logits, and a reward model has one"),
        (f"reward_model={headless}", "its weights lack score.weight"),
        (f"reward_model={quantised}", "its weights are quantised"),
        (f"reward_model={adapter}", "is an adapter"),
        (f"reward_model={broken}", "no sequence classifier that transformers can load"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            load_judge(spec, "cpu")
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
