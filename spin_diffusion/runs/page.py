"""What the page of a run shows beside its scores: curves, what the rules of health said, costs, other measures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.record import COUNTED, FINAL, PREVIEW_SHEET, RoundRecord, find_record
from spin_diffusion.selfplay.train_settings import of_round
from spin_diffusion.store.files import read_json, read_json_lines
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import Damaged

_SHORTCUTS = {"generated": "real from generated", "decoder": "traces of the decoder in real ones"}
"""What the page shows of the shortcut probe."""
_OVERHEAD: dict[str, object] = dict.fromkeys(
    (
        "predicted_seconds",
        "predicted_memory_bytes",
        "samples",
        "samples_per_second",
        "flops",
        "matrix_share",
        "peak_memory_bytes",
    )
)
"""What is not known of the time between the phases."""


class _Curves(TypedDict):
    """What the page shows of the losses and scores of a step."""

    loss: Any
    r_real: Any
    r_generated: Any
    score_real: Any
    score_generated: Any
    implicit_accuracy: Any
    saturation: Any


class _Step(_Curves):
    """A line of metrics.jsonl, as far as the page shows it."""

    step: int


class _Plan(TypedDict):
    """plan.json, as far as the ledger shows it."""

    rounds: list[dict[str, object]]
    memory_bytes: dict[str, object]
    disk_bytes: Any


def round_name(config: RunConfig, k: int) -> str:
    """What the player of round k is called."""
    return f"{title_of(of_round(config.rounds.objective, k))} round {k}"


def rival_name(objective: str) -> str:
    """What the player of a rival is called."""
    return f"{objective}, same steps"


def run_folders(config: RunConfig, output_dir: Path) -> dict[str, Path]:
    """Names of the run and of its rivals, and their folders."""
    others = {rival_name(rival): output_dir / f"compare-{rival}" for rival in config.rivals}
    return {title_of(of_round(config.rounds.objective, 1)): output_dir} | others


def read_for_page(read: Callable[..., Any], path: Path, kind: Any) -> Any:
    """What a file has for the page, which does without it when there is none or it is damaged."""
    try:
        return read(path, kind, "the page does without it") if path.is_file() else None
    except Damaged as error:
        tell(str(error))
        return None


def page_of(config: RunConfig, output_dir: Path) -> dict[str, list[dict[str, object]]]:
    """The lists of results.json that come from the folders of the run and its rivals."""
    told: dict[str, list[dict[str, object]]] = {"measures": _measures(config, output_dir)}
    plan = read_for_page(read_json, output_dir / "plan.json", _Plan)
    for name, folder in run_folders(config, output_dir).items():
        for k in range(1, config.rounds.rounds + 1):
            where = folder / f"round-{k}"
            record, sheet = find_record(where), where / PREVIEW_SHEET
            rows: dict[str, list[dict[str, object]]] = {
                "curves": _curve(where),
                "events": _events(record) if record is not None else [],
                "selection": _selection(record) if record is not None else [],
                "previews": [{"file": sheet.relative_to(output_dir).as_posix()}] if sheet.is_file() else [],
                "ledger": _ledger(record, plan, k if folder == output_dir else None) if record is not None else [],
            }
            for kind, found in rows.items():
                told.setdefault(kind, []).extend({"model": name, "round": k} | row for row in found)
    return told


def _curve(folder: Path) -> list[dict[str, object]]:
    """Every step of a round, absolute r and scores."""
    steps = read_for_page(read_json_lines, folder / "metrics.jsonl", _Step) or []
    return [{key: step[key] for key in ("step", *_Curves.__annotations__)} for step in steps]


def _events(record: RoundRecord) -> list[dict[str, object]]:
    """What the rules of health said of a round."""
    if "training" not in record:
        return []
    ended = record["training"]["ended_by"]
    kept_step = {ended["rule"]: ended["kept_step"]} if ended is not None else {}
    return [{**event, "weights_from_step": kept_step.get(event["rule"])} for event in record["training"]["health"]]


def _selection(record: RoundRecord) -> list[dict[str, object]]:
    """How the steps of a round were judged."""
    selection = record["training"].get("selection") if "training" in record else None
    if selection is None:
        return []
    judge: dict[str, object] = {"by": selection["by"], "better": selection.get("better", "higher")}
    return [
        {**judge, "step": entry["step"], "value": entry["mean"]}
        | {"low": entry["low"], "high": entry["high"], "chosen": entry["step"] == selection["step"]}
        for entry in selection["curve"]
    ]


def _ledger(record: RoundRecord, plan: _Plan | None, planned_as: int | None) -> list[dict[str, object]]:
    """What each phase of a round took, beside what was predicted.

    Args:
        planned_as: number of the round in the plan; None = a rival's, which is not planned.
    """
    memory = plan["memory_bytes"] if plan is not None else {}
    memory = {"generated": memory.get("drawing"), "trained": memory.get("training")}
    predicted = next((entry for entry in plan["rounds"] if entry["round"] == planned_as), {}) if plan else {}
    entries: list[dict[str, object]] = []
    for phase in COUNTED:
        measured = record.get("ledger", {}).get(phase)
        if measured is not None and measured["samples"] != 0:
            prediction = {
                "predicted_seconds": predicted.get(phase),
                "predicted_memory_bytes": memory.get(phase) if predicted else None,
                "predicted_disk_bytes": plan["disk_bytes"] if plan else None,
            }
            entries.append({"phase": phase} | prediction | measured)
    if record["state"] in FINAL:
        overhead = sum(seconds for phase, seconds in record["seconds"].items() if phase not in COUNTED)
        entries.append({"phase": "overhead", "seconds": overhead} | _OVERHEAD)
    return entries


def _measures(config: RunConfig, output_dir: Path) -> list[dict[str, object]]:
    """The held-out gap and the shortcut probe of every round that has one, and of each rival's last."""
    last = config.rounds.rounds
    rounds: list[tuple[str, int | None, Path]] = [
        (round_name(config, k), k, output_dir / f"round-{k}") for k in range(1, last + 1)
    ]
    for name, folder in list(run_folders(config, output_dir).items())[1:]:
        rounds.append((name, None, folder / f"round-{last}"))
    entries: list[dict[str, object]] = []
    for name, k, folder in rounds:
        record = find_record(folder)
        if record is None:
            continue
        auc = record.get("shortcut", {}).get("auc", {})
        measured = {"held_out_gap": ("held-out gap, loss at r = 0 minus loss", record.get("held_out_gap"))}
        for key, what in _SHORTCUTS.items():
            title = f"before training, a linear probe: AUC of {what} (0.5 = none)"
            measured[f"shortcut_{key}"] = (title, auc.get(key))
        for name_, (title, interval) in measured.items():
            if interval is not None:
                bounds = {"value": interval["mean"], "low": interval["low"], "high": interval["high"]}
                entries.append({"model": name, "round": k, "name": name_, "title": title, "better": "none", **bounds})
    return entries
