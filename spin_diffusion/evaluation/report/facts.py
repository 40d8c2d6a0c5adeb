"""The page's small print: where the models came from, how samples were made, what each scorer is."""

from spin_diffusion.evaluation.modalities import modality_of, samples_per_prompt
from spin_diffusion.evaluation.records import Results, ScorerEntry
from spin_diffusion.evaluation.report.editions import edition_of
from spin_diffusion.evaluation.report.wording import Text, shortened

Facts = list[tuple[str, Text]]
"""Names and what is known under them."""


def banner_facts(results: Results) -> list[tuple[str, str]]:
    """The banner's small print."""
    protocol = results["protocol"]
    ran = sum(scorer["state"] == "run" for scorer in results["scorers"])
    headline = (results["headline"]["model"], results["headline"]["guidance_scale"])
    states = [a["state"] for a in results["alarms"] if (a["model"], a["guidance_scale"]) == headline]
    alarms = f"{_counted(states.count('alarm'), 'alarm')}, {_counted(states.count('warn'), 'warning')}"
    asked, scale = protocol["prompt_set"]["num_prompts"], results["headline"]["guidance_scale"]
    compared = next((row["num_prompts"] for row in results["results"] if row["guidance_scale"] == scale), asked)
    return [
        ("prompts compared", f"{compared:,}" if compared == asked else f"{compared:,} of {asked:,}"),
        (f"{modality_of(protocol).plural} per prompt", str(samples_per_prompt(protocol))),
        ("scorers run", f"{ran} of {len(results['scorers'])}"),
        ("alarms", alarms if states else "none computed"),
        ("protocol", protocol["id"][:12]),
    ]


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


def protocol_facts(results: Results) -> Facts:
    """How the samples were made, as far as it decides whether two evaluations may be compared."""
    protocol = results["protocol"]
    prompts = protocol["prompt_set"]
    facts = [
        ("protocol id", protocol["id"]),
        ("prompts", f"{prompts['name']}, {prompts['num_prompts']:,}"),
        ("prompts: SHA-256", prompts["sha256"]),
        ("prompts: licence", prompts["licence"]),
        ("prompts: source", prompts["source"]),
        (f"{modality_of(protocol).plural} per prompt", str(samples_per_prompt(protocol))),
        ("seed", str(protocol["seed"])),
        ("rule for seeds", protocol["seed_rule"]),
        *edition_of(results).how(protocol),
    ]
    return [(shortened(name, 60).short, shortened(value)) for name, value in facts]


def scorer_facts(scorer: ScorerEntry) -> Facts:
    """What is known of one scorer; nothing that is empty."""
    facts = [
        ("name", scorer["name"]),
        ("state", scorer["state"] + (f": {scorer['reason']}" if scorer["reason"] else "")),
        ("role", scorer["role"]),
        ("scale", scorer["scale"]),
        ("weights from", scorer["source"]),
        *((f"SHA-256 of {file}", value) for file, value in scorer["checkpoint"].items()),
        ("pixels", scorer["preprocessing"]),
        ("text", scorer["text"]),
        ("licence", scorer["licence"]),
        ("citation", scorer["citation"]),
    ]
    return [(shortened(name, 60).short, shortened(value, 300)) for name, value in facts if value]
