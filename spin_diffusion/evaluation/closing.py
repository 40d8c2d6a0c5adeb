"""What is said below the tables of an evaluation: who wins, and what is compared although samples are missing."""

from spin_diffusion.evaluation.modalities import guidance_scales, modality_of
from spin_diffusion.evaluation.records import Results, Scale


def closing_lines(results: Results) -> list[str]:
    """Sentences for every guidance scale: who wins, and what `losses_of` says."""
    lines = []
    for scale in guidance_scales(results["protocol"]):
        at = "" if scale is None else f"At guidance {scale:g}: "
        lines += [at + place["sentence"] for place in results.get("ranking", []) if place["guidance_scale"] == scale]
        lines += losses_of(results, scale)
    return lines


def losses_of(results: Results, scale: Scale) -> list[str]:
    """Sentences: which models lack samples at a guidance scale, and what is compared for it; whose are broken."""
    plural, at = modality_of(results["protocol"]).plural, "" if scale is None else f" at guidance {scale:g}"
    counts = [count for count in results.get("samples", []) if count["guidance_scale"] == scale]
    lost = [
        f"{count['model']} lacks {count['missing']} of {count['asked']} {plural}"
        + (f" and the scores of {count['unscored']}" if count["unscored"] else "")
        + f", of {count['prompts_lost']} prompts"
        for count in counts
        if count["prompts_lost"]
    ]
    sentences = []
    if lost:
        left = next((row["num_prompts"] for row in results["results"] if row["guidance_scale"] == scale), 0)
        sentences.append(
            f"Only {left} of {results['protocol']['prompt_set']['num_prompts']} prompts are compared{at}: "
            f"{'; '.join(lost)}. They are left out for every model, and those that are left may be easier ones."
        )
    if broken := [f"{count['broken']} of {count['model']}" for count in counts if count["broken"]]:
        sentences.append(f"Broken {plural} (of one colour, empty) count with their scores{at}: {', '.join(broken)}.")
    return sentences
