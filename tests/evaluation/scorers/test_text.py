import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizer

from spin_diffusion.evaluation.scorers._inputs import BertText, ClipText, clean_like_open_clip
from tests import tiny
from tests.evaluation.scorers.tiny_models import END, START, write_bert_tokenizer


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.build_tokenizer(tmp_path_factory.mktemp("clip"), pad="!")


@pytest.fixture(scope="module")
def bert_text(tmp_path_factory: pytest.TempPathFactory) -> BertText:
    folder = tmp_path_factory.mktemp("bert")
    write_bert_tokenizer(folder)
    return BertText(BertTokenizer.from_pretrained(folder), 35)


def test_ids_start_and_end_and_are_filled_with_the_end(clip_tokenizer) -> None:
    ids = ClipText(clip_tokenizer, 77).ids(["red", "an red", ""])
    assert ids.tolist() == [[START, 513, END, END], [START, 514, 513, END], [START, END, END, END]]


def test_a_long_prompt_keeps_its_end_token_and_is_counted(clip_tokenizer) -> None:
    text = ClipText(clip_tokenizer, 77)
    fits, long, longer = "red " * 75, "red " * 76, "red " * 500
    ids = text.ids([fits, long, longer])
    assert ids.shape == (3, 77) and ids[:, -1].tolist() == [END] * 3 and (ids[:, 1:-1] == 513).all()
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])
    assert text.truncated([fits, long, longer, "", "red"]) == [False, True, True, False, False]


def test_two_long_prompts_that_differ_early_have_different_ids(clip_tokenizer) -> None:
    ids = ClipText(clip_tokenizer, 77).ids(["a" + " red" * 100, "b" + " red" * 100])
    assert not torch.equal(ids[0], ids[1]) and (ids == END).sum(dim=1).tolist() == [1, 1]


def test_an_end_token_in_a_prompt_ends_it_or_is_text(clip_tokenizer) -> None:
    prompt = "red <|endoftext|> fox"
    ends = ClipText(clip_tokenizer, 77)
    assert ends.ids([prompt])[0, :3].tolist() == [START, 513, END] and ends.truncated([prompt]) == [True]
    plain = ClipText(clip_tokenizer, 77, reads_special_tokens=False)
    ids = plain.ids([prompt])[0].tolist()
    assert ids.count(END) == 1 and ids[-1] == END and plain.truncated([prompt]) == [False]


def test_bert_ids_have_a_fixed_length_and_a_mask(bert_text: BertText) -> None:
    ids, mask = bert_text.ids(["A red fox", "", "red " * 40])
    assert ids.shape == mask.shape == (3, 35)
    assert ids[0, :6].tolist() == [2, 5, 6, 7, 3, 0] and mask.sum(dim=1).tolist() == [5, 2, 35]
    assert ids[2, 0] == 2 and ids[2, -1] == 3, "[CLS] first and [SEP] last, however long"
    assert bert_text.truncated(["red " * 33, "red " * 34, ""]) == [False, True, False]


def test_prompts_are_cleaned_like_open_clip_cleans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clean_like_open_clip("  A&amp;amp;B \n\t Fox &lt;3 ") == "a&b fox <3"
    stand_in = SimpleNamespace(fix_text=lambda text: text.replace("\u00e2", "'"))
    monkeypatch.setitem(sys.modules, "ftfy", stand_in)
    assert clean_like_open_clip("It\u00e2s") == "it's"
