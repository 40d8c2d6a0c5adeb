"""training/export.py --merge: an adapter that a run left becomes a normal checkpoint."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_diffusion.store.files import write_json
from tests.llm.test_base import BASE, adapter
from tests.runs.test_export import export


def test_a_merged_adapter_answers_as_it_does_on_its_base(tmp_path, capsys):
    adapter(tmp_path / "run" / "adapter")
    write_json(tmp_path / "run" / "manifest.json", {})
    assert export(tmp_path / "run", "--merge", "--dtype", "fp32") == 0
    place = tmp_path / "run" / "export" / "run"
    merged = AutoModelForCausalLM.from_pretrained(place).eval()
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "run/adapter").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected, base = beside(ids).logits, AutoModelForCausalLM.from_pretrained(BASE).eval()(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
    assert (expected - base).abs().max() > 1e-2
    text = "the fox and the hen"
    assert AutoTokenizer.from_pretrained(place)(text) == AutoTokenizer.from_pretrained(BASE)(text)
    assert export(tmp_path / "elsewhere", "--merge") == 2
    assert "is no run" in capsys.readouterr().err
    assert export(tmp_path / "run", "--format", "kohya") == 2
    assert "export it with --merge" in capsys.readouterr().err
    assert export(tmp_path / "run", "--merge", "--strength", 0.7) == 2
    assert "--strength 0.7 is of image runs" in capsys.readouterr().err
