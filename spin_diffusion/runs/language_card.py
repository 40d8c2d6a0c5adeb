"""The model card of a language run, and what of it goes to the hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.llm.base import base_of
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.llm.game import ADAPTER, MODEL
from spin_diffusion.runs import publish
from spin_diffusion.runs.publish import UPLOADED, objective_fact, round_facts, write_card


def write_model_card(output_dir: Path, config: LanguageConfig, rows: int, comparisons: Sequence[Comparison]) -> None:
    """Write README.md: base, data, settings, the table with its intervals."""
    uses_adapter = config.language.use_peft
    write_card(
        output_dir,
        config,
        Path(__file__).parent / "language_card.md.j2",
        base=str(config.model.model_name_or_path),
        facts=_facts(config, rows),
        comparisons=comparisons,
        samples="answers",
        library="peft" if uses_adapter else "transformers",
        task="text-generation",
        uses_adapter=uses_adapter,
        base_code=base_of(config).code(),
        argument=json.dumps(config.run.hub_model_id or str(output_dir / (ADAPTER if uses_adapter else MODEL))),
    )


def push_to_hub(output_dir: Path, config: LanguageConfig) -> str:
    """Upload card, report and, at the root, the model or adapter; return the address. Raises as
    `publish.push_to_hub`."""
    folder = output_dir / (ADAPTER if config.language.use_peft else MODEL)
    return publish.push_to_hub(output_dir, config, UPLOADED, at_root=folder if folder.is_dir() else None)


def _facts(config: LanguageConfig, rows: int) -> list[tuple[str, Any]]:
    rounds, generation, language = config.rounds, config.generation, config.language
    return [
        ("answers", f"{rows} from `{config.data.dataset_name}`"),
        objective_fact(config),
        ("opponent", f"{rounds.opponent}, {rounds.num_generated} to each real answer, {generation.describe()}"),
        *round_facts(config, rows),
        ("optimizer", config.training.optimizer),
        ("trained", f"LoRA of rank {language.lora_r}, alpha {language.lora_alpha:g}" if language.use_peft
                    else "all weights"),
        ("seed", rounds.seed),
    ]  # fmt: skip
