"""Tasks of lm-evaluation-harness: by a stand-in with the signatures of 0.4.13, and by the harness where it is there."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spin_diffusion.llm import lm_eval_tasks
from spin_diffusion.llm.config import HarnessTasks
from spin_diffusion.llm.lm_eval_tasks import check_tasks, metrics_of, run_tasks
from spin_diffusion.store.input_error import InputError
from tests.cli.test_language_script import play, refused, settings  # noqa: F401
from tests.llm.playing import LANGUAGE, make_game

QUESTIONS, LIMIT = 24, 16


@pytest.fixture(autouse=True)
def fresh_index():
    """What is known of the tasks is kept for a process; a test has a process of its own, so to say."""
    lm_eval_tasks._index.cache_clear()
    yield
    lm_eval_tasks._index.cache_clear()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two tasks of the user's own: which of two answers is the likelier one, and an answer of eight tokens."""
    lines = (LANGUAGE / "data" / "held_out.jsonl").read_text().splitlines()[: 2 * QUESTIONS : 2]
    said = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(
        json.dumps({"question": asked, "answer": answer, "choices": [said[place - 1][1], answer]}) + "\n"
        for place, (asked, answer) in enumerate(said)
    ))  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rest in (
        ("toy_choice", {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 1,
                        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}),
        ("toy_answer", {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
                        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}),
    ):  # fmt: skip
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test", "doc_to_text": "{{question}}"} | rest  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


class StandIn:
    """The harness's functions as 0.4.13 has them, and what they do to what they are given."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.indices: list[tuple[Any, bool]] = []
        package, models, tasks, huggingface = (
            ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.tasks", "lm_eval.models.huggingface")
        )
        stand_in = self

        class TaskManager:
            def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None) -> None:
                stand_in.indices.append((include_path, include_defaults))
                found = ["toy_choice", "toy_answer"] if include_path else []
                self.all_tasks = found + (["gsm8k"] if include_defaults else [])

        class HFLM:
            def __init__(
                self, pretrained, backend="default", revision="main", subfolder="", tokenizer=None, truncation=False,
                logits_cache=True, max_length=None, device="cuda", dtype="auto", softmax_dtype=None,
                mixed_precision_dtype=None, batch_size=1, max_batch_size=64, trust_remote_code=False,
                use_fast_tokenizer=True, add_bos_token=None, prefix_token_id=None,
            ) -> None:  # fmt: skip
                pretrained.eval()
                tokenizer.pad_token = tokenizer.eos_token
                self.model, self.tokenizer, self.mixed_precision_dtype = pretrained, tokenizer, mixed_precision_dtype
                assert softmax_dtype == "float32"

        def simple_evaluate(
            model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, max_batch_size=None, device=None,
            use_cache=None, cache_requests=False, rewrite_requests_cache=False, delete_requests_cache=False, limit=None,
            samples=None, bootstrap_iters=100000, check_integrity=False, write_out=False, log_samples=True,
            evaluation_tracker=None, system_instruction=None, apply_chat_template=False, fewshot_as_multiturn=True,
            gen_kwargs=None, task_manager=None, verbosity=None, predict_only=False, random_seed=0,
            numpy_random_seed=1234, torch_random_seed=1234, fewshot_random_seed=1234, confirm_run_unsafe_code=False,
            metadata=None,
        ) -> dict[str, Any]:  # fmt: skip
            random.seed(random_seed)
            np.random.seed(numpy_random_seed)
            torch.manual_seed(torch_random_seed)
            assert isinstance(model, HFLM) and isinstance(task_manager, TaskManager) and not model.model.training
            if "broken" in tasks[0]:
                raise FileNotFoundError("Unable to find\n'gone.jsonl'")
            stand_in.asked = {"tasks": tasks, "limit": limit, "chat": apply_chat_template, "model": model}
            return {"results": RESULTS, "higher_is_better": HIGHER_IS_BETTER}

        package.simple_evaluate, tasks.TaskManager, huggingface.HFLM = simple_evaluate, TaskManager, HFLM
        self.modules = {module.__name__: module for module in (package, models, tasks, huggingface)}


# As 0.4.13 returned them
RESULTS = {
    "toy_choice": {
        "name": "toy_choice", "alias": "toy_choice", "sample_len": 20, "acc,none": np.float64(0.75),
        "acc_stderr,none": 0.1,
    },
    "gsm8k": {
        "alias": "gsm8k", "sample_len": 2, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A",
        "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.5,
    },
    "toy_group": {"alias": "toy_group", "sample_len": 4, "acc,none": 1.0, "acc_stderr,none": np.float64(0.0),
                  "sample_count": {"acc,none": 2}},
}  # fmt: skip
HIGHER_IS_BETTER = {"toy_choice": {"acc": True}, "gsm8k": {"exact_match": True}, "toy_group": {"acc": None}}


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    found = StandIn()
    for name, module in found.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_metrics_have_the_harness_interval_and_other_numbers_are_none():
    found = metrics_of(RESULTS, HIGHER_IS_BETTER)
    asked = ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert list(found) == ["toy_choice/acc,none", *(f"gsm8k/{metric}" for metric in asked), "toy_group/acc,none"]
    choice = found["toy_choice/acc,none"]
    assert choice == {"title": "toy_choice, acc", "value": 0.75, "low": pytest.approx(0.5407, abs=1e-4),
                      "high": pytest.approx(0.9593, abs=1e-4), "better": "higher"}  # fmt: skip
    strict = found["gsm8k/exact_match,strict-match"]
    assert strict["low"] is None and strict["title"] == "gsm8k, exact_match (strict-match)"
    assert found["gsm8k/exact_match,flexible-extract"]["high"] == pytest.approx(0.5 + 12.706 * 0.5, abs=1e-3)
    group = found["toy_group/acc,none"]
    assert group["better"] == "none" and group["low"] is group["high"] is None, "4 of 4 are not all there will be"


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_player_is_asked_and_left_as_it_was(use_lora, stand_in, folder):
    game = make_game(precision="bf16", checkpointing=True, use_lora=use_lora)
    pad = game.tokenizer.pad_token
    # Without the place in Python's own numbers, of which the checks of types take some
    states = random.getstate()[1][:-1], np.random.get_state()[1].tolist(), torch.get_rng_state()
    run_tasks(game, HarnessTasks(["toy_choice"], str(folder), limit=3, chat_template=True))
    asked = stand_in.asked
    assert (asked["tasks"], asked["limit"], asked["chat"]) == (["toy_choice"], 3, True)
    harness = asked["model"]
    assert harness.model is (game.model.get_base_model() if use_lora else game.model)
    assert harness.mixed_precision_dtype == "bfloat16"
    # Neither the mode, nor the tokenizer, nor the generators may reach the next round
    assert all(module.training for module in game.model.modules()) and game.tokenizer.pad_token == pad
    assert random.getstate()[1][:-1] == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_harness_own_tasks_are_read_only_if_one_is_asked_for(stand_in, folder):
    check_tasks(HarnessTasks(["toy_choice", str(folder / "toy_answer.yaml")], str(folder)))
    assert stand_in.indices == [(str(folder), False)]
    check_tasks(HarnessTasks(["toy_choice", "gsm8k"], str(folder)))
    assert stand_in.indices[1:] == [(str(folder), False), (str(folder), True)]
    check_tasks(HarnessTasks(["toy_choice", "gsm8k"], str(folder)))
    assert len(stand_in.indices) == 3


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [
        (HarnessTasks(["nosuch"]), ["--lm_eval tasks nosuch", "no such task", "folder: ..."]),
        (HarnessTasks(["nowhere/at_all.yaml"]), ["--lm_eval tasks nowhere/at_all.yaml", "no such file"]),
    ],
)
def test_unknown_tasks_are_refused(tasks, parts, stand_in):
    with pytest.raises(InputError) as error:
        check_tasks(tasks)
    assert all(part in str(error.value) for part in parts)


def test_what_the_harness_cannot_read_is_said_on_one_line(stand_in, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken")
    with pytest.raises(InputError, match="broken.yaml: Unable to find 'gone.jsonl'"):
        run_tasks(make_game(), HarnessTasks([str(broken)]))


def test_the_chat_template_is_asked_for_where_there_is_one(stand_in, folder):
    game = make_game()
    game.tokenizer.chat_template = None
    with pytest.raises(InputError, match="--lm_eval chat_template.*--chat_template"):
        run_tasks(game, HarnessTasks(["toy_choice"], str(folder), chat_template=True))


def test_tasks_are_measures_of_the_base_and_every_round(stand_in, settings, folder, tmp_path):  # noqa: F811
    argv = ["--rounds", "1", "--lm_eval", f"{{folder: '{folder}', tasks: [toy_choice], limit: 5}}"]
    assert play(tmp_path, settings, *argv) == 0
    measures = json.loads((tmp_path / "out" / "results.json").read_text())["measures"]
    found = [(measure["model"], measure["value"]) for measure in measures if measure["name"] == "toy_choice/acc,none"]
    assert found == [("base", 0.75), ("space round 1", 0.75)] and stand_in.asked["limit"] == 5


def test_tasks_that_would_never_be_run_are_refused(stand_in, settings, tmp_path, capsys):  # noqa: F811
    settings |= {"held_out_dataset_name": None, "num_held_out": 0, "lm_eval": {"tasks": ["gsm8k"]}}
    refused(capsys, play(tmp_path, settings), "--lm_eval tasks", "--num_held_out")


def test_the_harness_finds_what_our_own_scores_say(folder):
    """Skipped where the harness is not installed."""
    pytest.importorskip("lm_eval")
    game = make_game()
    tasks = HarnessTasks(["toy_choice", "toy_answer"], str(folder), limit=LIMIT)
    found = run_tasks(game, tasks)
    encode = game.tokenizer
    rows = [json.loads(line) for line in (folder.parent / "questions.jsonl").read_text().splitlines()][:LIMIT]
    better = []
    for row in rows:
        asked = encode(row["question"], add_special_tokens=False)["input_ids"]
        whole = [
            encode(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]
        ]
        wrong, right = game.log_likelihood([asked] * 2, [ids[len(asked) :] for ids in whole])
        better.append(right > wrong)
    assert found["toy_choice/acc,none"]["value"] == pytest.approx(sum(better) / LIMIT)
    assert 0 < sum(better) < LIMIT and found["toy_answer/exact_match,none"]["value"] == 0
    with pytest.raises(InputError, match="no such task"):
        check_tasks(replace(tasks, names=("nosuch",)))
