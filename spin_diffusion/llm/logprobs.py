"""Log-probabilities of answers: the score of a language model.

The output layer is applied to the answers' positions alone, a chunk of them at a time, and each chunk's logits are
recomputed in the backward pass. So a vocabulary of 150,000 never stands beside batch and length in memory.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_LOGITS = 2**26
"""fp32 logits that are in memory at once: 256 MB."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, below PEFT's wrapping; active adapters are inside of its layers."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def places_of(answer_mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " tokens"]:
    """Where the answers' tokens lie in the flattened batch.

    A mask on a GPU is waited for: nobody else knows how many they are.

    Raises:
        ValueError: an answer that begins at the first place.
    """
    if answer_mask[:, 0].any():
        raise ValueError("an answer's first token has nothing before it that could predict it: give a prompt or a bos")
    return answer_mask.flatten().nonzero()[:, 0]


def answer_logprobs(
    model: nn.Module, token_ids: Int[Tensor, "batch length"], places: Int[Tensor, " tokens"]
) -> Float[Tensor, " batch"]:
    """log p(answer | what stands before it), summed over the answer's tokens, in nats, fp32.

    Args:
        model: a causal language model of transformers, or one with PEFT adapters.
        token_ids: prompts and answers, filled up at the end, which no token before it sees.
        places: `places_of` the answers' tokens, the end token among them.
    """
    causal = language_model(model)
    targets = token_ids.flatten()[places].long()
    inputs = {"input_ids": token_ids.long(), "use_cache": False}
    if applies_head_to_hidden_states(causal):
        states, head = causal.base_model(**inputs).last_hidden_state, causal.get_output_embeddings()
    else:
        states, head = causal(**inputs).logits, nn.Identity()
    states = states.flatten(0, 1)[places - 1]  # what is said at a token is said of the next one
    chunk = max(1, CHUNK_LOGITS // causal.config.get_text_config().vocab_size)
    if len(targets) <= chunk:
        found = [_chunk(head, states, targets)]  # all that may be in memory at once: nothing to compute again
    else:
        found = [
            checkpoint(_chunk, head, states[start : start + chunk], targets[start : start + chunk], use_reentrant=False)
            for start in range(0, len(targets), chunk)
        ]
    # Scattered and summed rather than added by index, whose order on a GPU is not fixed. The first column is empty
    by_place = torch.zeros(token_ids.numel(), dtype=torch.float32, device=token_ids.device)
    return by_place.scatter(0, places, torch.cat(found)).view(token_ids.shape)[:, 1:].sum(dim=1)


def _chunk(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """log p of each target, fp32."""
    logits = head(states).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)


def applies_head_to_hidden_states(causal: PreTrainedModel) -> bool:
    """Whether logits are just the output layer's, so that it may be applied in chunks.

    Some families scale or cap their logits afterwards (Gemma 2, Cohere, Granite). Found out once per model by a
    comparison on a few tokens.
    """
    if not hasattr(causal, "_logits_are_the_heads"):
        head, device = causal.get_output_embeddings(), next(causal.parameters()).device
        ids = torch.arange(1, 5, device=device)[None] % causal.config.get_text_config().vocab_size
        trained = causal.training
        causal.eval()
        with torch.no_grad():
            same = head is not None and torch.allclose(
                head(causal.base_model(input_ids=ids, use_cache=False).last_hidden_state),
                causal(input_ids=ids, use_cache=False).logits,
                rtol=1e-4,
                atol=1e-4,
            )
        causal.train(trained)
        causal._logits_are_the_heads = bool(same)
    return causal._logits_are_the_heads


class AnswerScorer(nn.Module):
    """A language model as a function (tokens, answers' places) -> scores: what is trained and wrapped for processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_ids: Int[Tensor, "batch length"], places: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " batch"]:
        """See `answer_logprobs`."""
        return answer_logprobs(self.model, token_ids, places)
