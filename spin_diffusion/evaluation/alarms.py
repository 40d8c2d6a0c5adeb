"""Alarms: signs that a model won its scores without better pictures or answers. Each compares it with the base, paired.

A preference score can be raised by a texture, by colours that shout, by one style for every prompt, or by drawing the
same picture for every seed; of answers by their length, by loops, or by the training data word for word. Each of these
leaves a trace that costs nothing to measure. Every alarm is a function of both models to an `Alarm`; `check_alarms`
runs all of them for one model.

When an effect counts is in `alarm_rules`; how often a model that is the same as the base sets an alarm off stands in
`check_alarms`. To add an alarm of pictures or of answers, write one function in `picture_alarms` or `answer_alarms` and
call it there; one of scores or prompts here.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from spin_diffusion.evaluation.alarm_rules import Alarm, normalised, not_run, raised, signed, trained_among
from spin_diffusion.evaluation.answer_alarms import Answers, answer_alarms
from spin_diffusion.evaluation.picture_alarms import Pictures, picture_alarms
from spin_diffusion.evaluation.records import AlarmState, Role
from spin_diffusion.evaluation.statistics import mean_interval

LEAKED_SHARE = 0.05
"""Share of the evaluation's prompts that were trained on too, 0 to 1; a single one is a warning."""
Scores = Mapping[str, np.ndarray]
"""Scorer -> (prompts, samples), finite."""


def check_alarms(
    baseline: Pictures | Answers,
    candidate: Pictures | Answers,
    *,
    baseline_scores: Scores,
    candidate_scores: Scores,
    roles: Mapping[str, Role],
    previous: Scores | None = None,
    training_prompts: Iterable[str] | None = None,
) -> list[Alarm]:
    """All alarms for one model at one guidance scale against the base, always the same ones in the same order.

    False alarms: of 1000 simulated evaluations of a model that is the same as the base (200 prompts, 4 images, 6
    scorers, features of 32 numbers, 1 % broken images), 2 had an alarm and 12 a warning other than stagnation, which
    rightly warned in 938. Of 300 of answers (200 prompts, 4 answers of 10 to 30 random words, 5 % of them cut, 3
    judges), none had an alarm and 4 a warning other than stagnation, which rightly warned in 281. The simulations are
    kind: real samples of one prompt go wrong together, for example.

    Args:
        baseline: pictures, or answers to at least 2 prompts.
        candidate: those of the model, to the same prompts and seeds.
        roles: scorer -> its role; at least the scorers that both have.
        previous: the scores of the round before. None = there is none.
        training_prompts: what the model was trained with. None = not known.

    Raises:
        ValueError: samples whose shapes do not match, numbers that are not finite, or fewer than 2 prompts.
    """
    differences = differences_of(candidate_scores, baseline_scores)
    if isinstance(baseline, Pictures):
        prompts, what = baseline.prompts, "training captions"
    else:
        prompts, what = list(dict.fromkeys(row[0].prompt for row in baseline)), "training prompts"
    keys = [normalised(prompt) for prompt in prompts]
    trained = None if training_prompts is None else trained_among(training_prompts, keys)
    if isinstance(baseline, Pictures):
        assert isinstance(candidate, Pictures)
        of_samples = [aesthetics_up_alignment_down(differences, roles), *picture_alarms(baseline, candidate)]
    else:
        assert not isinstance(candidate, Pictures)
        of_samples = answer_alarms(baseline, candidate, trained)
    num_leaked = None if trained is None else sum(key in trained for key in keys)
    leak = training_leak(num_leaked, len(prompts), what)
    if not candidate_scores:
        leak = not_run("training_leak", "no scorer was run: the prompts are there to be looked at, not an exam")
    return [
        goodhart(differences, roles),
        *of_samples,
        leak,
        stagnation(candidate_scores, previous, roles),
    ]


def differences_of(candidate: Scores, base: Scores) -> dict[str, np.ndarray]:
    """Scorer that both have -> (prompts,) candidate minus base, over the mean of the samples."""
    return {name: (scores - base[name]).mean(axis=1) for name, scores in candidate.items() if name in base}


def goodhart(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """The scorer that training pleases goes up while one that it does not know goes down.

    Args:
        differences: scorer -> (prompts,) model minus base.
    """
    what = (
        "The model pleases {up} more, which was trained on the same preferences, but is worse by {down}: it is "
        "learning the scorer and not what people like. Use an earlier round, a smaller learning rate or fewer steps, "
        "and look at the prompts that lose most by {names}."
    )
    return _opposed("goodhart", differences, roles, "in-domain", ("truth", "held-out", "alignment"), what)


def aesthetics_up_alignment_down(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """Images get more beautiful and show less of what the prompt asks for; the arguments are those of `goodhart`."""
    what = (
        "Images are more beautiful by {up} and match their prompts less by {down}: the model paints what it likes. "
        "Look at the prompts that lose most by {names}, and use an earlier round or captions that say what the "
        "training images show."
    )
    return _opposed("aesthetics_up_alignment_down", differences, roles, "aesthetics", ("alignment",), what)


def _opposed(
    alarm: str,
    differences: Mapping[str, np.ndarray],
    roles: Mapping[str, Role],
    up_role: Role,
    down_roles: tuple[Role, ...],
    what: str,
) -> Alarm:
    """The alarm of a scorer that rises while another falls; the value is the upper end of the fall's interval.

    The more scorers could fall by chance, the wider their intervals (Bonferroni): otherwise a model that truly gains
    would set the alarm off the more often, the more scorers watch it.
    """
    ups = [name for name in differences if roles[name] == up_role]
    downs = [name for name in differences if roles[name] in down_roles]
    if not ups or not downs:
        missing = up_role if not ups else " or ".join(down_roles)
        return not_run(alarm, f"no {missing} scorer was run for both models")
    risen = {name: mean_interval(differences[name], 1 - 0.05 / len(ups)) for name in ups}
    risen = {name: interval for name, interval in risen.items() if interval.low > 0}
    wide = {name: mean_interval(differences[name], 1 - 0.05 / len(downs)) for name in downs}
    # Scorers have different units: in units of its own half-width, the fall that is clearest comes first
    clearest = min(wide, key=lambda name: wide[name].high / max(wide[name].high - wide[name].low, 1e-300))
    value = wide[clearest].high
    if risen:
        plain = {name: mean_interval(differences[name], 0.95) for name in downs}
        surely = [name for name in downs if wide[name].high < 0]
        perhaps = [name for name in downs if plain[name].high < 0]
        if surely or perhaps:
            up = ", ".join(f"{name} ({signed(interval)})" for name, interval in risen.items())
            down = ", ".join(f"{name} ({signed(wide[name])})" for name in surely or perhaps)
            text = what.format(up=up, down=down, names=" and ".join(surely or perhaps))
            if not surely:
                text += " With this many scorers it may still be chance: use more prompts to be sure."
            return Alarm(alarm, "alarm" if surely else "warn", value, 0.0, text)
    if not risen:
        text = f"No {up_role} scorer rises, so nothing is bought with another score."
    else:
        text = f"{', '.join(risen)} rises, and none of {', '.join(downs)} falls."
    return Alarm(alarm, "ok", value, 0.0, text)


def training_leak(num_leaked: int | None, num_prompts: int, what: str = "training captions") -> Alarm:
    """The model was trained on the prompts it is examined with.

    Args:
        num_leaked: prompts that were trained on too. None = not known.
        what: the prompts of training are called.
    """
    if num_leaked is None or not num_prompts:
        return not_run("training_leak", f"the {what} are not known")
    share = num_leaked / num_prompts
    state: AlarmState = "alarm" if share > LEAKED_SHARE else "warn" if num_leaked else "ok"
    numbers = f"{num_leaked} of {num_prompts} prompts are {what} too."
    advice = "The model has seen the answers to these: leave them out, or take another prompt set."
    return raised("training_leak", share, LEAKED_SHARE, state, numbers, advice)


def stagnation(
    candidate: Mapping[str, np.ndarray],
    previous: Mapping[str, np.ndarray] | None,
    roles: Mapping[str, Role],
) -> Alarm:
    """No scorer tells this round from the one before. A reason to stop, not to distrust: "warn" at most.

    The value is the number of scorers that see a difference, by intervals that hold together at 95 % (Bonferroni).
    Scorers of the role "drift" are left out.
    """
    if previous is None:
        return not_run("stagnation", "there is no round before this one to compare with")
    differences = differences_of(candidate, previous)
    differences = {name: array for name, array in differences.items() if roles[name] != "drift"}
    if not differences:
        return not_run("stagnation", "no scorer was run for both rounds")
    confidence = 1 - 0.05 / len(differences)
    intervals = {name: mean_interval(array, confidence) for name, array in differences.items()}
    moved = [name for name, interval in intervals.items() if interval.low > 0 or interval.high < 0]
    if moved:
        numbers = ", ".join(f"{name} ({signed(intervals[name])})" for name in moved)
        text = f"This round differs from the one before by {numbers}."
        return Alarm("stagnation", "ok", float(len(moved)), 1.0, text)
    return Alarm(
        "stagnation",
        "warn",
        0.0,
        1.0,
        f"No scorer tells this round from the one before: all intervals include 0 ({', '.join(intervals)}). Further "
        "rounds are unlikely to help: stop here, or use more prompts if you expect a smaller gain than they can show.",
    )
