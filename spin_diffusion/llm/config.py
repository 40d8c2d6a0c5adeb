"""Settings of a language-model run: frozen dataclasses, one per topic, read from YAML and the command line."""

from dataclasses import dataclass
from typing import Literal

from spin_diffusion.data.settings import TextDataSettings
from spin_diffusion.evaluation.settings import AnyEvaluationSettings, RunConfig, check_selection
from spin_diffusion.llm.settings import GenerationSettings, LanguageModelSettings
from spin_diffusion.selfplay.round_settings import OpponentName, RoundSettings, objective_of, objectives_of
from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.selfplay.train_settings import Scheduler, TrainSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import parse
from spin_diffusion.store.settings import PerRound, Settings, setting


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """The base checkpoint."""

    model_name_or_path: str | None = setting(None, first=True)
    """Hub id or local folder of a causal language model in transformers' layout, with its tokenizer; or of a LoRA
    adapter (PEFT) on one, which is merged into it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    chat_template: str | None = None
    """File with a chat template (Jinja) for a tokenizer that has none, or instead of its own."""
    chat_template_kwargs: dict[str, object] | None = None
    """Arguments of the chat template, such as '{enable_thinking: false}': for prompts and answers, in training and
    evaluation, and in the tokenizer that is saved with the player."""


@dataclass(frozen=True)
class LanguageRoundSettings(RoundSettings):
    """The game that is played. A list holds one value per round; when it is shorter, its last value repeats."""

    rounds: int = 5
    """Rounds of self-play, counted from 1."""
    objective: PerRound[str] = "space"
    """The loss of a pair, or a file with a `loss` of your own. dpo takes the generated side from the data set's own
    rejected answers, sft needs none, all others play the opponent; mapo and dro are for denoising errors."""
    beta: PerRound[float | Literal["auto"]] = 1.0
    """Temperature on r, a sum of log-probabilities in nats. SPACE has none, which is 1; SPIN's lambda is this."""
    opponent: OpponentName = "latest"
    """Which earlier selves draw the generated answers and anchor the score: latest, base, last_two (half each), pool
    (all), ema (a moving average of the player's weights, by --ema_decay)."""
    samples_per_shard: int = 512
    """Real answers per file, and what is drawn for them; what a killed process loses at most."""
    stop_when_learnt: bool = False
    """End the run with a round whose held-out gap is not above 0; that round is rejected. Needs held-out answers."""


@dataclass(frozen=True)
class LanguageTrainSettings(TrainSettings):
    """How a round is trained. A list holds one value per round; when it is shorter, its last value repeats."""

    max_train_steps: PerRound[int] | None = None
    """Optimizer steps in each round; default: --num_train_epochs."""
    num_train_epochs: PerRound[float] | None = 2.0
    """Times that a round sees each real answer."""
    learning_rate: PerRound[float] = 5e-7
    """Initial learning rate (after warm-up)."""
    lr_scheduler: Scheduler = "linear"
    """How the rate goes on after warm-up: to 0 in a line or half a cosine, or not at all."""
    lr_warmup_steps: PerRound[int | float] = 0.1
    """Optimizer steps of warm-up in each round; below 1 the share of the round's steps."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "rmsprop", "sgd"] = "rmsprop"
    """adamw_8bit needs the extra `8bit` and a CUDA device; rmsprop and sgd have no momentum."""
    adam_weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class HarnessTasks:
    """What lm-evaluation-harness is asked for."""

    tasks: list[str] | None = None
    """Names of tasks or groups, or paths of task files (YAML)."""
    folder: str | None = None
    """With task files of the user's own, whose names `tasks` then knows."""
    limit: int | None = setting(None, minimum=1)
    """Examples of each task; None = all."""
    chat_template: bool = False
    """Whether questions go through the chat template. Published figures are usually without."""


@dataclass(frozen=True)
class AnswerEvaluationSettings(AnyEvaluationSettings):
    """What is measured after every round, on held-out prompts."""

    judges: list[str] | None = None
    """NAME[=PATH] of judges (log_likelihood, reward_model=PATH_OR_ID, length, ...), or paths of .py files; default:
    log_likelihood."""
    max_validation_prompts: int | None = setting(200, minimum=1)
    """Distinct held-out prompts that are answered for the page; held-out scores use all held-out answers."""
    num_validation_answers: int = setting(1, minimum=1)
    """Answers of each prompt, each with a seed of its own that all models share. Diversity needs 2 or more."""
    lm_eval: HarnessTasks = HarnessTasks()
    """Tasks or groups of lm-evaluation-harness, or task files (YAML), for the base and every round: "{tasks: [gsm8k,
    ifeval], limit: 100, chat_template: true}"; folder = where task files of your own lie. Needs the extra `lm-eval`."""


@dataclass(frozen=True)
class LanguageConfig(RunConfig):
    """All settings of a run."""

    model: CheckpointSettings
    data: TextDataSettings
    language: LanguageModelSettings
    generation: GenerationSettings
    rounds: LanguageRoundSettings
    training: LanguageTrainSettings
    evaluation: AnswerEvaluationSettings
    run: RunSettings

    def __post_init__(self) -> None:
        _check(self)


def parse_language_config(argv: list[str] | None = None) -> LanguageConfig:
    """The settings on the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    return parse(LanguageConfig, argv, listed=("judges",))


def _check(config: LanguageConfig) -> None:
    """Ranges and rules across settings. Each message names the flags and their values."""
    if not config.model.model_name_or_path:
        raise InputError("--model_name_or_path is missing: give a hub id or a local folder")
    for name in objectives_of(config.rounds):
        if name in ("mapo", "dro"):
            raise InputError(
                f"--objective {name} is made for denoising errors, not for log-probabilities: give another"
            )
    if config.data.dataset_name is None:
        raise InputError("give the training data: --dataset_name (hub id, folder, JSONL or parquet file)")
    if config.rounds.beta == "auto" or isinstance(config.rounds.beta, list) and "auto" in config.rounds.beta:
        raise InputError("--beta auto is for denoising errors; log-probabilities have their own scale: give 1")
    if config.training.select_by != "gap":
        raise InputError(
            f"--select_by {config.training.select_by}: the steps of a language model are judged by their gap alone"
        )
    check_selection(config, config.data.holds_out)
    if config.rounds.stop_when_learnt and not config.data.holds_out:
        raise InputError("--stop_when_learnt needs held-out answers: give --num_held_out or --held_out_dataset_name")
    if config.evaluation.lm_eval.tasks and not config.data.holds_out:
        raise InputError(
            "--lm_eval tasks are run when a round is evaluated, which needs held-out answers: give --num_held_out or "
            "--held_out_dataset_name"
        )
    if config.evaluation.promote_if != "always" and not (config.data.holds_out and config.evaluation.eval_every_round):
        raise InputError(
            f"--promote_if {config.evaluation.promote_if} needs held-out answers (--num_held_out or "
            "--held_out_dataset_name) and --eval_every_round true"
        )
    if config.generation.max_new_tokens >= config.language.max_length:
        raise InputError(
            f"--max_new_tokens {config.generation.max_new_tokens} must be below --max_length "
            f"{config.language.max_length}, which holds the prompt too"
        )


def warnings_of(config: LanguageConfig) -> list[str]:
    """What is allowed and moves the result away from what the theory says, each in a sentence."""
    found = config.generation.warnings()
    rounds = config.rounds
    objectives = [objective_of(name) for name in objectives_of(rounds)]
    mu = (rounds.objective_options or {}).get("mu", rounds.num_generated)
    if "space" in objectives_of(rounds) and mu != rounds.num_generated:
        found.append(
            f"--objective_options mu {mu:g} is not --num_generated {rounds.num_generated}: the loss weighs the "
            "generated answers as if there were more or fewer of them; it is still consistent, with another variance"
        )
    betas = [rounds.numbers(k)["beta"] for k in range(1, rounds.rounds + 1)]
    if "spin" in objectives_of(rounds) and min(betas) <= 0.5 and any(o.generated == "opponent" for o in objectives):
        found.append(
            f"--objective spin with --beta {min(betas):g}: a round that is trained to its end multiplies the model's "
            f"error by {1 - 1 / min(betas):.3g} and does not settle (stable above 0.5, exact at 1)"
        )
    if "space" in objectives_of(rounds) and any(beta != 1 for beta in betas):
        found.append("--objective space with a --beta other than 1: its theorem is for 1, the density's own scale")
    return found
