"""What completes the commands in a shell: eval "$(spin-diffusion completion bash)", in zsh with `zsh`.

Completed are the commands, their settings, and the names of shipped presets behind --config.
"""

from spin_diffusion.cli.__main__ import COMMANDS
from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.diffusion.config import Config
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import types_of
from spin_diffusion.store.shipped import PRESETS, shipped_names

_SCRIPT = """_spin_diffusion() {{
    local words="{commands}"
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}}" in
        *--config) words="{presets}" ;;
        train) words="{trained}" ;;
        "train llm"*) words="{answers}" ;;
        train*|demo*|plan*) words="{images}" ;;
        evaluate*) words="{evaluation}" ;;
        compare*) words="{comparison}" ;;
        ?*) words="" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _spin_diffusion spin-diffusion"""


def completion(argv: list[str]) -> None:
    """Print the shell's lines."""
    if argv not in (["bash"], ["zsh"]):
        raise InputError("give the shell: spin-diffusion completion bash, or zsh")
    kinds = {"images": Config, "answers": LanguageConfig, "evaluation": EvaluateSettings, "comparison": CompareSettings}
    words = {name: [f"--{one}" for one in ("config", *types_of(kind))] for name, kind in kinds.items()}
    words["commands"] = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    words["trained"] = [name.split()[1] for name in COMMANDS if name.startswith("train ")]
    words["presets"] = shipped_names(PRESETS)
    if argv == ["zsh"]:
        print("autoload -U +X bashcompinit && bashcompinit")
    print(_SCRIPT.format(**{name: " ".join(said) for name, said in words.items()}))
