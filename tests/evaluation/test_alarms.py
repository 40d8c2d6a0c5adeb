import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from spin_diffusion.evaluation.alarm_rules import Alarm, normalised, trained_among
from spin_diffusion.evaluation.alarms import (
    aesthetics_up_alignment_down,
    check_alarms,
    goodhart,
    stagnation,
    training_leak,
)
from spin_diffusion.evaluation.picture_alarms import (
    Pictures,
    broken_images,
    diversity_over_seeds,
    near_duplicates,
    photometry,
    style_collapse,
)
from spin_diffusion.evaluation.records import Role
from spin_diffusion.evaluation.scorers.sharpness import sharpness
from spin_diffusion.evaluation.statistics import holm, paired_difference, sign_test_p, win_tie_loss
from spin_diffusion.evaluation.verdicts import overall_verdict, verdict
from spin_diffusion.samples.photometry import measure_image

ROLES: dict[str, Role] = {
    "pickscore": "in-domain",
    "hps": "held-out",
    "imagereward": "held-out",
    "clip": "alignment",
    "beauty": "aesthetics",
    "sharpness": "drift",
}
PROMPTS, IMAGES, WIDTH = 200, 4, 32


class World:
    """A simulated evaluation: every `draw` is another model that is the same as the others, with seeds of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.level = {name: 2 * self.rng.normal(size=(PROMPTS, 1)) for name in ROLES}
        self.subject = 1 + self.rng.normal(size=(PROMPTS, 1, WIDTH))
        self.light = 0.1 * self.rng.normal(size=(PROMPTS, 1))

    def scores(self) -> dict[str, np.ndarray]:
        taste = self.rng.normal(size=(PROMPTS, IMAGES))
        return {
            name: level + 0.5 * taste + self.rng.normal(size=(PROMPTS, IMAGES)) for name, level in self.level.items()
        }

    def features(self, style: float = 0.0, variety: float = 0.4) -> np.ndarray:
        common = style * 3 * np.cos(np.arange(WIDTH))
        return self.subject + common + variety * self.rng.normal(size=(PROMPTS, IMAGES, WIDTH))

    def photometry(self) -> dict[str, np.ndarray]:
        shape = (PROMPTS, IMAGES)
        return {
            "saturation": np.clip(0.4 + self.light + 0.1 * self.rng.normal(size=shape), 0, 1),
            "clipped": self.rng.exponential(0.01, size=shape),
            "sharpness": 0.1 * np.exp(self.light + 0.2 * self.rng.normal(size=shape)),
        }

    def broken(self, share: float = 0.01) -> tuple[int, int]:
        return int(self.rng.binomial(PROMPTS * IMAGES, share)), PROMPTS * IMAGES


def moved(scores: dict[str, np.ndarray], **by: float) -> dict[str, np.ndarray]:
    return {name: values + by.get(name, 0.0) for name, values in scores.items()}


def per_prompt(base: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: (other[name] - base[name]).mean(axis=1) for name in base}


def everything(world: World, scores: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> list:
    prompts = [f"prompt {i}" for i in range(PROMPTS)]
    features, colours, broken = (
        [draw() for _ in range(2)] for draw in (world.features, world.photometry, world.broken)
    )
    return check_alarms(
        Pictures(prompts, features[0], colours[0], broken[0]),
        Pictures(prompts, features[1], colours[1], broken[1]),
        baseline_scores=base,
        candidate_scores=scores,
        roles=ROLES,
        previous=world.scores(),
        training_prompts=["another", "captions"],
    )


def test_the_same_model_with_other_seeds_sets_off_no_more_than_2_alarms_in_60_evaluations_and_is_inconclusive() -> None:
    alarms = warnings = inconclusive = 0
    for seed in range(60):
        world = World(seed)
        base, same = world.scores(), world.scores()
        found = everything(world, same, base)
        alarms += any(alarm.state == "alarm" for alarm in found)
        warnings += any(alarm.state == "warn" and alarm.id != "stagnation" for alarm in found)
        counts = [win_tie_loss(same[name], base[name])[::2] for name in ROLES]
        p, leads = holm([sign_test_p(*won_lost) for won_lost in counts]), [wins - losses for wins, losses in counts]
        verdicts = {
            name: verdict(paired_difference(same[name], base[name]), float(p[i]), leads[i], role == "drift")
            for i, (name, role) in enumerate(ROLES.items())
        }
        states = {alarm.id: alarm.state for alarm in found}
        inconclusive += overall_verdict(verdicts, ROLES, states)[0] == "inconclusive"
    assert alarms <= 2 and warnings <= 3
    assert inconclusive >= 0.93 * 60


def test_the_alarms_are_always_the_same_ones_and_speak_in_one_line() -> None:
    world = World(0)
    full = everything(world, world.scores(), world.scores())
    empty = check_alarms(Pictures(), Pictures(), baseline_scores={}, candidate_scores={}, roles=ROLES)
    assert [alarm.id for alarm in full] == [alarm.id for alarm in empty]
    assert len({alarm.id for alarm in full}) == 9
    assert all(alarm.state == "not run" and alarm.value is None and alarm.threshold is None for alarm in empty)
    assert all(alarm.explanation.startswith("Not run: ") for alarm in empty)
    assert all(alarm.state != "not run" and alarm.threshold is not None for alarm in full)
    for alarm in full + empty:
        assert alarm.explanation.endswith(".") and "\n" not in alarm.explanation


def test_goodhart_goes_off_when_a_held_out_scorer_pays_for_the_in_domain_one() -> None:
    world = World(1)
    base, other = world.scores(), world.scores()
    fired = goodhart(per_prompt(base, moved(other, pickscore=1.0, hps=-0.5)), ROLES)
    assert fired.state == "alarm" and fired.value is not None and fired.value < 0
    assert "hps (" in fired.explanation and "imagereward" not in fired.explanation
    assert goodhart(per_prompt(base, moved(other, pickscore=1.0, clip=-0.5)), ROLES).state == "alarm"
    assert goodhart(per_prompt(base, moved(other, pickscore=1.0)), ROLES).state == "ok"
    assert goodhart(per_prompt(base, moved(other, pickscore=1.0, beauty=-1.0)), ROLES).state == "ok"
    down = goodhart(per_prompt(base, moved(other, hps=-0.5)), ROLES)
    assert down.state == "ok" and "No in-domain scorer rises" in down.explanation


def test_the_truth_is_a_judge_of_goodhart_too() -> None:
    rng = np.random.default_rng(2)
    differences = {"preference": 1 + rng.normal(size=100), "oracle": -1 + rng.normal(size=100)}
    assert goodhart(differences, {"preference": "in-domain", "oracle": "truth"}).state == "alarm"


def test_a_model_that_truly_gains_in_domain_seldom_sets_off_goodhart_however_many_scorers_watch() -> None:
    rng = np.random.default_rng(3)
    roles: dict[str, Role] = {"pickscore": "in-domain"} | {f"judge {i}": "held-out" for i in range(8)}
    fired = 0
    for _ in range(60):
        differences = {name: rng.normal(size=100) + (name == "pickscore") for name in roles}
        fired += goodhart(differences, roles).state == "alarm"
    assert fired <= 5  # 1 or 2 expected; without the correction 11


def test_scorers_that_are_nearly_one_make_alarms_and_verdicts_only_more_cautious() -> None:
    """HPS v2.0 and v2.1, say: what is adjusted for the number of scorers holds however much they agree."""
    roles: dict[str, Role] = {"pickscore": "in-domain", "hps": "held-out", "hps_again": "held-out"}
    gravity = {"ok": 0, "warn": 1, "alarm": 2}
    found = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        one = {"pickscore": rng.normal(0.5, 1, 60), "hps": rng.normal(-0.25, 1, 60)}
        both = one | {"hps_again": one["hps"]}
        alone, twice = (goodhart(differences, roles).state for differences in (one, both))
        assert gravity[twice] <= gravity[alone]
        found |= {(alone, twice)}
        p_values = [sign_test_p(int((d > 0).sum()), int((d < 0).sum())) for d in both.values()]
        assert (holm(p_values)[:2] >= holm(p_values[:2])).all()
    assert ("alarm", "alarm") in found and ("alarm", "warn") in found and ("ok", "ok") in found


def test_a_chance_rise_of_one_of_many_in_domain_scorers_is_no_reason_to_believe_in_goodhart() -> None:
    rng = np.random.default_rng(4)
    roles: dict[str, Role] = {f"pleased {i}": "in-domain" for i in range(8)} | {"judge": "held-out"}
    fired = 0
    for _ in range(60):
        differences = {name: rng.normal(size=100) - (name == "judge") for name in roles}
        fired += goodhart(differences, roles).state == "alarm"
    assert fired <= 5  # 1 or 2 expected; without the correction 11


def test_beauty_against_the_prompt_is_an_alarm() -> None:
    world = World(4)
    base, other = world.scores(), world.scores()
    fired = aesthetics_up_alignment_down(per_prompt(base, moved(other, beauty=1.0, clip=-0.5)), ROLES)
    assert fired.state == "alarm" and "beauty" in fired.explanation and "clip" in fired.explanation
    assert aesthetics_up_alignment_down(per_prompt(base, moved(other, beauty=1.0)), ROLES).state == "ok"
    assert aesthetics_up_alignment_down(per_prompt(base, moved(other, clip=-0.5)), ROLES).state == "ok"
    only = aesthetics_up_alignment_down({"clip": np.zeros(5)}, ROLES)
    assert only.state == "not run" and "no aesthetics scorer" in only.explanation


def test_lost_diversity_over_seeds_is_an_alarm() -> None:
    world = World(5)
    base = world.features()
    fired = diversity_over_seeds(base, world.features(variety=0.3))
    assert fired.state == "alarm" and fired.value is not None and fired.value > 0.3
    assert "Vendi" in fired.explanation
    assert diversity_over_seeds(base, world.features()).state == "ok"
    gained = diversity_over_seeds(base, world.features(variety=0.6))
    assert gained.state == "ok" and gained.value is not None and gained.value < 0
    assert diversity_over_seeds(base, world.features(variety=0.385)).state == "warn"


def test_diversity_is_one_minus_the_cosine_and_the_vendi_score_counts_pictures() -> None:
    # Two images at a right angle; then the same one twice.
    apart, same = np.eye(2)[None].repeat(6, axis=0), np.ones((6, 2, 2))
    alarm = diversity_over_seeds(5 * apart, same)
    assert alarm.state == "alarm" and alarm.value == pytest.approx(1.0)
    assert "from 1.000 to 0.000" in alarm.explanation
    assert "from 2.00 to 1.00" in alarm.explanation


def test_the_same_style_for_every_prompt_is_an_alarm() -> None:
    world = World(6)
    base = world.features()
    fired = style_collapse(base, world.features(style=0.5))
    assert fired.state == "alarm" and fired.value is not None and fired.value > 0.05
    assert style_collapse(base, world.features()).state == "ok"
    assert style_collapse(world.features(style=0.5), base).state == "ok"


def test_the_mean_cosine_between_prompts_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(7)
    base, other = rng.normal(size=(6, 3, 5)), rng.normal(size=(6, 3, 5)) + 1

    def brute(features: np.ndarray) -> float:
        unit = features / np.linalg.norm(features, axis=2, keepdims=True)
        return np.mean([a @ b for i in range(6) for j in range(6) if i != j for a in unit[i] for b in unit[j]])

    alarm = style_collapse(base, other)
    assert alarm.value == pytest.approx(brute(other) - brute(base))
    assert f"from {brute(base):.3f} to {brute(other):.3f}" in alarm.explanation


def test_the_interval_of_the_cosine_between_prompts_is_as_wide_as_its_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Plain averages per prompt would make it half as wide, and half of these intervals would exclude the truth.
    monkeypatch.setattr("spin_diffusion.evaluation.picture_alarms.STYLE_SIMILARITY_RISE", 0.0)
    fired = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        fresh = [0.6 + rng.normal(size=(60, 2, 8)) for _ in range(2)]  # prompts of their own: nothing is shared
        fired += style_collapse(fresh[0], fresh[1]).state == "alarm"
    assert fired <= 8  # 2.5 expected


def test_more_equal_pictures_are_an_alarm() -> None:
    world = World(8)
    base, other = world.features(variety=1.0), world.features(variety=1.0)  # no two pictures are alike
    copied = other.copy()
    copied[:60, 1] = copied[:60, 0] * 3  # the length of an embedding says nothing
    fired = near_duplicates(base, copied)
    assert fired.state == "warn" and fired.value == pytest.approx(60 / 200 / 6)
    copied[:60, 2] = copied[:60, 0]
    assert near_duplicates(base, copied).state == "alarm"
    assert near_duplicates(base, other).state == "ok"
    assert near_duplicates(copied, other).state == "ok"


@pytest.mark.parametrize(("name", "factor"), [("saturation", 1.8), ("clipped", 4.0), ("sharpness", 0.5)])
def test_a_shift_of_colours_exposure_or_edges_is_an_alarm(name: str, factor: float) -> None:
    world = World(9)
    base, other = world.photometry(), world.photometry()
    other[name] = other[name] * factor
    fired = photometry(base, other)
    assert fired.state == "alarm" and fired.value is not None and fired.value > 3
    assert f"{name} from" in fired.explanation
    assert photometry(base, world.photometry()).state == "ok"


def test_a_base_that_never_clips_does_not_make_every_clipped_pixel_an_alarm() -> None:
    base, few, many = np.zeros((20, 2)), np.full((20, 2), 0.001), np.full((20, 2), 0.05)
    assert photometry({"clipped": base}, {"clipped": base}).state == "ok"
    assert photometry({"clipped": base}, {"clipped": few}).state == "ok"
    assert photometry({"clipped": base}, {"clipped": many}).state == "alarm"


def test_more_broken_images_are_an_alarm_and_a_few_by_chance_a_warning() -> None:
    assert broken_images((2, 800), (40, 800)).state == "alarm"
    fired = broken_images((0, 100), (2, 100))
    assert fired.state == "warn" and "chance" in fired.explanation and fired.value == pytest.approx(0.02)
    assert broken_images((10, 800), (15, 800)).state == "ok"
    assert broken_images((40, 800), (2, 800)).state == "ok"
    assert broken_images((0, 0), (0, 0)).state == "not run"


def test_captions_leak_whatever_their_case_punctuation_and_spaces() -> None:
    prompts = [
        "A red fox, in the snow!",
        "two cats",
        "\u65e5\u672c\u306e\u5ead",
        "Caf\u00e9",
        "\U0001f98a",
        "\U0001f431",
    ]
    captions = iter(["a RED fox in  the\nsnow", "three cats", "\u65e5\u672c\u306e\u5ead", "cafe\u0301", "\U0001f98a"])
    keys = [normalised(prompt) for prompt in prompts]
    assert len(trained_among(captions, keys)) == 4
    assert trained_among([], keys) == trained_among(["two cats"] * 3, []) == set()
    assert normalised("a cat") == normalised("A cat.")


def test_a_leaked_prompt_is_a_warning_and_many_are_an_alarm() -> None:
    assert training_leak(0, 100).state == "ok"
    assert training_leak(1, 100).state == "warn"
    assert training_leak(6, 100).state == "alarm"
    assert training_leak(None, 100).state == training_leak(0, 0).state == "not run"


def test_prompts_that_no_scorer_judges_by_are_no_leak() -> None:
    pictures = Pictures(["a cat"], None, {"saturation": np.ones((10, 3))}, (0, 30))
    found = check_alarms(
        pictures, pictures, baseline_scores={}, candidate_scores={}, roles={}, training_prompts=["A cat."]
    )
    (leak,) = (alarm for alarm in found if alarm.id == "training_leak")
    assert leak.state == "not run" and "to be looked at" in leak.explanation


def test_a_round_that_changes_nothing_is_advice_to_stop() -> None:
    world = World(10)
    before, same = world.scores(), world.scores()
    stopped = stagnation(same, before, ROLES)
    assert stopped.state == "warn" and "stop" in stopped.explanation and "sharpness" not in stopped.explanation
    for name in ("hps", "clip"):
        for by in (0.5, -0.5):
            going = stagnation(moved(same, **{name: by}), before, ROLES)
            assert going.state == "ok" and name in going.explanation
    assert stagnation(moved(same, sharpness=3.0), before, ROLES).state == "warn", "drift is no progress"
    assert stagnation(same, None, ROLES).state == "not run"
    assert stagnation({"sharpness": before["sharpness"]}, before, ROLES).state == "not run"


def test_a_round_that_changes_nothing_seldom_seems_to_move_however_many_scorers_watch() -> None:
    rng = np.random.default_rng(5)
    roles: dict[str, Role] = {f"judge {i}": "held-out" for i in range(8)}
    moving = 0
    for _ in range(60):
        before, after = ({name: rng.normal(size=(100, 1)) for name in roles} for _ in range(2))
        moving += stagnation(after, before, roles).state == "ok"
    assert moving <= 8  # 3 expected; without the correction 20


def test_one_image_per_prompt_leaves_out_what_needs_pairs() -> None:
    base, other = (np.random.default_rng(i).normal(size=(30, 1, 8)) for i in (0, 1))
    for check in (diversity_over_seeds, near_duplicates):
        alarm = check(base, other)
        assert alarm.state == "not run" and "one image per prompt" in alarm.explanation
    assert style_collapse(base, other).state == "ok"


def test_of_few_prompts_pictures_of_one_prompt_are_not_judged() -> None:
    apart, same = np.eye(2)[None].repeat(6, axis=0), np.ones((6, 2, 2))
    for check in (diversity_over_seeds, near_duplicates):
        assert check(apart, same).state == "alarm"
        few = check(apart[:5], same[:5])
        assert few.state == "not run" and "5 prompts are too few to tell; ask 6 or more" in few.explanation


def test_without_features_or_with_those_of_one_model_nothing_is_run() -> None:
    some = np.ones((5, 2, 3))
    for check in (diversity_over_seeds, near_duplicates, style_collapse):
        for base, other in ((None, None), (some, None), (None, some)):
            alarm = check(base, other)
            assert alarm.state == "not run" and "no scorer gave image features" in alarm.explanation


def test_constant_arrays_set_off_nothing() -> None:
    constant = np.ones((10, 3))
    scores = dict.fromkeys(ROLES, constant)
    features = np.ones((10, 3, 4))
    pictures = Pictures([], features, {"saturation": constant}, (0, 30))
    found = check_alarms(
        pictures, pictures, baseline_scores=scores, candidate_scores=scores, roles=ROLES, previous=scores
    )
    states = {alarm.id: alarm.state for alarm in found}
    assert states.pop("diversity_over_seeds") == "not run"  # the base has no diversity to lose
    assert states.pop("training_leak") == "not run"
    assert states.pop("stagnation") == "warn"
    assert set(states.values()) == {"ok"}


def test_arrays_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        diversity_over_seeds(np.ones((6, 2, 3)), np.ones((6, 2, 4)))
    bad = np.ones((6, 2, 3))
    bad[3, 1] = 0
    with pytest.raises(ValueError, match="prompt number 3"):
        near_duplicates(np.ones((6, 2, 3)), bad)
    with pytest.raises(ValueError, match="finite"):
        photometry({"saturation": np.zeros((6, 2))}, {"saturation": np.full((6, 2), np.nan)})
    with pytest.raises(ValueError, match="finite"):
        goodhart({"pickscore": np.full(6, np.nan), "hps": np.zeros(6)}, ROLES)


def test_an_alarm_is_a_value() -> None:
    assert Alarm("x", "ok", 1.0, 2.0, "fine.") == Alarm("x", "ok", 1.0, 2.0, "fine.")


def test_an_image_is_measured_by_saturation_clipping_and_the_scorers_sharpness() -> None:
    red_and_white = Image.new("RGB", (10, 10), (255, 0, 0))
    red_and_white.paste((255, 255, 255), (0, 0, 5, 10))
    measured = measure_image(red_and_white)
    assert measured.saturation == pytest.approx(0.5)
    assert measured.clipped == pytest.approx(0.5), "white is clipped, and the luma of red is not"
    assert measured.sharpness == float(sharpness([red_and_white], [""])[0]) > 0
    assert measured.state == "ok"
    assert measure_image(Image.new("RGB", (4, 4), (100, 50, 50))).saturation == pytest.approx(0.5)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 30)])
def test_an_image_of_one_colour_is_constant(colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (16, 16), colour)
    assert measure_image(image).state == "constant"
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert measure_image(Image.open(file)).state == "constant"
    image.putpixel((3, 3), (128, 128, 128))
    assert measure_image(image).state == "ok"
    assert measure_image(Image.new("RGB", (1, 1), colour)).state == "constant"


def test_an_image_of_any_mode_is_measured() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    for mode in ("RGB", "L", "P", "1", "CMYK", "LA", "RGBA"):
        measured = measure_image(rgba.convert(mode))
        assert measured.state == "ok"
        assert all(np.isfinite([measured.saturation, measured.clipped, measured.sharpness]))
    assert measure_image(rgba.convert("L")).saturation == 0
    deep = measure_image(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257))
    assert deep.state == "ok" and deep.clipped < 0.2, "16 bits are scaled, not clipped"


def test_of_the_training_captions_only_those_asked_for_are_kept() -> None:
    captions = (f"a caption of some length about thing number {number}" for number in range(20_000))
    tracemalloc.start()
    found = trained_among(captions, ["a caption of some length about thing number 7", "another"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {"a caption of some length about thing number 7"} and peak < 100_000
