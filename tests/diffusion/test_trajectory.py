"""The trajectory objective: its algebra against the plain formula in fp64, its scores, and rounds that play with it."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from spin_diffusion.diffusion.trajectory import (
    SamplerSteps,
    as_noise,
    draw_steps,
    forward_trajectory,
    implied_noise,
    posterior,
    read_steps,
    true_pairs,
)
from spin_diffusion.samples.sample import KEPT, Batch
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import SAMPLING, TRAINING, examples, make_game, play_all

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sampler(**more) -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **SCHEDULE, **more)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The algebra


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_steps_are_those_of_the_sampler(eta, spacing):
    scheduler = sampler(timestep_spacing=spacing)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    steps = read_steps(scheduler, 7, eta)
    assert len(steps) == 7 and steps.t.tolist() == scheduler.timesteps.tolist()
    x_t, eps, noise = (normal(2, 4, 3, 3, seed=seed) for seed in range(3))
    for number, t in enumerate(scheduler.timesteps):
        mean = steps.a[number] * x_t + steps.c[number] * eps
        found = scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise).prev_sample
        assert torch.allclose(found, mean + steps.sigma[number] * noise, atol=1e-6)  # its last alpha is fp32
    assert (steps.c < 0).all()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_brackets_in_means_and_in_noise_are_one_and_the_paper_s_sum_is_our_logit(eta):
    """arXiv 2402.10210, eq. 4.8, written out, against four scores of `steps` with its weights."""
    steps = read_steps(sampler(), 20, eta)
    shape, beta = (3, 4, 2, 2), 2000.0
    number_of = {"player": 1, "opponent": 2}
    x = forward_trajectory(normal(*shape), normal(3, 21, 4, 2, 2, seed=5), steps)
    y = forward_trajectory(normal(*shape, seed=9), normal(3, 21, 4, 2, 2, seed=6), steps)

    def eps_of(model: str, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t * number_of[model]) + 0.01 * t[:, None, None, None] / 1000

    ratios = torch.where(steps.sigma > 0, steps.c**2 / (2 * steps.sigma**2), torch.zeros_like(steps.c))
    weights, lam = ratios / ratios.mean(), beta / (2 * 20 * 16 * ratios.mean().item())
    total, ours = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for n in range(20):
        step = torch.full((3,), n)
        for sign, states in ((1, x), (-1, y)):
            for which, model in ((1, "player"), (-1, "opponent")):
                x_t, x_prev, t = states[:, n], states[:, n + 1], steps.t[step]
                x_0_hat = (x_t - (1 - steps.abar[n]).sqrt() * eps_of(model, x_t, t)) / steps.abar[n].sqrt()
                direction = (1 - steps.abar_prev[n] - steps.sigma[n] ** 2).clamp(min=0).sqrt()
                mu = steps.abar_prev[n].sqrt() * x_0_hat + direction * eps_of(model, x_t, t)
                in_means = (x_prev - mu).square().sum(dim=(1, 2, 3))
                in_noise = (implied_noise(x_t, x_prev, steps, step) - eps_of(model, x_t, t)).square()
                assert torch.allclose(in_means, steps.c[n] ** 2 * in_noise.sum(dim=(1, 2, 3)), rtol=1e-10, atol=1e-10)
                if steps.sigma[n] > 0:
                    beta_t = lam * 20 / (2 * steps.sigma[n] ** 2)
                    total -= sign * which * beta_t / 20 * in_means
                ours += sign * which * beta * weights[n] * -0.5 * in_noise.mean(dim=(1, 2, 3)) / 20
    assert torch.allclose(total, ours, rtol=1e-9)


def test_the_posterior_s_noise_averages_out_of_the_implied_noise():
    steps = read_steps(sampler(), 10, 1.0)
    x_0, eps = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1)
    step = torch.tensor([4])
    abar = steps.abar[4]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    many = 200_000
    drawn = posterior(
        x_0.expand(many, -1, -1, -1), x_t.expand(many, -1, -1, -1), normal(many, 4, 2, 2, seed=2), steps,
        step.expand(many),
    )  # fmt: skip
    found = implied_noise(x_t.expand(many, -1, -1, -1), drawn, steps, step.expand(many))
    spread = (steps.sigma[4] / steps.c[4]).abs()
    assert torch.allclose(found.mean(dim=0), eps[0], atol=float(5 * spread / many**0.5))
    assert found.std(dim=0).mean().item() == pytest.approx(spread.item(), rel=0.01)


@pytest.mark.parametrize("kind", ["steps", "exact"])
def test_a_step_of_the_real_side_has_a_noise_of_its_own(kind):
    steps = read_steps(sampler(), 10, 1.0)
    draws = draw_steps([3, 4], (4, 2, 2), 10, kind, 0.0)
    noises = draws.eps.clone()
    noises[:, 0] = 0  # that of x_t, or of x_T: what is left in the step is what it adds itself
    pair = next(true_pairs(torch.zeros(2, 4, 2, 2), None, replace(draws, eps=noises), steps, kind))
    assert (pair.x_t == 0).all()
    sigma = steps.sigma[pair.step].float()[:, None, None, None]
    assert torch.allclose(pair.x_prev, sigma * draws.eps[:, 1]) and (sigma > 0).all()


def test_every_step_of_the_sampler_is_drawn_equally_often():
    draws = draw_steps(list(range(2000)), (1, 1, 1), 10, "steps", 0.0)
    counts = torch.bincount(draws.t, minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250  # 200, give or take 13


def test_without_added_noise_the_real_trajectory_has_one_noise():
    steps = read_steps(sampler(), 10, 0.0)
    x_0, noises = normal(2, 4, 2, 2), normal(2, 11, 4, 2, 2, seed=1)
    states = forward_trajectory(x_0, noises, steps)
    for n in range(10):
        found = implied_noise(states[:, n], states[:, n + 1], steps, torch.full((2,), n))
        assert torch.allclose(found, noises[:, 0], atol=1e-9)
    assert torch.allclose(states[:, -1], x_0, atol=1e-9)  # SD's schedule ends at alpha 1 by default


def test_v_is_turned_into_noise():
    steps = read_steps(sampler(), 10, 0.0)
    x_0, eps, step = normal(2, 4, 2, 2), normal(2, 4, 2, 2, seed=1), torch.tensor([2, 7])
    abar = steps.abar[step][:, None, None, None]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    v = DDPMScheduler(num_train_timesteps=1000, **{k: SCHEDULE[k] for k in SCHEDULE if k != "steps_offset"})
    v = v.get_velocity(x_0, eps, steps.t[step])
    assert torch.allclose(as_noise(v, x_t, steps, step, "v_prediction"), eps, atol=1e-5)
    assert torch.equal(as_noise(v, x_t, steps, step, "epsilon"), v.float())


def test_a_schedule_without_signal_at_its_end_is_refused():
    with pytest.raises(InputError, match="zero terminal SNR.*--trajectory forward"):
        read_steps(sampler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10, 0.0)


# The 1-D Gaussian world: data N(1, 1), the player's mean starts at 0; its true noise predictor is known


def gaussian_rounds(kind: str, eta: float, rounds: int, beta: float, chains: int = 512) -> list[float]:
    """The player's mean after each round, with the library's steps, pairs and loss."""
    steps = read_steps(sampler(), 10, eta)
    mean = torch.zeros((), dtype=torch.float64)

    def predicted(x_t: Tensor, step: Tensor, of: Tensor) -> Tensor:
        abar = steps.abar[step][:, None, None, None]
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * of)

    found = []
    for k in range(rounds):
        opponent = mean.detach().clone()
        # The opponent draws
        x = [normal(chains, 1, 1, 1, seed=100 + k) + steps.abar[0].sqrt() * opponent]
        for n in range(len(steps)):
            step = torch.full((chains,), n)
            mu = steps.a[n] * x[-1] + steps.c[n] * predicted(x[-1], step, opponent)
            x.append(mu + steps.sigma[n] * normal(chains, 1, 1, 1, seed=1000 * k + n))
        kept = torch.stack(x, dim=1)
        x_0 = 1 + normal(chains, 1, 1, 1, seed=200 + k)
        if kind == "forward":  # both sides noised by the forward process, as the default does it
            generated = kept[:, -1]
        player = mean.clone().requires_grad_()
        optimizer = torch.optim.Adam([player], lr=0.02)
        for number in range(150):
            seeds = [k * 10**6 + number * chains + row for row in range(chains)]
            generator = torch.Generator().manual_seed(seeds[0])
            draws = draw_steps(seeds[:1], (1, 1, 1), len(steps), "steps" if kind == "forward" else kind, 0.0)
            noises = torch.randn(chains, draws.eps.shape[1], 1, 1, 1, generator=generator, dtype=torch.float64)
            chosen = torch.randint(len(steps), (chains,), generator=generator)
            draws = replace(draws, t=chosen, eps=noises)
            if kind == "forward":
                abar = steps.abar[chosen][:, None, None, None]
                both = torch.cat([x_0, generated])
                eps = noises[:, 0].repeat(2, 1, 1, 1)
                x_t = abar.repeat(2, 1, 1, 1).sqrt() * both + (1 - abar.repeat(2, 1, 1, 1)).sqrt() * eps
                parts = [(x_t, eps, chosen.repeat(2))]
            else:
                parts = [
                    (pair.x_t, implied_noise(pair.x_t, pair.x_prev, steps, pair.step), pair.step)
                    for pair in true_pairs(x_0, kept, draws, steps, kind)
                ]

            def scores(of: Tensor, parts=parts) -> Tensor:
                errors = [
                    -0.5 * (target - predicted(x_t, step, of)).square().mean(dim=(1, 2, 3))
                    for x_t, target, step in parts
                ]
                return torch.stack(errors).mean(dim=0)

            by_player, by_opponent = scores(player), scores(opponent)
            r = by_player - by_opponent
            loss = torch.nn.functional.softplus(-beta * (r[:chains] - r[chains:])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = player.detach()
        found.append(mean.item())
    return found


@pytest.mark.parametrize(
    ("kind", "eta", "beta"),
    # The noise of a single step is in its logit: there a large beta saturates on noise and the rounds creep
    [("forward", 0.0, 10.0), ("steps", 0.0, 10.0), ("steps", 1.0, 1.0), ("exact", 0.0, 10.0), ("exact", 1.0, 10.0)],
)
def test_rounds_converge_to_the_target_of_a_gaussian_world(kind, eta, beta):
    means = gaussian_rounds(kind, eta, rounds=5, beta=beta)
    assert abs(means[-1] - 1) < 0.12 and abs(means[-1] - 1) < abs(means[0] - 1) + 0.02, means


# The game


def trajectory_game(base, kind: str, eta: float = 0.0, guidance: float = 1.0, **more):
    sampling = replace(SAMPLING, eta=eta, guidance_scale=guidance, num_inference_steps=3)
    return make_game(base, sampling=sampling, trajectory=kind, **more)


def batch_of(game, pairs: int = 2) -> Batch:
    rows = list(game.real_rows(examples(pairs)))
    drawn = game.generate(rows, list(range(pairs)))
    generated = game.encode(drawn) | {"states": torch.stack([row[KEPT]["states"] for row in drawn])}
    ids, prompts = [row["id"] for row in rows], [row["prompt"] for row in rows]
    return Batch(ids, prompts, game.encode(rows), generated, list(range(pairs)))


def nudge(module: torch.nn.Module, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_keeping_the_trajectory_changes_no_picture(sdxl_dir, eta):
    plain = make_game(sdxl_dir, sampling=replace(SAMPLING, eta=eta, num_inference_steps=3))
    keeping = trajectory_game(sdxl_dir, "steps", eta=eta, guidance=3.0)
    rows = list(plain.real_rows(examples(3)))
    by_plain, by_keeping = (game.generate(rows, [1, 2, 3]) for game in (plain, keeping))
    assert [row["image"] for row in by_plain] == [row["image"] for row in by_keeping]
    assert all(KEPT not in row for row in by_plain)
    states = by_keeping[0][KEPT]["states"]
    assert states.dtype == torch.float16 and states.shape == (4, 4, 16, 16)


def test_a_kept_trajectory_is_the_opponent_s_own(sdxl_dir):
    """At guidance 1 and eta 0 the noise that explains each step is what the opponent predicts: its score is 0."""
    game = trajectory_game(sdxl_dir, "steps")
    batch = batch_of(game)
    seen = set()
    for seed in range(20):
        scores = game.scores(game.player, replace(batch, seeds=[seed, seed + 100])).scores
        seen |= set(draw_steps([seed, seed + 100], (4, 16, 16), 3, "steps", 0.0).t.tolist())
        # Up to the rounding to fp16, which the last step, of a small c, magnifies
        assert scores.opponent_generated.abs().max() < 2e-3 < 0.1 < scores.opponent_real.abs().min()
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("kind", "eta"), [("steps", 0.0), ("exact", 1.0)])
def test_every_r_is_zero_where_the_player_is_the_opponent(sdxl_dir, kind, eta, precision):
    game = trajectory_game(sdxl_dir, kind, eta, precision=precision, proportion_empty_prompts=0.5)
    scores = game.scores(game.accelerator.prepare_model(game.player), batch_of(game)).scores
    assert scores.r_real.abs().max() <= 1e-6 and scores.r_generated.abs().max() <= 1e-6
    assert torch.allclose(spin(scores, 2000.0), torch.full((2,), 0.693147), atol=1e-3)


def test_sides_and_signs(sdxl_dir):
    """A denoiser that knows the real images' noise scores the real side best, on every step."""
    game = trajectory_game(sdxl_dir, "exact")
    batch = batch_of(game)
    steps, x_0 = game.steps, batch.real["latents"].double()
    draws = draw_steps(batch.seeds, (4, 16, 16), 3, "exact", 0.0)
    known = draws.eps[:, 0]

    class Knows(torch.nn.Module):
        def forward(self, x_t, t, **inputs):
            return (known.repeat(2, 1, 1, 1),)

    assert x_0.shape[0] == 2 and len(steps) == 3
    scores = game.scores(Knows(), batch).scores
    assert scores.player_real.abs().max() < 1e-8
    assert (scores.r_real > 0).all() and (scores.player_generated < -0.05).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_logit_of_all_steps_has_the_smaller_loss(sdxl_dir, eta):
    """Jensen: L_exact <= L_steps. The scores of `exact` are the mean of those of its steps, one by one."""
    game = trajectory_game(sdxl_dir, "exact", eta)
    batch = batch_of(game)
    nudge(game.player)
    exact = game.scores(game.player, batch).scores
    assert isinstance(game.steps, SamplerSteps)
    draws = draw_steps(batch.seeds, (4, 16, 16), 3, "exact", 0.0)
    frames = batch.condition["frame"].repeat(2, 1)
    conditioning = game.prompts.conditioning(batch.prompts * 2, draws.dropped * 2, frames)
    inputs = {"encoder_hidden_states": conditioning.tokens, "added_cond_kwargs": conditioning.added}
    each = []
    for pair in true_pairs(batch.real["latents"].float(), batch.generated["states"], draws, game.steps, "exact"):
        target = implied_noise(pair.x_t, pair.x_prev, game.steps, pair.step)
        found = []
        for model in (game.player, game.opponent):
            with torch.no_grad():
                predicted = model(pair.x_t, game.steps.t[pair.step], **inputs).sample
            errors = (target - predicted).square().mean(dim=(1, 2, 3))
            found += list((-0.5 * errors).split(2))
        each.append(found)
    by_hand = [torch.stack([found[place] for found in each]) for place in range(4)]
    ours = (exact.player_real, exact.player_generated, exact.opponent_real, exact.opponent_generated)
    for mine, plain in zip(ours, by_hand, strict=True):
        assert torch.allclose(mine, plain.mean(dim=0), atol=1e-5)
    for beta in (1.0, 10.0, 2000.0):
        margins = (by_hand[0] - by_hand[2]) - (by_hand[1] - by_hand[3])
        of_steps = torch.nn.functional.softplus(-beta * margins).mean(dim=0)
        assert (spin(exact, beta) <= of_steps + 1e-4 * beta**0.5).all()
        assert margins.std() > 1e-4  # otherwise both are equal and nothing was shown


def test_the_gradient_does_not_depend_on_what_is_computed_again(sdxl_dir, monkeypatch):
    game = trajectory_game(sdxl_dir, "exact", eta=1.0, winner_preserving_mu=0.5)
    batch = batch_of(game)
    nudge(game.player)

    def gradients() -> list[Tensor]:
        game.player.zero_grad()
        spin(game.scores(game.player, batch).scores, 10.0).sum().backward()
        return [parameter.grad.clone() for parameter in game.player.parameters() if parameter.grad is not None]

    recomputed = gradients()
    monkeypatch.setattr("spin_diffusion.diffusion.game.checkpoint", lambda f, *args, use_reentrant: f(*args))
    for one, other in itertools.zip_longest(recomputed, gradients()):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


# Rounds


@pytest.mark.parametrize("kind", ["steps", "exact"])
def test_rounds_keep_trajectories_while_they_need_them(sdxl_dir, tmp_path, kind):
    game = trajectory_game(sdxl_dir, kind)
    records = play_all(sdxl_dir, tmp_path, game=game, training=replace(TRAINING, max_train_steps=2))
    assert [record["state"] for record in records] == ["PROMOTED", "PROMOTED"]
    names = records[1]["files"]
    assert sum(name.startswith(f"round-2/{KEPT}/") for name in names) == 3
    assert not (tmp_path / "round-2" / KEPT).exists() and (tmp_path / "round-2" / "samples").is_dir()


def test_of_a_trajectory_only_the_two_states_of_a_step_are_read(sdxl_dir, tmp_path, monkeypatch):
    weights, read = [], []
    for part in ("step", "whole"):
        game = trajectory_game(sdxl_dir, "steps")
        if part == "whole":
            monkeypatch.setattr(game, "kept_part", lambda seed: slice(None))
        scores, shapes = game.scores, set()

        def watched(player, batch, scores=scores, shapes=shapes):
            shapes.add(tuple(batch.generated["states"].shape[:2]))
            return scores(player, batch)

        monkeypatch.setattr(game, "scores", watched)
        training = replace(TRAINING, max_train_steps=4)
        play_all(sdxl_dir, tmp_path / part, game=game, training=training, rounds=1, num_generated=2)
        weights.append(file_hash(tmp_path / part / "round-1/unet/diffusion_pytorch_model.safetensors"))
        read.append(shapes)
    pairs = 2 * TRAINING.train_batch_size
    assert read == [{(pairs, 2)}, {(pairs, len(game.steps) + 1)}] and len(game.steps) > 1
    assert weights[0] == weights[1]


def test_a_killed_run_ends_with_the_same_bytes(sdxl_dir, tmp_path, monkeypatch):
    training = replace(TRAINING, max_train_steps=2)
    play_all(sdxl_dir, tmp_path / "whole", game=trajectory_game(sdxl_dir, "exact"), training=training)
    for calls in (2, 4):  # while the first and the second round draw their samples
        game = trajectory_game(sdxl_dir, "exact")
        generate, left = game.generate, [calls]

        def dies(*args, generate=generate, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return generate(*args)

        monkeypatch.setattr(game, "generate", dies)
        with pytest.raises(KeyboardInterrupt):
            play_all(sdxl_dir, tmp_path / "killed", game=game, training=training)
    play_all(sdxl_dir, tmp_path / "killed", game=trajectory_game(sdxl_dir, "exact"), training=training)
    weights = "round-2/unet/diffusion_pytorch_model.safetensors"
    assert file_hash(tmp_path / "whole" / weights) == file_hash(tmp_path / "killed" / weights)
    files = [read_json(tmp_path / run / "round-2/round.json")["files"].items() for run in ("whole", "killed")]
    kept = [{name: digest for name, digest in of_run if KEPT in name} for of_run in files]
    assert kept[0] == kept[1] != {}


def test_a_real_side_alone_has_trajectories_too(sdxl_dir, tmp_path):
    game = trajectory_game(sdxl_dir, "steps")
    records = play_all(sdxl_dir, tmp_path, game=game, rounds=1, objective="sft", beta=1.0)
    assert records[0]["state"] == "PROMOTED"
