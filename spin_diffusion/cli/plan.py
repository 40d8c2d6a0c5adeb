"""Say before a run what it will take: time, disk and memory, from its settings and a probe of a minute.

    spin-diffusion plan --config sdxl_full_80gb --train_data_dir MY_PICTURES
    spin-diffusion plan --plateau --config sdxl_full_80gb --train_data_dir MY_PICTURES
    python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 -m spin_diffusion.cli plan --config ...

Takes the settings of `spin-diffusion train` as they are, those of images and those of language. The run's report shows
the plan beside what it really took. With --plateau it says whether the base is one that self-play can improve: in
OUTPUT_DIR-plateau it fine-tunes the base for the steps of a round at each of four rates (0.1, 0.3, 1 and 3 times the
run's) and asks whether held-out real samples have gained by any. The plan says what that costs.
"""

from importlib import import_module

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.store.input_error import InputError

KINDS = ((parse_config, "image_run", "ImageRun"), (parse_language_config, "language_run", "LanguageRun"))
"""What reads the settings of each kind of run, its module and its class. They are imported after the settings were
read: a misspelt flag is not answered only when all libraries are there."""


def plan(argv: list[str]) -> None:
    """Probe, or fine-tune, with the first kind of run whose settings these are."""
    errors, question = [], "plateau_run" if "--plateau" in argv else "plan_run"
    argv = [word for word in argv if word != "--plateau"]
    for parse, module, kind in KINDS:
        try:
            config = parse(argv)
        except InputError as error:
            errors.append(error)
            continue
        run = getattr(import_module(f"spin_diffusion.runs.{module}"), kind)(config)
        getattr(import_module("spin_diffusion.runs.run"), question)(run)
        return
    # A setting that one kind of run does not know at all says nothing of the others
    raise next((error for error in errors if "unknown setting" not in str(error)), errors[0])
