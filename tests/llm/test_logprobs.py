"""Log-probabilities of answers against the plain formula."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spin_diffusion.llm import logprobs
from spin_diffusion.llm.logprobs import AnswerScorer, answer_logprobs, applies_head_to_hidden_states, places_of

VOCABULARY = 97


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def gemma2() -> Gemma2ForCausalLM:
    """Caps its logits after the output layer."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5,
        )
    ).eval()  # fmt: skip
    return model


def lora() -> torch.nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of unequal length, filled up at the end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 14), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (begin, end) in enumerate([(3, 14), (5, 6), (1, 9)]):
        mask[row, begin:end] = True
        ids[row, end:] = 0
    return ids, mask


def plain(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The formula, a row and a token at a time, its softmax in fp64."""
    sums = []
    for row, of_row in zip(ids, mask, strict=True):
        places = of_row.nonzero()[:, 0].tolist()
        logits = model(input_ids=row[None, : places[-1] + 1]).logits[0].double()
        sums.append(sum(torch.log_softmax(logits[place - 1], 0)[row[place]] for place in places))
    return torch.stack(sums)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, lora])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_chunked_log_probabilities_equal_the_plain_ones(build, chunk, monkeypatch):
    model, (ids, mask) = build(), rows()
    if chunk is not None:
        monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk * VOCABULARY)
    found = answer_logprobs(model, ids, places_of(mask))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), plain(model, ids, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [llama, gemma2])
def test_their_gradients_equal_the_plain_ones(build, monkeypatch):
    model, (ids, mask) = build(), rows()
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * VOCABULARY)
    grads = []
    for sums in (answer_logprobs(model, ids, places_of(mask)), plain(model, ids, mask)):
        model.zero_grad()
        (sums.float() * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_logits_of_half_precision_are_summed_up_in_fp32():
    model = llama().bfloat16()
    model.lm_head.weight.data *= 8
    ids, mask = rows()
    found = answer_logprobs(model, ids, places_of(mask))
    # A log-probability near -50 rounded to bf16 is off by up to 0.1, and one of few logits that a CPU sums in another
    # order by less
    assert found.dtype == torch.float32 and torch.allclose(found.double(), plain(model, ids, mask), atol=1e-2)


def test_a_model_that_changes_its_logits_is_found_out():
    assert applies_head_to_hidden_states(llama()) and applies_head_to_hidden_states(gpt2())
    assert not applies_head_to_hidden_states(gemma2())


def test_logits_of_all_answer_tokens_are_never_there_at_once(monkeypatch):
    model, (ids, mask) = llama(), rows()
    seen, plain_head = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape[0]) or plain_head(x))
    applies_head_to_hidden_states(model)
    seen.clear()
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * VOCABULARY)
    answer_logprobs(model, ids, places_of(mask)).sum().backward()
    assert max(seen) == 4 and sum(seen) == 2 * int(mask.sum())  # once forward, once again backward


def test_what_fills_up_a_row_behind_its_answer_changes_nothing():
    model, (ids, mask) = llama(), rows()
    alone = answer_logprobs(model, ids[1:2, :6], places_of(mask[1:2, :6]))
    assert torch.allclose(answer_logprobs(model, ids, places_of(mask))[1:2], alone, atol=1e-5)


def test_an_answer_at_the_first_place_is_refused():
    ids, mask = rows()
    mask[0, 0] = True
    with pytest.raises(ValueError, match="nothing before it"):
        answer_logprobs(llama(), ids, places_of(mask))


def test_the_scorer_is_the_function():
    model, (ids, mask) = llama(), rows()
    assert torch.equal(AnswerScorer(model)(ids, places_of(mask)), answer_logprobs(model, ids, places_of(mask)))
