"""Every scheduler's state follows its rows: a fork goes on as the unforked run does, and rows never mix."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import fasttrace as ft
from fasttrace.engine.denoise.trajectory import Trajectories
from fasttrace.engine.schedule import Flow, new_scheduler
from fasttrace.errors import ModelError

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, 0.0),
    "ddim-eta": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, 0.7),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, 0.0),
    "pndm-prk": (diffusers.PNDMScheduler, {}, 0.0),
    "euler": (diffusers.EulerDiscreteScheduler, {}, 0.0),
    "euler-v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, 0.0),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, 0.0),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {}, 0.0),
    "dpm-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, 0.0),
    "lcm": (diffusers.LCMScheduler, {}, 0.0),
    "heun": (diffusers.HeunDiscreteScheduler, {}, 0.0),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}, 0.0),
    "lms": (diffusers.LMSDiscreteScheduler, {}, 0.0),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, 0.0),
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 0.0),
    "flow-shifted": (diffusers.FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, 0.0),
    "flow-stochastic": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, 0.0),
    "flow-heun": (diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 3.0}, 0.0),
    "flow-dpm": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        0.0,
    ),
}


def start(name: str, rows: int) -> Trajectories:
    kind, config, eta = SCHEDULERS[name]
    latents = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    flow = Flow(1024, even=False) if name.startswith("flow") else None
    noise = {} if name.startswith("flow") else NOISE
    return Trajectories(kind(**noise, **config), 6, latents, torch.Generator().manual_seed(7), rows, eta, flow)


def output(scaled: torch.Tensor, kinds: list[int], step: int) -> torch.Tensor:
    """A model output that depends on the latents, the step, and which kind of run a row is."""
    factors = torch.tensor([0.3 + 0.1 * kind for kind in kinds], dtype=scaled.dtype)[:, None, None, None]
    return torch.sin(scaled * factors + step)


def alone(name: str, kinds: list[int]) -> torch.Tensor:
    """One run by itself: ``kinds[step]`` at each step."""
    run = start(name, 1)
    for step in range(len(run.timesteps)):
        run.advance(step, output(run.model_input(step), [kinds[step]], step))
    return run.latents[0]


@pytest.mark.parametrize("at", [0, 1, 3, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_fork_goes_on_as_a_run_of_its_own(name: str, at: int) -> None:
    steps = len(start(name, 1).timesteps)
    run, kinds = start(name, 2), [0, 1]
    for step in range(steps):
        if step == at:
            # Row 1 twice, and row 0 last: a fork of row 1 turns into kind 2.
            run, kinds = run.select([1, 1, 0]), [1, 2, 0]
        run.advance(step, output(run.model_input(step), kinds, step))
    expected = [[1] * steps, [1] * at + [2] * (steps - at), [0] * steps]
    for row, kind in enumerate(expected):
        torch.testing.assert_close(run.latents[row], alone(name, kind), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_selecting_leaves_the_selected_from_as_it_was(name: str) -> None:
    steps = len(start(name, 1).timesteps)
    run = start(name, 2)
    for step in range(2):
        run.advance(step, output(run.model_input(step), [0, 1], step))
    fork = run.select([1])
    for one, kinds in ((fork, [3]), (run, [0, 1])):
        for step in range(2, steps):
            one.advance(step, output(one.model_input(step), kinds, step))
    torch.testing.assert_close(run.latents[0], alone(name, [0] * steps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.latents[1], alone(name, [1] * steps), rtol=1e-9, atol=1e-9)


def test_the_users_scheduler_stays_as_it_is() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE)
    before = scheduler.timesteps.clone(), dict(vars(scheduler))
    latents = torch.zeros(4, 3, 3)
    run = Trajectories(scheduler, 6, latents, torch.Generator(), 2, 0.0)
    run.advance(0, run.model_input(0))
    assert torch.equal(scheduler.timesteps, before[0])
    assert vars(scheduler).keys() == before[1].keys()
    assert all(vars(scheduler)[name] is value for name, value in before[1].items())


def test_a_scheduler_with_one_noise_for_the_batch_is_refused() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE)
    scheduler.noise_sampler = None  # as in DPMSolverSDEScheduler, which needs another package to be built
    with pytest.raises(ModelError, match="sde-dpmsolver"):
        Trajectories(scheduler, 6, torch.zeros(4, 3, 3), torch.Generator(), 1, 0.0)


def test_a_flow_matching_scheduler_is_refused_where_nothing_is_said_of_the_flow() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="FlowMatch"):
        Trajectories(scheduler, 6, torch.zeros(4, 3, 3), torch.Generator(), 1, 0.0)


def test_a_scheduler_that_takes_no_sigmas_is_refused_where_the_pipeline_gives_them() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ModelError, match="FlowMatchHeunDiscreteScheduler cannot be given sigmas"):
        new_scheduler(scheduler, 6, torch.device("cpu"), Flow(16, even=True))


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
@pytest.mark.parametrize("shifts", [False, True])
def test_timesteps_are_those_of_the_pipeline(name: str, shifts: bool) -> None:
    pipe = ft.zoo.random_pipeline(name)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shifts)
    flow = Flow(16, even=name == "tiny-flux")
    own = new_scheduler(pipe.scheduler, 3, torch.device("cpu"), flow)
    pipe("a red cube", num_inference_steps=3, output_type="latent")
    assert torch.equal(own.timesteps, pipe.scheduler.timesteps)
    assert torch.equal(own.sigmas, pipe.scheduler.sigmas)


def test_packed_latents() -> None:
    latents = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    run = Trajectories(scheduler, 2, latents, torch.Generator(), 2, 0.0, Flow(9, even=True))
    assert torch.equal(run.model_input(0), torch.stack([latents, latents]))
    run.advance(0, torch.ones(2, 9, 4))
    torch.testing.assert_close(run.latents[1], latents - 0.5)
    assert run.select([0, 0, 1]).latents.shape == (3, 9, 4)
