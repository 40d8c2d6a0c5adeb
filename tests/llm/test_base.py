"""A base is what its files say: adapters are merged into it, and what is not whole is refused in one line."""

import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from spin_diffusion.llm.base import LanguageBase, load_language_model
from spin_diffusion.store.files import read_json, weights_hash
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.cli.test_language_script import changed_base, play, refused, settings  # noqa: F401
from tests.llm.playing import LANGUAGE, examples, make_game

BASE = LANGUAGE / "base"


def adapter(folder: Path, config: LoraConfig | None = None, below: Path = BASE, seed: int = 0) -> Path:
    """An adapter as supervised fine-tuning leaves it, with the base's tokenizer; it changes every answer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
        for name, weights in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weights.data += torch.randn_like(weights) * 0.2
    model.peft_config["default"].base_model_name_or_path = str(below)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def log_p(model, prompt: list[int], answer: list[int]) -> float:
    """Written out, by a model of the libraries' own."""
    with torch.no_grad():
        found = model.eval()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(found[len(prompt) - 1 + place, id_].item() for place, id_ in enumerate(answer))


def scores(game, model) -> tuple[float, float]:
    """Of a real answer: by the game's player, and by a model that the libraries loaded."""
    row = game.real_row(examples(1)[0])
    return game.log_likelihood([row["prompt_ids"]], [row["tokens"]])[0], log_p(model, row["prompt_ids"], row["tokens"])


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "with layers of its own": {"modules_to_save": ["norm"]},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_as_base_is_played_with(kind, use_lora, tmp_path):
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | ADAPTERS[kind]))
    folder = adapter(tmp_path / "sft", config)
    with_it = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder)
    ours, right = scores(make_game(base=folder, use_lora=use_lora), with_it)
    _, without = scores(make_game(), AutoModelForCausalLM.from_pretrained(BASE))
    assert ours == pytest.approx(right, abs=1e-3) and abs(ours - without) > 0.02


def test_adapters_on_adapters_are_merged_from_below(tmp_path):
    first = adapter(tmp_path / "first")
    second = adapter(tmp_path / "second", below=first, seed=1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), first).merge_and_unload()
    ours, right = scores(make_game(base=second), PeftModel.from_pretrained(model, second))
    assert ours == pytest.approx(right, abs=1e-3)
    said = LanguageBase(str(second)).identity()
    assert [each["name"] for each in said["adapters"]] == [str(second), str(first)]
    assert said["merged_into"]["name"] == str(BASE)
    assert said["adapters"][1]["sha256"] == file_hash(first / "adapter_model.safetensors")


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "peft"])
def test_a_run_from_an_adapter_says_what_it_was_made_of_and_how_to_load_it(
    use_lora, settings, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    folder = adapter(tmp_path / "sft")
    settings |= {"model_name_or_path": str(folder), "rounds": 1, "use_lora": use_lora}
    assert play(tmp_path, settings) == 0
    out = tmp_path / "out"
    said = read_json(out / "manifest.json")["base"]
    assert said["name"] == str(folder) and said["merged_into"]["name"] == str(BASE)
    assert said["adapters"][0]["sha256"] == file_hash(folder / "adapter_model.safetensors")
    printed, card = {}, {}
    exec(textwrap.dedent(re.search(r"load it with\n((?:  .*\n)+)", capsys.readouterr().out)[1]), printed)
    # The card has the names of what lies on this machine, not the paths; what is shipped lies in assets/
    saved, here = out / ("adapter" if use_lora else "model"), tmp_path / "here"
    here.mkdir()
    for place in (folder, BASE.parents[1], saved):
        (here / place.name).symlink_to(place)
    monkeypatch.chdir(here)
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], card)
    # What was saved is a base itself: the player, whatever it lies on
    again, _ = load_language_model(LanguageBase(str(saved)))
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (printed["model"], card["model"], again)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-3, atol=1e-3)


def change(path: Path, key: str, value) -> None:
    said = json.loads(path.read_text())
    if value is None:
        said.pop(key)
    else:
        said[key] = value
    path.write_text(json.dumps(said))


def tensors(path: Path, change) -> None:
    found = load_file(path)
    change(found, sorted(found)[0])
    save_file(found, path, metadata={"format": "pt"})


def nan(found, name):
    found[name].view(-1)[0] = float("nan")


def bigger_vocabulary(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)


def prompt_tuning(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder)


SPOILT_ADAPTERS = {
    "missing base": (
        lambda f: change(f / "adapter_config.json", "base_model_name_or_path", "nowhere/at-all"),
        "nowhere/at-all",
    ),
    "no base": (lambda f: change(f / "adapter_config.json", "base_model_name_or_path", None), "write base_model_name"),
    "on itself": (lambda f: change(f / "adapter_config.json", "base_model_name_or_path", str(f)), "lies on itself"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
    "not an object": (lambda f: (f / "adapter_config.json").write_text("[]"), "is no JSON object"),
    "a tensor missing": (lambda f: tensors(f / "adapter_model.safetensors", lambda t, n: t.pop(n)), "lacks"),
    "a foreign tensor": (
        lambda f: tensors(f / "adapter_model.safetensors", lambda t, n: t.update(x=torch.ones(1))),
        "its file has x",
    ),
    "another shape": (
        lambda f: tensors(f / "adapter_model.safetensors", lambda t, n: t.update({n: torch.ones(3, 64)})),
        "cannot be put on",
    ),
    "nan": (lambda f: tensors(f / "adapter_model.safetensors", nan), "not finite"),
    "cut off": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 40), "cannot be put on"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "other formats"),
    "whole weights beside it": (lambda f: shutil.copy(BASE / "model.safetensors", f), "take out what is not meant"),
    "another vocabulary": (bigger_vocabulary, "merge it yourself"),
    "prompt tuning": (prompt_tuning, "no weights to merge"),
}


@pytest.mark.parametrize("kind", SPOILT_ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(kind, tmp_path):
    folder = adapter(tmp_path / "sft")
    spoil, words = SPOILT_ADAPTERS[kind]
    spoil(folder)
    with pytest.raises(InputError) as error:
        load_language_model(LanguageBase(str(folder)))
    message = str(error.value)
    assert "\n" not in message and message.startswith("--model_name_or_path ") or "adapter_config.json" in message
    assert words in message and str(folder) in message


def quantised(folder: Path) -> None:
    change(folder / "config.json", "quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128})


def named(folder: Path, weights: str) -> None:
    (folder / "model.safetensors").rename(folder / weights)


def sharded(folder: Path) -> Path:
    """Rewrite the weights in several files; one of them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))[1]


def t5(folder: Path) -> None:
    config = T5Config(vocab_size=176, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def bert(folder: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=176, **sizes)).save_pretrained(folder)


def without_vocabulary(folder: Path, kind: str) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", "backend", None)
    change(folder / "tokenizer_config.json", "tokenizer_class", kind)


def merges_missing(folder: Path) -> None:
    without_vocabulary(folder, "GPT2Tokenizer")
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))


def custom_code(folder: Path) -> None:
    change(folder / "config.json", "model_type", "own")
    change(folder / "config.json", "auto_map", {"AutoConfig": "own.Configuration"})


SPOILT_BASES = {
    "quantised": (quantised, "its weights are quantised (gptq"),
    "fp8": (lambda f: change(f / "config.json", "quantization_config", {"quant_method": "fp8"}), "quantised (fp8"),
    "bitsandbytes": (
        lambda f: change(f / "config.json", "quantization_config", {"load_in_4bit": 1, "quant_method": "bitsandbytes"}),
        "quantised (bitsandbytes",
    ),
    "gguf": (lambda f: named(f, "model.gguf"), "has no weights (*.safetensors)"),
    "pickle": (lambda f: named(f, "pytorch_model.bin"), "has no weights (*.safetensors)"),
    "codes": (
        lambda f: tensors(f / "model.safetensors", lambda t, n: t.update({n: t[n].to(torch.int8)})),
        "is stored as I8",
    ),
    "eight bits": (
        lambda f: tensors(f / "model.safetensors", lambda t, n: t.update({n: t[n].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3",
    ),
    "shard missing": (lambda f: sharded(f).unlink(), "safetensors"),
    "codes in a shard": (
        lambda f: tensors(sharded(f), lambda t, n: t.update({n: t[n].to(torch.int8)})),
        "is stored as I8",
    ),
    "tensor missing in a shard": (lambda f: tensors(sharded(f), lambda t, n: t.pop(n)), "lack"),
    "config is a pipe": (lambda f: (f / "config.json").unlink() or os.mkfifo(f / "config.json"), "config.json"),
    "weights are a folder": (
        lambda f: (f / "model.safetensors").unlink() or (f / "model.safetensors").mkdir(),
        "model.safetensors",
    ),
    "activation not said": (lambda f: change(f / "config.json", "hidden_act", None), "does not say hidden_act"),
    "encoder and decoder": (t5, "an encoder and a decoder"),
    "both ways": (bert, "depends on the tokens behind it"),
    "heads not said": (lambda f: change(f / "config.json", "num_attention_heads", None), "does not say num_attention"),
    "unknown architecture": (lambda f: change(f / "config.json", "model_type", "no-such"), "no-such"),
    "custom code": (custom_code, "custom code"),
    "no vocabulary": (lambda f: without_vocabulary(f, "GPT2Tokenizer"), "no vocab.json and no merges.txt"),
    "no vocabulary (llama)": (lambda f: without_vocabulary(f, "LlamaTokenizer"), "no tokenizer.model"),
    "half a vocabulary": (merges_missing, "merges"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type": "ll'), "config.json"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "missing": (lambda f: tensors(f / "model.safetensors", lambda t, n: t.pop(n)), "lack"),
    "foreign": (lambda f: tensors(f / "model.safetensors", lambda t, n: t.update(v_head=torch.ones(1))), "no place"),
    "nan": (lambda f: tensors(f / "model.safetensors", nan), "not finite"),
    "misshapen": (
        lambda f: tensors(f / "model.safetensors", lambda t, n: t.update({n: torch.ones(2, 2)})),
        "has the shape (2, 2)",
    ),
    "fewer layers than stored": (lambda f: change(f / "config.json", "num_hidden_layers", 1), "no place"),
    "more layers than tensors": (
        lambda f: change(f / "config.json", "num_hidden_layers", 10**7),
        "num_hidden_layers is 10000000",
    ),
    "longest prompt in words": (lambda f: change(f / "tokenizer_config.json", "model_max_length", "x"), "'str'"),
    "more layers than stored": (lambda f: change(f / "config.json", "num_hidden_layers", 3), "lack"),
}  # fmt: skip


def test_a_base_in_several_files_is_whole(tmp_path):
    folder = changed_base(tmp_path)
    assert sharded(folder).is_file()
    model, _ = load_language_model(LanguageBase(str(folder)))
    assert weights_hash(model) == weights_hash(load_language_model(LanguageBase(str(BASE)))[0])


def test_an_adapter_on_a_quantised_base_says_where_to_name_the_whole_one(tmp_path):
    below = changed_base(tmp_path)
    quantised(below)
    folder = adapter(tmp_path / "sft", below=below)
    with pytest.raises(
        InputError, match=r"on .*base: its weights are quantised \(gptq.*adapter_config.json \(base_model"
    ):
        load_language_model(LanguageBase(str(folder)))
    change(folder / "adapter_config.json", "base_model_name_or_path", str(BASE))
    assert load_language_model(LanguageBase(str(folder)))


def test_a_folder_has_no_revisions():
    with pytest.raises(InputError, match="a folder has no revisions: leave --revision v1 out"):
        load_language_model(LanguageBase(str(BASE), revision="v1"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", SPOILT_BASES)
def test_a_base_that_is_not_whole_is_refused(kind, tmp_path):
    folder = changed_base(tmp_path)
    spoil, words = SPOILT_BASES[kind]
    spoil(folder)
    with pytest.raises(InputError) as error:
        load_language_model(LanguageBase(str(folder)))
    message = str(error.value)
    assert message.startswith(f"--model_name_or_path {folder}") and words in message and "\n" not in message


def test_a_base_that_asks_for_tuples_is_read_all_the_same(tmp_path):
    folder = changed_base(tmp_path)
    change(folder / "config.json", "return_dict", False)
    assert scores(make_game(base=folder), AutoModelForCausalLM.from_pretrained(BASE))[0] == pytest.approx(
        scores(make_game(), AutoModelForCausalLM.from_pretrained(BASE))[0]
    )


def test_vllm_is_not_given_an_adapter(settings, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("spin_diffusion.runs.language_run.check_vllm", lambda *_: "0")
    settings |= {"model_name_or_path": str(adapter(tmp_path / "sft")), "engine": "vllm"}
    refused(capsys, play(tmp_path, settings), "--engine vllm", "those are an adapter", "merge_and_unload")
