"""Which noise levels are asked, and of pairs without a caption which side counts."""

from dataclasses import replace

import pytest
import torch
from scipy.special import logit
from scipy.stats import chisquare, kstest, norm
from torch.nn.functional import softplus

from spin_diffusion.diffusion import questions
from spin_diffusion.diffusion.noising import draw
from spin_diffusion.samples.pairs import Pairs
from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.objectives import ddo, space, spin
from tests.diffusion.test_game import batch_of, nudge
from tests.playing import TRAINING, make_game, play_all

T, DRAWS = 1000, 20_000


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_timesteps_have_their_distribution(sampling):
    t = draw(list(range(DRAWS)), (1, 1, 1), T, 0.0, sampling).t
    edges = torch.linspace(0, 1, 21, dtype=torch.float64).numpy()
    shares = torch.tensor(norm.cdf(logit(edges)) if sampling == "logit_normal" else edges).diff().numpy()
    assert chisquare(torch.histc(t.float(), 20, 0, T).numpy(), DRAWS * shares).pvalue > 0.01


def step_of(step: int, of: int, parts: int, pairs: Pairs) -> tuple[torch.Tensor, dict[int, int]]:
    """Timesteps of an optimizer step of so many pairs, its stream read in so many parts; by position."""
    positions = list(range(step * of, (step + 1) * of))
    found: dict[int, int] = {}
    for part in range(parts):
        mine = positions[part::parts]
        batch = pairs.batch(mine, 3, 1)
        t = draw(batch.seeds, (1, 1, 1), T, 0.0, "sections", batch.condition["section"]).t
        found |= dict(zip(mine, t.tolist(), strict=True))
    return torch.tensor([found[position] for position in positions]), found


def test_each_pair_of_an_optimizer_step_has_its_own_section_of_the_levels():
    pairs = Pairs([str(n) for n in range(13)], [""] * 13, lambda i: ({}, {}), per_step=8)
    seen = []
    for step in range(250):
        t, whole = step_of(step, 8, 1, pairs)
        assert (t * 8 // T).sort().values.tolist() == list(range(8))
        assert whole == step_of(step, 8, 4, pairs)[1]
        seen += t.tolist()
    # And all levels are asked alike
    assert kstest((torch.tensor(seen).double() + 0.5).numpy() / T, "uniform").pvalue > 0.01


def test_the_fixed_draws_of_a_pair_share_the_sections_out():
    pairs = Pairs([str(n) for n in range(64)], [""] * 64, lambda i: ({}, {}), draws=4)
    sections: dict[str, list[int]] = {}
    for epoch in range(4):
        batch = pairs.batch(list(range(64 * epoch, 64 * (epoch + 1))), 3, 1)
        t = draw(batch.seeds, (1, 1, 1), T, 0.0, "sections", batch.condition["section"]).t
        for id_, number in zip(batch.ids, (t * 4 // T).tolist(), strict=True):
            sections.setdefault(id_, []).append(number)
        assert len({of[-1] for of in sections.values()}) == 4  # pairs do not go through the levels in step
    assert all(sorted(of) == [0, 1, 2, 3] for of in sections.values())


def test_a_killed_round_asks_the_same_levels_as_an_unbroken_one(sdxl_dir, tmp_path, monkeypatch):
    training = replace(TRAINING, gradient_accumulation_steps=2)
    asked: dict[str, list[list[int]]] = {}

    def play_as(name: str, folder: str, until: int | None = None) -> None:
        take_step, draw_as_ever = train_module._take_step, questions.draw

        def counted(step, *args):
            if step == until:
                raise KeyboardInterrupt
            asked.setdefault(name, []).append([])
            return take_step(step, *args)

        def heard(*args):
            draws = draw_as_ever(*args)
            asked[name][-1] += draws.t.tolist()
            return draws

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "_take_step", counted)
            patch.setattr(questions, "draw", heard)
            game = make_game(sdxl_dir, accumulation=2, timestep_sampling="sections")
            play_all(sdxl_dir, tmp_path / folder, training, game, rounds=1)

    play_as("whole", "whole")
    with pytest.raises(KeyboardInterrupt):
        play_as("killed", "killed", until=3)
    play_as("resumed", "killed")
    assert [sorted(t * 4 // T for t in step) for step in asked["whole"]] == [[0, 1, 2, 3]] * 4
    assert asked["killed"] == asked["whole"][:3] and asked["resumed"] == asked["whole"][2:]


@pytest.mark.parametrize("mu", [None, 0.5])
def test_of_pairs_without_a_caption_the_real_side_alone_can_count(mu, sdxl_dir):
    beta, found = 50.0, {}
    for how in ("both", "real"):
        game = make_game(
            sdxl_dir, proportion_empty_prompts=0.5, dropped_captions=how, winner_preserving_mu=mu
        )  # fmt: skip
        batch = batch_of(game, pairs=8)
        start = game.scores(game.player, batch).scores
        assert torch.allclose(spin(start, beta), torch.tensor(2.0).log().expand(8), atol=1e-4)
        nudge(game.player)
        found[how] = game.scores(game.player, batch).scores
    dropped = torch.tensor(draw(list(range(8)), (1, 1, 1), T, 0.5).dropped)
    assert 0 < dropped.sum() < 8
    both, real = found["both"], found["real"]
    assert torch.equal(real.r_real, both.r_real) and (both.r_generated != 0).all()
    assert torch.equal(real.r_generated, torch.where(dropped, 0.0, both.r_generated))
    # The closed forms, and no gradient by the generated side
    kept, r = ~dropped, real.r_real
    assert torch.allclose(spin(real, beta)[dropped], softplus(-beta * r)[dropped])
    assert torch.allclose(ddo(real, 4.0, beta)[dropped], (softplus(-beta * r) + 4 * torch.tensor(2.0).log())[dropped])
    for loss in (spin, space, ddo):
        assert torch.equal(loss(real, beta=beta)[kept], loss(both, beta=beta)[kept])
        gradient = torch.autograd.grad(
            loss(real, beta=beta)[dropped].sum(), game.player.conv_in.weight, retain_graph=True
        )[0]
        sides = real.r_real[dropped].detach()
        pull = -beta * torch.sigmoid(-beta * sides)  # of softplus(-beta r) by r
        expected = torch.autograd.grad(
            (pull * real.player_real[dropped]).sum(), game.player.conv_in.weight, retain_graph=True
        )[0]
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
