"""Answers: from the density that scores them, each from its own seed."""

import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from spin_diffusion.llm import generation
from spin_diffusion.llm.generation import OwnNoise, Vllm, check_vllm, draw_answers, until_end
from spin_diffusion.llm.settings import GenerationSettings
from spin_diffusion.samples.sample import Batch
from spin_diffusion.store.input_error import InputError
from tests.llm.playing import make_game
from tests.llm.test_logprobs import VOCABULARY, llama

END = (0, 7)


def prompts(count: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (3 + place % 5,), generator=generator).tolist() for place in range(count)]


def draw(asked, seeds, model=None, max_length=64, **settings):
    return draw_answers(
        model or llama(), asked, seeds, GenerationSettings(**({"max_new_tokens": 12} | settings)), end_ids=END,
        pad_id=1, max_length=max_length, autocast=nullcontext,
    )  # fmt: skip


def test_batched_equals_one_by_one_at_temperature_0():
    model, asked = llama(), prompts()
    together = draw(asked, list(range(9)), model, temperature=0.0, generation_batch_size=9)
    alone = [draw([ids], [seed], model, temperature=0.0)[0] for seed, ids in enumerate(asked)]
    assert together == alone
    # and both equal the plain loop
    ids = list(asked[4])
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert together[4] == until_end(ids[len(asked[4]) :], END, 12)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_sampled_answer_does_not_depend_on_its_batch(size):
    model, asked, seeds = llama(), prompts(), list(range(100, 109))
    expected = draw(asked, seeds, model, generation_batch_size=4)
    assert draw(asked, seeds, model, generation_batch_size=size) == expected
    backwards = draw(asked[::-1], seeds[::-1], model, generation_batch_size=size)
    assert backwards[::-1] == expected
    assert draw(asked, [seed + 1 for seed in seeds], model) != expected


def test_the_longest_prompts_come_first(monkeypatch):
    """So that a batch that is too large for the memory is the first one, and not one after hours."""
    model, asked, lengths = llama(), prompts(), []
    plain = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: lengths.append(inputs["input_ids"].shape[1]) or plain(**inputs)
    )
    draw(asked, list(range(9)), model, generation_batch_size=2)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == max(map(len, asked)) > lengths[-1]


def test_samples_follow_the_models_distribution():
    model = llama()
    model.lm_head.weight.data *= 8  # far from uniform
    prompt = [5, 6, 8]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), 0)
    drawn = draw([prompt] * 4000, list(range(4000)), model, max_new_tokens=1, generation_batch_size=4000)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn]), minlength=VOCABULARY)
    frequent = p * 4000 >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]]).double()
    expected = torch.cat([p[frequent], p[~frequent].sum()[None]]) * 4000
    assert len(observed) > 10 and chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_top_k_and_temperature_shape_the_samples():
    model, prompt = llama(), [5, 6, 8]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    top = set(logits.topk(3).indices.tolist())
    drawn = draw([prompt] * 200, list(range(200)), model, max_new_tokens=1, top_k=3, generation_batch_size=200)
    assert {answer.ids[0] for answer in drawn} == top
    cold = draw([prompt] * 20, list(range(20)), model, max_new_tokens=1, temperature=1e-4, generation_batch_size=20)
    assert {answer.ids[0] for answer in cold} == {int(logits.argmax())}


def test_an_answer_ends_with_its_end_token_or_is_cut_without_one():
    assert until_end([4, 7, 9], END, 12).ids == [4, 7] and until_end([4, 7, 9], END, 12).finish == "stop"
    assert until_end([4, 5, 7], END, 2).ids == [4, 5] and until_end([4, 5, 7], END, 2).finish == "length"
    for answer in draw(prompts(), list(range(9)), max_new_tokens=3):
        assert (answer.ids[-1] in END) == (answer.finish == "stop")
        assert answer.finish == "stop" or len(answer.ids) == 3


def test_prompt_and_answer_stay_within_the_longest_length():
    asked = prompts()
    for ids, answer in zip(asked, draw(asked, list(range(9)), max_length=8), strict=True):
        assert len(ids) + len(answer.ids) <= 8


def test_the_checkpoints_own_generation_settings_do_not_change_the_density():
    model, asked = llama(), prompts()
    expected = draw(asked, list(range(9)), model)
    model.generation_config = GenerationConfig(repetition_penalty=3.0, temperature=0.3, top_k=2, do_sample=True)
    assert draw(asked, list(range(9)), model) == expected
    assert model.generation_config.repetition_penalty == 3.0  # and they are still the checkpoint's


def test_noise_is_a_function_of_the_rows_seed_alone():
    scores = torch.zeros(3, 11)
    together = OwnNoise([4, 5, 6], torch.device("cpu"))(torch.zeros(3, 1), scores)
    alone = OwnNoise([5], torch.device("cpu"))(torch.zeros(1, 1), scores[:1])
    assert torch.equal(together[1:2], alone)


def test_other_sampling_than_the_densitys_is_said_and_why():
    assert GenerationSettings().warnings() == []
    said = GenerationSettings(temperature=0.7, top_p=0.9).warnings()
    assert len(said) == 1 and "--temperature 0.7, --top_p 0.9" in said[0] and "rest" in said[0]


def test_who_draws_is_said_where_it_is_not_transformers():
    assert GenerationSettings().describe() == "at most 256 tokens at temperature 1"
    assert GenerationSettings(engine="vllm").describe() == "at most 256 tokens at temperature 1, by vllm"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"vllm_memory_share": 1.0},
        {"temperature": 3.0, "engine": "vllm"},
    ],
)
def test_wrong_settings_name_their_flag(wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        GenerationSettings(**wrong)


@pytest.fixture
def vllm(monkeypatch) -> dict:
    """A stand-in with those of vLLM's arguments that are used; what it was given. The engine itself: test_vllm.py."""
    calls: dict = {"finish": "stop", "ended": 0, "fails": None}

    class LLM:
        def __init__(
            self, model, *, skip_tokenizer_init=False, max_model_len=None, dtype="auto", gpu_memory_utilization=0.9,
            enable_lora=False, max_lora_rank=16, revision=None, trust_remote_code=False,
        ):  # fmt: skip
            calls["options"] = {"model": model, "dtype": dtype, "share": gpu_memory_utilization, "revision": revision,
                                "lora": max_lora_rank if enable_lora else None}  # fmt: skip
            assert skip_tokenizer_init and max_model_len == 10
            if calls["fails"] == "start":
                raise RuntimeError("Engine core\ninitialization failed")
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))

        def shutdown(self):
            calls["ended"] += 1

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            calls["prompts"], calls["parameters"], calls["request"] = prompts, sampling_params, lora_request
            if calls["fails"] == "draw":
                raise RuntimeError("EngineCore encountered an issue")
            found = SimpleNamespace(token_ids=(3, 7), finish_reason=calls["finish"])
            return [SimpleNamespace(outputs=[found]) for _ in prompts]

    def sampling_params(
        temperature, top_p, top_k, max_tokens, seed, stop_token_ids, ignore_eos, detokenize
    ) -> SimpleNamespace:
        return SimpleNamespace(**locals())

    module, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, module.__version__ = LLM, sampling_params, "0.0"
    lora.LoRARequest = lambda *arguments: arguments
    for name, fake in (("vllm", module), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, fake)
    return calls


def test_vllm_gets_token_ids_seeds_and_limits_and_gives_the_same_records(vllm):
    options = {"revision": "v2", "trust_remote_code": False}
    engine = Vllm("model", GenerationSettings(max_new_tokens=12), end_ids=END, max_length=10, hub=options)
    # Left to itself vLLM would halve fp32 weights, and take nine tenths of a GPU that holds the trained model too
    assert vllm["options"] == {"model": "model", "dtype": "float32", "share": 0.4, "revision": "v2", "lora": None}
    drawn = engine.draw([[1, 2, 3]], [2**40 + 5])
    assert drawn[0].ids == [3, 7] and drawn[0].finish == "stop"
    assert vllm["prompts"] == [{"prompt_token_ids": [1, 2, 3]}]
    parameters = vllm["parameters"][0]
    assert (parameters.max_tokens, parameters.top_k, parameters.temperature) == (7, -1, 1.0)
    assert parameters.seed == (2**40 + 5) % 2**31 and parameters.stop_token_ids == [0, 7] and parameters.ignore_eos
    vllm["finish"] = "length"
    with pytest.raises(AssertionError, match="vLLM says length"):
        engine.draw([[1, 2, 3]], [5])


@pytest.mark.parametrize(("rank", "largest"), [(4, 8), (16, 16), (48, 64)])
def test_vllm_is_made_ready_for_the_adapters_rank(rank, largest, vllm):
    settings = GenerationSettings()
    engine = Vllm("base", settings, end_ids=END, max_length=10, precision="bf16", adapter=Path("a"), rank=rank)
    assert (vllm["options"]["lora"], vllm["options"]["dtype"]) == (largest, "bfloat16")
    engine.draw([[1]], [0])
    assert vllm["request"] == ("opponent", 1, "a")
    with pytest.raises(InputError, match="--rank 600"):
        Vllm("base", settings, end_ids=END, max_length=10, adapter=Path("a"), rank=600)


def test_vllm_is_gone_before_the_player_is_trained(vllm):
    game = make_game(generation={"engine": "vllm"}, max_length=48)
    game._vllm = engine = Vllm("model", game.generation, end_ids=END, max_length=10)
    last = weakref.ref(engine)
    del engine
    game.promote()
    assert last() is None and vllm["ended"] == 1  # told to end: without a word its processes keep the memory
    game._vllm = Vllm("model", game.generation, end_ids=END, max_length=10)
    last = weakref.ref(game._vllm)
    tokens = {"tokens": torch.tensor([[1, 2, 3]]), "begin": torch.tensor([1]), "end": torch.tensor([3])}
    batch = Batch(["a"], ["p"], tokens | {"opponent_score": torch.zeros(1)}, {}, [0])
    with torch.no_grad():
        game.scores(game.player, batch)
    assert last() is not None
    game.scores(game.player, batch)
    assert last() is None and vllm["ended"] == 2


@pytest.mark.parametrize("when", ["start", "draw"])
def test_vllm_that_fails_is_one_line_and_leaves_nothing_behind(when, vllm, monkeypatch):
    watches = []
    plain = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: watches.append(plain(command)) or watches[-1])
    vllm["fails"] = when
    with pytest.raises(InputError, match="--engine vllm: vLLM .*leave --engine out") as raised:
        Vllm("model", GenerationSettings(), end_ids=END, max_length=10).draw([[1]], [0])
    assert "\n" not in str(raised.value) and vllm["ended"] == (when == "draw")
    assert len(watches) == 1 and watches[0].returncode is not None


def test_vllm_is_refused_an_adapter_in_fp32_on_a_gpu(vllm):
    """Its kernels for adapters assert half precision there, when the first answer of round 2 is drawn."""
    with pytest.raises(InputError, match="--mixed_precision bf16"):
        check_vllm("no", "cuda", 16)
    for fine in (("bf16", "cuda", 16), ("no", "cuda", None), ("no", "cpu", 16)):
        check_vllm(*fine)


PARENT = """
import subprocess, sys, time
watch = subprocess.Popen([sys.executable, sys.argv[1], str(__import__("os").getpid())])
time.sleep(2)  # until it is running
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
time.sleep(2)
print(child.pid, watch.pid, flush=True)
time.sleep(300)
"""


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended, whether or not somebody has asked how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_killed_process_started_is_ended():
    """So that a run that is killed while vLLM draws does not hold the GPU's memory for good."""
    command = [sys.executable, "-c", PARENT, str(Path(generation.__file__).with_name("vllm_watch.py"))]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, watch = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    assert child.is_running() and watch.is_running()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while (left := [process for process in (child, watch) if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        process.kill()
    assert not left


def test_vllm_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # though it may be
    with pytest.raises(InputError, match=r"pip install 'spin-diffusion\[vllm\]'"):
        Vllm("model", GenerationSettings(), end_ids=END, max_length=10)
