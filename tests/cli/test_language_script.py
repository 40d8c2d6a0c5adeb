"""The language script as a user runs it: the whole path, and one clear line with exit code 2 for what is wrong."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from spin_diffusion.evaluation.records import read_results
from spin_diffusion.store.files import read_json, read_rows
from spin_diffusion.store.run_dir import MARKER, file_hash
from tests.cli.test_scripts import refused, run
from tests.llm.playing import LANGUAGE

SCRIPT = "train_space_llm.py"


@pytest.fixture
def settings(tmp_path) -> dict:
    return {
        "model_name_or_path": str(LANGUAGE / "base"),
        "dataset_name": str(LANGUAGE / "data" / "train.jsonl"),
        "max_train_samples": 48,
        "keep_repeated": True,
        "held_out_dataset_name": str(LANGUAGE / "data" / "held_out.jsonl"),
        "num_held_out": 24,
        "held_out_by": "row",
        "rounds": 2,
        "max_train_steps": 3,
        "num_train_epochs": None,
        "train_batch_size": 8,
        "learning_rate": 3e-4,
        "max_length": 48,
        "max_new_tokens": 24,
        "judges": ["log_likelihood", "length"],
        "num_validation_answers": 2,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def unevaluated(settings) -> dict:
    """For what happens before or beside the evaluation, which takes longer than so small a training."""
    return settings | {"rounds": 1, "judges": [], "held_out_dataset_name": None, "num_held_out": 0}


def play(tmp_path: Path, settings: dict, *argv: str) -> int:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return run(SCRIPT, "--config", str(config), *argv)


def rows(path: Path, content: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return str(path)


def test_one_command_plays_evaluates_and_compares(settings, tmp_path, capsys):
    settings |= {"compare_with": ["sft"], "report_to": "tensorboard"}
    assert play(tmp_path, settings) == 0
    out = tmp_path / "out"
    names = {"config.yaml", "manifest.json", "model", "logs", "round-1", "round-2", "base", "report.html"}
    names |= {"table.md", "table.tex", "results.csv"}
    assert names | {"results.json", "scores.parquet", "answers.parquet"} <= {path.name for path in out.iterdir()}
    printed = capsys.readouterr().out
    for part in ("8 pairs a step", "space round 2", "sft, same steps", "held-out gap", "Report: "):
        assert part in printed
    results = read_results(out / "results.json")
    assert [model["name"] for model in results["models"]] == ["base", "space round 1", "space round 2",
                                                             "sft, same steps"]  # fmt: skip
    assert {curve["model"] for curve in results["training_curves"]} == {"space", "sft, same steps"}
    # What each phase took, of the rival's rounds too
    for folder in (out / "round-1", out / "compare-sft" / "round-2"):
        ledger = read_json(folder / "round.json")["ledger"]
        for phase in ("generated", "cached", "trained") if folder.parent == out else ("trained",):
            assert ledger[phase]["seconds"] > 0 and ledger[phase]["samples"] > 0, phase
    measures = {(measure["model"], measure["name"]) for measure in results["measures"]}
    assert {
        ("base", "held_out_nll"),
        ("space round 2", "held_out_nll"),
        ("space round 1", "held_out_gap"),
        ("space round 2", "held_out_gap"),
        ("sft, same steps", "held_out_gap"),
    } <= measures
    assert list((out / "logs").rglob("events.out.tfevents*"))
    # A normal checkpoint
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "tell me about an old dog"}],
                                        add_generation_prompt=True, return_tensors="pt")["input_ids"]  # fmt: skip
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    before = file_hash(out / "model" / "model.safetensors")
    # Once more: nothing to do, the same table
    assert play(tmp_path, settings) == 0
    assert "space round 2" in capsys.readouterr().out and file_hash(out / "model" / "model.safetensors") == before


def test_the_held_out_likelihood_is_the_plain_one(settings, tmp_path):
    lines = (LANGUAGE / "data" / "held_out.jsonl").read_text().splitlines()[:24]
    settings |= {
        "held_out_dataset_name": rows(tmp_path / "held_out.jsonl", lines),
        "num_held_out": 0,
        "rounds": 1,
        "judges": [],
    }
    assert play(tmp_path, settings) == 0
    said = read_json(tmp_path / "out" / "base" / "held_out.json")["held_out_nll"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(LANGUAGE / "base"),
        AutoTokenizer.from_pretrained(LANGUAGE / "base"),
    )
    sums = []
    for line in lines:
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"][0]
        start = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"])
        with torch.no_grad():
            log_p = torch.log_softmax(model(whole[None]).logits[0].double(), -1)
        sums.append(-sum(log_p[place - 1, whole[place]].item() for place in range(start, len(whole))))
    assert said["value"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)
    assert said["low"] < said["value"] < said["high"]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_run_starts_from_the_last_player_of_another(adapter, settings, tmp_path):
    settings |= {"rounds": 1, "judges": [], "use_lora": adapter, "rank": 4}
    first, second, saved = tmp_path / "out", tmp_path / "second", "adapter" if adapter else "model"
    assert play(tmp_path, settings) == 0
    argv = ["--continue_from", str(first), "--output_dir", str(second), "--objective", "spin"]
    # An adapter begins at random, by the seed; the base it lies on is the same
    assert play(tmp_path, settings, *argv, *(["--seed", "7"] if adapter else [])) == 0
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert file_hash(second / "start" / saved / name) == file_hash(first / saved / name)
    assert file_hash(second / saved / name) != file_hash(first / saved / name)
    records = [read_json(run / "round-1" / "round.json") for run in (first, second)]
    assert records[0]["opponent"]["members"][0]["hash"] != records[1]["opponent"]["members"][0]["hash"]
    measured = [read_json(run / "base" / "held_out.json")["held_out_nll"] for run in (first, second)]
    assert measured[0] == measured[1]


def test_an_adapter_is_saved_as_peft_reads_it(unevaluated, tmp_path):
    from peft import PeftModel

    assert play(tmp_path, unevaluated | {"use_lora": True, "rank": 4}) == 0
    assert "in nats, 0 at the start" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8"), (
        "there is a page of curves"
    )
    base = AutoModelForCausalLM.from_pretrained(LANGUAGE / "base")
    PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
        (["--model_name_or_path", "nowhere/at-all"], ["nowhere/at-all"]),
        (["--dataset_name", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--objective_options", "{mu: 0}"], ["--objective_options mu 0", "above 0"]),
        (["--num_generated", "0"], ["--num_generated 0", "at least 1"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--max_new_tokens", "48"], ["--max_new_tokens 48", "--max_length 48"]),
        (["--objective", "dppo"], ["--objective dppo: give one of spin, space, ", "did you mean 'dpo'?"]),
        (["--objective", ""], ["--objective '': give one of spin, space, "]),
        (["--opponent", "lastest"], ["--opponent lastest: give one of latest, base, ", "did you mean 'latest'?"]),
        (["--rejected_column", "foo"], ["'foo' (--rejected_column)", "its columns are messages"]),
        (["--max_train_steps", "null"], ["--max_train_steps", "--num_train_epochs"]),
        (["--real_parts", "9", "--samples_per_shard", "8"], ["--real_parts 9"]),
        (["--judges", "no_such_judge"], ["no_such_judge"]),
        (["--judges", "reward_model=/nowhere/at/all"], ["--judges reward_model=/nowhere/at/all", "does not exist"]),
        (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "give bf16 or no"]),
        (["--judges", "length", "missing.py"], ["missing.py"]),
        (["--chat_template", "nowhere.jinja"], ["--chat_template nowhere.jinja"]),
        (["--train_batch_size", "64"], ["48 pairs", "64"]),
        (["--engine", "vllm"], ["spin-diffusion[vllm]"]),
        (["--objective", "dpo"], ["dpo"]),
        (["--use_lora", "--lora_target_modules", "[nowhere]"], ["--lora_target_modules", "nowhere"]),
        (["--lm_eval", "{tasks: [gsm8k]}"], ["spin-diffusion[lm-eval]"]),
        (["--stop_when_learnt", "--num_held_out", "0", "--held_out_dataset_name", "null"], ["--stop_when_learnt"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(argv, parts, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    refused(capsys, play(tmp_path, settings, *argv), *parts)


@pytest.mark.parametrize(
    "taken, lacks",
    [
        (["config.json"], "has no config.json"),
        (["model.safetensors"], "has no weights (*.safetensors)"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer (tokenizer.json, say)"),
        (["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
         "has no config.json and no weights (*.safetensors) and no tokenizer"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_something_of_a_model_says_what(taken, lacks, settings, tmp_path, capsys):
    base = changed_base(tmp_path)
    for name in taken:
        (base / name).unlink()
    refused(capsys, play(tmp_path, settings | {"model_name_or_path": str(base)}), f"{base}: the folder {lacks}")


def test_weights_that_are_cut_off_are_refused_in_one_line(settings, tmp_path, capsys):
    weights = changed_base(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(capsys, play(tmp_path, settings | {"model_name_or_path": str(weights.parent)}), str(weights.parent))


def test_reading_stops_early_where_no_prompt_fits(settings, tmp_path, capsys):
    line = (LANGUAGE / "data" / "train.jsonl").read_text().splitlines()[0]
    settings |= {"dataset_name": rows(tmp_path / "data.jsonl", [line] * 1500), "max_train_samples": None}
    settings |= {"held_out_dataset_name": None, "num_held_out": 0, "max_length": 4, "max_new_tokens": 2}
    refused(
        capsys, play(tmp_path, settings), "stopped early: of 1000 rows none can be used", "--max_length 4", "line 1:"
    )
    # One row that fits, and all are read
    short = {"messages": [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "waits."}]}
    settings |= {"dataset_name": rows(tmp_path / "data.jsonl", [json.dumps(short)] + [line] * 1100), "max_length": 8}
    refused(capsys, play(tmp_path, settings), "1 pair", "8")


def test_a_plan_before_the_run_stands_beside_what_it_took(settings, tmp_path, capsys):
    settings |= {"compare_with": []}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    refused(capsys, run("plan.py", "--config", str(config), "--lerning_rate", "1"), "lerning_rate", "learning_rate")
    refused(capsys, run("plan.py", "--config", str(config), "--train_batch_size", "64"), "48 pairs are fewer")
    assert run("plan.py", "--config", str(config)) == 0
    printed = capsys.readouterr().out
    assert "for 48 real samples on 1 process, without judges" in printed and "of this machine" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MARKER, "plan.json"}
    assert play(tmp_path, settings) == 0
    plan, told = read_json(tmp_path / "out" / "plan.json"), read_results(tmp_path / "out" / "results.json")["ledger"]
    planned = {(entry["round"], phase): entry[phase] for entry in plan["rounds"] for phase in entry if phase != "round"}
    for entry in told:
        assert entry["predicted_seconds"] == planned.get((entry["round"], entry["phase"]))
    assert sum(entry["predicted_seconds"] is not None for entry in told) == 2 * 4
    held = max(entry.get("disk_bytes") or 0 for entry in told)
    assert 0.5 * plan["disk_bytes"] < held < 1.5 * plan["disk_bytes"]


def test_judges_that_are_not_there_are_refused_before_a_model_is_loaded(settings, tmp_path, capsys):
    settings["model_name_or_path"] = "nowhere"
    for judge in ("no_such_judge", "missing.py", "reward_model=~/no/such/model"):
        refused(capsys, play(tmp_path, settings, "--judges", judge), judge)


def changed_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(LANGUAGE / "base", folder)
    return folder


def gpt2(folder: Path, **sizes: int) -> str:
    """An untrained GPT-2 with learned positions, beside the language's tokenizer."""
    shutil.copytree(LANGUAGE / "base", folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(LANGUAGE / "base" / "tokenizer_config.json", folder)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ({"n_positions": 24, "vocab_size": 176}, ["--max_length 48", "24 positions", "at most 24"]),
        ({"n_positions": 48, "vocab_size": 20}, ["ids up to 175", "20 rows", "resize_token_embeddings(176)"]),
    ],
)
def test_a_model_too_small_for_the_settings_is_refused_before_data_is_read(sizes, parts, settings, tmp_path, capsys):
    settings |= {"model_name_or_path": gpt2(tmp_path / "gpt2", **sizes), "dataset_name": "nowhere.jsonl"}
    refused(capsys, play(tmp_path, settings), *parts)


def test_a_model_of_just_the_right_size_is_played_with(unevaluated, tmp_path):
    model = gpt2(tmp_path / "gpt2", n_positions=48, vocab_size=176)
    assert play(tmp_path, unevaluated | {"model_name_or_path": model}) == 0


def test_a_tokenizer_without_a_chat_template_says_what_to_do(unevaluated, tmp_path, capsys):
    base = changed_base(tmp_path)
    (base / "chat_template.jinja").unlink()
    unevaluated["model_name_or_path"] = str(base)
    assert play(tmp_path, unevaluated) == 2
    # On a line of its own, not behind the bar of what was being read
    assert "\nerror: the data are conversations and the tokenizer has no chat template" in capsys.readouterr().err
    # with a template of the user's it goes
    assert play(tmp_path, unevaluated, "--chat_template", str(LANGUAGE / "base" / "chat_template.jinja")) == 0


def test_a_tokenizer_without_a_pad_token_is_used_with_another(unevaluated, tmp_path):
    base = changed_base(tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert play(tmp_path, unevaluated | {"model_name_or_path": str(base)}) == 0


THINKS = (
    "{%- for m in messages %}<|{{ m.role }}|>{%- if m.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- if enable_thinking is defined and not enable_thinking %}think "
    "{% endif %}{%- endif %}"
)


def test_what_a_template_writes_before_answers_is_refused_until_it_belongs_to_the_prompt(settings, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(THINKS)
    settings |= {"chat_template": str(tmp_path / "own.jinja"), "rounds": 1, "judges": []}
    refused(
        capsys, play(tmp_path, settings), "the chat template writes 'think ' before every real answer",
        "--chat_template_kwargs '{enable_thinking: false}'",
    )  # fmt: skip
    refused(capsys, play(tmp_path, settings, "--chat_template_kwargs", "{thinking: false}"), "no variable of this name")
    argv = ["--chat_template_kwargs", "{enable_thinking: false}"]
    assert play(tmp_path, settings, *argv) == 0
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    for part in ("data", "held_out"):
        rows = [row for path in sorted((out / part).rglob("*.parquet")) for row in read_rows(path)]
        assert rows
        for row in rows:
            assert tokenizer.decode(row["prompt_ids"]).endswith("<|assistant|>think "), row["prompt"]
            assert tokenizer.decode(row["tokens"]).removesuffix("</s>") == row["text"]
    drawn = [row for path in sorted((out / "round-1" / "samples").rglob("*.parquet")) for row in read_rows(path)]
    assert all(tokenizer.decode(row["prompt_ids"]).endswith("<|assistant|>think ") for row in drawn)
    # Who loads the player asks it as it was trained
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a dog"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<|assistant|>think ")
    assert "chat_template_kwargs:\n  enable_thinking: false" in (out / "config.yaml").read_text()
    refused(capsys, play(tmp_path, settings, "--rounds", "2"), "chat_template_kwargs")


def test_a_template_that_is_no_small_file_is_refused(settings, tmp_path, capsys):
    pipe, large = tmp_path / "pipe.jinja", tmp_path / "large.jinja"
    os.mkfifo(pipe)
    large.write_bytes(b" " * 2**21)
    for path, says in ((pipe, "named pipe"), (large, "bytes")):
        refused(capsys, play(tmp_path, settings | {"chat_template": str(path)}), "chat", says)


def test_answers_that_are_cut_are_counted_before_training_and_by_the_plan(settings, tmp_path, capsys):
    settings |= {"max_new_tokens": 5, "rounds": 1, "judges": []}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run("plan.py", "--config", str(config)) == 0
    line = r"answers cut at --max_new_tokens 5 or --max_length 48, .*\(the longest has \d+ tokens\): \d+"
    assert re.search(r"Of the first \d+ answers: " + line, capsys.readouterr().out)
    assert play(tmp_path, settings) == 0
    printed = capsys.readouterr().out
    assert re.search("\n" + line, printed) and re.search("held out: " + line, printed)


def test_answers_that_cannot_be_used_are_counted(settings, tmp_path, capsys):
    def turn(prompt, answer):
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}

    good = [turn("tell me about an old dog", f"often {word} old dogs wait.") for word in ("two", "the", "some", "many")]
    other, too_long = turn("tell me about a shy cat", "the cat sleeps."), turn("the old dog " * 30, "waits.")
    bad = [turn("tell me about an old dog", ""), turn("the dog", "the dog"), too_long]
    settings |= {
        "num_held_out": 0,
        "held_out_dataset_name": rows(tmp_path / "held_out.jsonl", [*good, other, too_long]),
    }
    settings |= {
        "dataset_name": rows(tmp_path / "data.jsonl", good * 1 + bad + ["{broken"]),
        "train_batch_size": 2,
        "judges": [],
    }
    refused(capsys, play(tmp_path, settings | {"rounds": 1}), "data.jsonl", "max_bad_share")
    assert play(tmp_path, settings | {"rounds": 1, "max_bad_share": 0.9}) == 0
    printed = capsys.readouterr().out
    assert re.search(r"read 8 rows: used 4, left out 4", printed)
    for reason in ("empty", "equal", "longer"):
        assert reason in printed, reason


def test_a_model_whose_scores_are_not_finite_is_said(settings, tmp_path, capsys):
    base = changed_base(tmp_path)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name] = weights[name] * float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    settings |= {"model_name_or_path": str(base), "held_out_dataset_name": None, "num_held_out": 0}
    refused(capsys, play(tmp_path, settings), "not finite")


def test_a_loss_that_is_not_finite_is_said_with_step_and_samples(unevaluated, tmp_path, capsys):
    refused(capsys, play(tmp_path, unevaluated, "--learning_rate", "1e30"), "round 1, step", "samples")


def test_changed_settings_are_refused_with_the_difference(unevaluated, tmp_path, capsys):
    assert play(tmp_path, unevaluated) == 0
    refused(capsys, play(tmp_path, unevaluated, "--temperature", "0.7"), "temperature: 1.0 -> 0.7")


def test_a_changed_chat_template_or_tokenizer_is_refused_in_a_begun_run(unevaluated, tmp_path, capsys):
    base, template = changed_base(tmp_path), tmp_path / "template.jinja"
    shutil.copy(base / "chat_template.jinja", template)
    unevaluated |= {"model_name_or_path": str(base), "chat_template": str(template), "max_train_steps": 1}
    assert play(tmp_path, unevaluated) == 0
    written = template.read_text()
    template.write_text(written + " ")
    capsys.readouterr()
    refused(capsys, play(tmp_path, unevaluated, "--rounds", "2"), "other settings (chat_template_sha256)", "restore")
    template.write_text(written)
    tokens = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (base / "tokenizer.json").write_text(json.dumps(tokens))
    refused(capsys, play(tmp_path, unevaluated, "--rounds", "2"), "other settings (tokenizer_sha256)")
    shutil.copy(LANGUAGE / "base" / "tokenizer.json", base)
    assert play(tmp_path, unevaluated, "--rounds", "2") == 0


def test_other_sampling_and_unstable_settings_are_warned_of(unevaluated, tmp_path, capsys):
    argv = ["--objective", "spin", "--beta", "0.1", "--temperature", "0.7"]
    assert play(tmp_path, unevaluated, *argv) == 0
    printed = capsys.readouterr().out
    assert "Warning: --temperature 0.7" in printed and "Warning: --objective spin with --beta 0.1" in printed
