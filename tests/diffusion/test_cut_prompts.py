"""Prompts that are longer than the text encoders read: counted, and said before anything is drawn or trained."""

import copy
import json
import re
import runpy
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import CLIPTokenizer

from spin_diffusion.diffusion.prompts import TOKENISED_AT_ONCE, CutPrompts
from tests.cli.test_scripts import ROOT, play, settings  # noqa: F401


@pytest.fixture(scope="module")
def tokenizer(sd1_dir) -> CLIPTokenizer:
    """Of bytes: a letter is a token, beside the two special ones of a prompt; 77 are read."""
    return CLIPTokenizer.from_pretrained(sd1_dir / "tokenizer")


def said(texts: list[str], *tokenizers: CLIPTokenizer) -> str | None:
    pipeline = SimpleNamespace(**dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False)))
    return CutPrompts(pipeline).add(texts).line("captions")


def test_what_fits_to_the_last_token_is_not_cut(tokenizer):
    assert len(tokenizer("x" * 75)["input_ids"]) == 77
    assert said([], tokenizer) is None
    assert said(["x", "x" * 75, ""] * 20, tokenizer) is None


def test_captions_that_differ_behind_the_last_token_that_is_read(tokenizer):
    captions = ["word " * 200 + str(place) for place in range(8)]
    line = said([*captions, "a dog"], tokenizer)
    assert line.startswith("Warning: 8 of 9 captions have more than the 77 tokens that the text encoders read (the ")
    longest = len(tokenizer(captions[0])["input_ids"])
    assert f"the longest has {longest})" in line
    assert line.endswith("; 8 different captions are equal to another after that")
    given = tokenizer(captions[0], truncation=True, max_length=77)["input_ids"]
    lost = re.search(r"loses '(.*)\.\.\.'", line)[1]
    assert tokenizer.decode(tokenizer(captions[0])["input_ids"][len(given) - 1 : -1]).startswith(lost)


def test_equal_ones_are_counted_as_the_pipeline_reads_them(tokenizer):
    full, a, b, other = (" ".join(["x"] * 74 + list(ends)) for ends in ("x", "xy", "xz", "yy"))
    line = said([a, b, full, other, a], tokenizer)
    assert line.startswith("Warning: 4 of 5 captions") and "; 3 different captions are equal to another" in line
    assert "equal" not in said([a, other, a], tokenizer)
    read = tokenizer([full, a, b, other], padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert read[0] == read[1] == read[2] != read[3]


def test_either_of_two_tokenizers_may_cut(tokenizer):
    shorter = copy.deepcopy(tokenizer)
    shorter.model_max_length = 20
    texts = [" ".join(["x"] * 18 + list(ends)) for ends in ("", "x", "y")]
    for pair in ((tokenizer, shorter), (shorter, tokenizer)):
        line = said(texts, *pair)
        assert line.startswith("Warning: 2 of 3 captions have more than the ") and "77" in line and "20" in line
        assert "equal" not in line, "the other tokenizer still tells them apart"
    assert "; 3 different captions are equal" in said(texts, shorter, shorter)


def test_many_are_counted_in_batches(tokenizer):
    texts = ["a dog"] * TOKENISED_AT_ONCE + ["x" * 90] * TOKENISED_AT_ONCE + ["x"]
    line = said(texts, tokenizer)
    assert f"{TOKENISED_AT_ONCE} of {len(texts)} captions" in line and "equal" not in line


def test_runs_plans_and_evaluations_say_it(settings, tiny_parquet, tmp_path, capsys):  # noqa: F811
    rows = pq.read_table(tiny_parquet).to_pylist()
    for place, row in enumerate(rows[:6]):
        row["caption"] = "word " * 20 + str(place)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "long.parquet")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{'thing ' * 20}{place}"}) + "\n" for place in range(2)))
    settings |= {"dataset_name": str(tmp_path / "long.parquet"), "validation_prompts": str(prompts)}
    settings |= {"max_train_steps": 1, "validation_guidance_scales": [1]}
    captions = "Warning: 6 of 8 captions have more than the 77 tokens"
    validation = "Warning: 2 of 2 validation prompts have more than the 77 tokens"
    assert play(tmp_path, settings, script="plan.py") == 0
    printed = capsys.readouterr().out
    assert captions in printed and "; 6 different captions are equal" in printed and validation in printed
    assert play(tmp_path, settings) == 0
    printed = capsys.readouterr().out
    assert captions in printed and validation in printed
    assert printed.index(captions) < printed.index("Base  ")
    code = runpy.run_path(str(ROOT / "evaluation" / "evaluate.py"))["main"]([
        "--models", f"base={settings['pretrained_model_name_or_path']}", "--prompts", str(prompts),
        "--output_dir", str(tmp_path / "evaluation"), "--scorers", "sharpness", "--resolution", "32",
        "--num_inference_steps", "2", "--images_per_prompt", "1",
    ])  # fmt: skip
    assert code == 0 and "Warning: 2 of 2 prompts have more than the 77 tokens" in capsys.readouterr().out
