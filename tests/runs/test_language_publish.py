"""The model card of a language run, and what of the run's folder reaches a hub, by a stand-in of its client."""

import re
import textwrap

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.runs.language_run import card
from spin_diffusion.runs.publish import write_card
from tests.cli.test_language_script import play, refused, settings  # noqa: F401
from tests.llm.playing import LANGUAGE

RUN = ["--push_to_hub", "--hub_model_id", "someone/some-model", "--rounds", "1"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_hub_gets_model_card_and_report_and_no_more(use_lora, hub, settings, tmp_path, capsys):  # noqa: F811
    argv = [*RUN, "--use_lora", "true", "--rank", "4"] if use_lora else RUN
    assert play(tmp_path, settings, *argv) == 0
    assert "Uploaded to https://huggingface.co/someone/some-model" in capsys.readouterr().out
    weights = "adapter_model.safetensors" if use_lora else "model.safetensors"
    names = {path.name for path in hub.rglob("*")}
    assert {weights, "tokenizer.json", "README.md", "config.yaml", "manifest.json", "report.html"} <= names
    assert not names & {"samples", "data", "round-1", "model", "adapter", "answers.parquet", "logs"}
    # At the root, where transformers and PEFT look
    base = LANGUAGE / "base"
    model = AutoModelForCausalLM.from_pretrained(base if use_lora else hub)
    model = PeftModel.from_pretrained(model, hub) if use_lora else model
    assert AutoTokenizer.from_pretrained(hub).chat_template
    readme = ModelCard.load(hub / "README.md")
    assert (readme.data.library_name, readme.data.pipeline_tag) == ("peft" if use_lora else "transformers",
                                                                "text-generation")  # fmt: skip
    text = readme.text
    for part in ("someone/some-model", "| answers | 48 from", "space, beta 1, 1 rounds", "| space round 1 |",
                 "LoRA of rank 4" if use_lora else "all weights"):  # fmt: skip
        assert part in text, part
    assert ("PeftModel" in text) == use_lora and "guidance" not in text and "image" not in text


@pytest.mark.parametrize(
    "objective, says",
    [
        ("spin", "from [assets/toy_language/base](#use) with [SPIN](https://arxiv.org/abs/2401.01335): in each"),
        ("space", "with [SPACE](https://arxiv.org/abs/2512.07175): in each round"),
        ("dpo", "from [assets/toy_language/base](#use) with [DPO](https://arxiv.org/abs/2305.18290): the player"),
        ("sft", "with [supervised fine-tuning](https://arxiv.org/abs/2203.02155) on the data's answers alone."),
        ("kto", "with [KTO](https://arxiv.org/abs/2402.01306): in each round"),
        ("[sft, space, spin]", "with [supervised fine-tuning](https://arxiv.org/abs/2203.02155), "
         "[SPACE](https://arxiv.org/abs/2512.07175) and [SPIN](https://arxiv.org/abs/2401.01335): in each"),
    ],
)  # fmt: skip
def test_the_card_names_the_papers_of_all_objectives(objective, says, tmp_path):
    argv = ["--model_name_or_path", str(LANGUAGE / "base"), "--dataset_name", "rows.jsonl", "--rounds", "4"]
    config = parse_language_config([*argv, "--objective", objective])
    write_card(tmp_path, config, card(config, tmp_path, 48))
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert says in text and "Diffusion" not in text


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_lines_of_the_card_and_those_of_the_terminal_load_the_player(
    use_lora,
    settings,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    adapter = ["--use_lora", "true", "--rank", "4"] if use_lora else []
    assert play(tmp_path, settings, "--rounds", "1", *adapter) == 0
    printed = re.search(r"load it with\n((?:  .*\n)+)", capsys.readouterr().out)[1]
    card = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "assets").symlink_to(LANGUAGE.parent)  # the card has the base's name, not where it lay
    for folder, code in (("elsewhere", textwrap.dedent(printed)), ("out", card)):
        monkeypatch.chdir(tmp_path / folder)
        found = {}
        exec(code, found)
        assert found["model"].config.model_type == "llama" and found["tokenizer"].eos_token


def test_a_hub_that_cannot_be_reached_loses_nothing(settings, tmp_path, capsys):  # noqa: F811
    refused(capsys, play(tmp_path, settings, *RUN), "--push_to_hub", "someone/some-model", "run the same command again")
    assert (tmp_path / "out" / "model").is_dir() and (tmp_path / "out" / "README.md").is_file()
