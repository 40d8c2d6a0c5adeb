"""The model card that every kind of run writes: what it says of the base, of the settings and of the verdict."""

import json

import pytest
from huggingface_hub import ModelCard

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.runs import language_run
from spin_diffusion.runs.image_lines import card
from spin_diffusion.runs.publish import _verdict, by_round, round_facts, write_card


def config(base: str = "someone/base", *flags: str):
    return parse_config(["--pretrained_model_name_or_path", base, "--dataset_name", "a|b\nc.parquet",
                         "--train_batch_size", "2", "--max_train_steps", "4", *flags])  # fmt: skip


def card_of(tmp_path, settings) -> ModelCard:
    write_card(tmp_path, settings, card(settings, "StableDiffusionPipeline", 48))
    return ModelCard.load(tmp_path / "README.md")


def test_a_base_on_the_hub_is_linked_with_its_licence_and_a_local_one_is_not(tmp_path):
    card = card_of(tmp_path, config())
    assert card.data.base_model == "someone/base" and "The licence of the base applies" in card.text
    assert "[someone/base](https://huggingface.co/someone/base)" in card.text
    local = tmp_path / "home" / "base"
    local.mkdir(parents=True)
    card = card_of(tmp_path, config(str(local)))
    assert card.data.base_model is None and "licence of the base" not in card.text
    assert "[base](#use)" in card.text and "huggingface.co" not in card.text


@pytest.mark.parametrize("own", ["", "# My own notes\n", "edited"])
def test_a_card_that_somebody_wrote_or_edited_stays(own, tmp_path, capsys):
    card_of(tmp_path, config())
    path, other = tmp_path / "README.md", config("another/base")
    path.write_text(path.read_text().replace("self-play", "my self-play", 1) if own == "edited" else own)
    before = path.read_bytes()
    write_card(tmp_path, other, card(other, "StableDiffusionPipeline", 48))
    assert path.read_bytes() == before and "stays as it is: delete it" in capsys.readouterr().out
    path.unlink()
    for base in ("another/base", "a/third"):  # what it wrote itself it replaces
        assert card_of(tmp_path, config(base)).data.base_model == base


def test_what_was_written_by_others_stays_in_its_cell(tmp_path):
    row = next(line for line in card_of(tmp_path, config()).text.splitlines() if line.startswith("| images |"))
    assert row == "| images | 48 from `a\\|b c.parquet` |"


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_hubs_fields_are_complete_and_no_path_of_this_machine_is_told(use_lora, tmp_path):
    base, data = tmp_path / "home" / "base", tmp_path / "home" / "rows.parquet"
    base.mkdir(parents=True)
    flags = ["--use_lora", "true"] if use_lora else []
    local = config(str(base), "--dataset_name", str(data), *flags)
    card = card_of(tmp_path, local)
    assert card.data.license == "unknown" and not card.data.datasets and "48 from `rows.parquet`" in card.text
    assert "Run it in the folder of this card and with the path of the base in place of `base`:" in card.text
    assert str(tmp_path) not in (tmp_path / "README.md").read_text() and 'from_pretrained("base"' in card.text
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    assert card_of(tmp_path, local).data.license == "openrail++", "the base's own"
    named = ["--dataset_name", "someone/pictures", "--hub_model_id", "someone/it"]
    card = card_of(tmp_path, config("someone/base", *named, *flags))
    assert "Run it" not in card.text and 'subfolder="' in card.text
    card = card.data
    assert card.datasets == ["someone/pictures"] and card.base_model == "someone/base"
    assert card.to_dict()["base_model_relation"] == ("adapter" if use_lora else "finetune")
    assert (card.license, card.license_link) == ("other", "https://huggingface.co/someone/base")
    assert ("lora" in card.tags) == use_lora and {"stable-diffusion", "text-to-image", "self-play"} <= {*card.tags}


def test_settings_of_each_round_are_told_of_each_round(tmp_path):
    changing = config("base", "--rounds", "3", "--objective", "[sft, spin]", "--beta", "[100, 200]")
    assert by_round(changing, changing.rounds.beta) == "100, 200, 200" and by_round(changing, [5.0]) == "5"
    card = card_of(tmp_path, changing)
    assert "| objective | sft, spin, beta 100, 200, 200, 3 rounds |" in card.text
    assert "[SPIN-Diffusion](" in card.text  # the method of the rounds that the result came from
    assert {"sft", "spin", "self-play"} <= set(card.data.tags)


def test_the_steps_of_a_round_are_those_of_its_part_on_all_processes(monkeypatch):
    epochs = config("base", "--max_train_steps", "null", "--num_train_epochs", "2", "--real_parts", "2")
    assert dict(round_facts(epochs, 48, "how"))["optimizer steps a round"] == "24"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert dict(round_facts(epochs, 48, "how"))["optimizer steps a round"] == "6"


@pytest.mark.parametrize("scale", [3.0, None])
def test_the_verdict_is_the_headlines(scale):
    said = [
        {"model": model, "guidance_scale": at, "verdict": verdict, "reason": f"{model} at {at}."}
        for model, at, verdict in (("round 1", scale, "regressed"), ("round 2", 1.0, "inconclusive"),
                                   ("round 2", scale, "improved"))
    ]  # fmt: skip
    results = {"headline": {"model": "round 2", "guidance_scale": scale}, "verdicts": said}
    at = "" if scale is None else " at guidance 3"
    assert _verdict(json.loads(json.dumps(results))) == f"round 2{at}: **improved**. round 2 at {scale}."
    assert _verdict(None) == ""


@pytest.mark.parametrize(("flags", "folder"), [((), "model"), (("--use_lora", "true"), "adapter")])
def test_a_language_models_card_loads_what_the_run_saved_or_uploaded(flags, folder, tmp_path):
    def card(*more: str) -> str:
        settings = ["--model_name_or_path", "base", "--dataset_name", "a.jsonl", "--max_train_steps", "4"]
        config = parse_language_config([*settings, *flags, *more])
        write_card(tmp_path, config, language_run.card(config, tmp_path, 48))
        return (tmp_path / "README.md").read_text()

    # The weights, and the tokenizer beside them
    assert card().count(f'"./{folder}"') == 2 and str(tmp_path) not in card()
    uploaded = card("--hub_model_id", "someone/it")
    assert uploaded.count('"someone/it"') == 2 and str(tmp_path) not in uploaded
