"""The profile of a pipeline: its counts are exact, and its times come from the pipeline that was given."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fasttrace as ft
from fasttrace.errors import SiteError, StudyError
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims
from fasttrace.profile import profile
from fasttrace.profile.ceilings import Ceilings, copy_bandwidth, gemm_rate
from fasttrace.profile.live import LiveBytes, live_bytes
from fasttrace.profile.measure import UNetCaller, batch_curve, kind_costs
from fasttrace.profile.savings import savings, text_share
from fasttrace.profile.show import print_profile
from fasttrace.profile.stages import stage_costs
from fasttrace.profile.text_sweep import text_sweep

LIMITS = Ceilings(flops=1e9, bandwidth=1e8)


def test_operations_by_kind_are_those_of_the_layers(tiny: Any) -> None:
    costs = {cost.kind: cost for cost in kind_costs(UNetCaller(tiny), 1, LIMITS, rounds=1)}
    sites = [site for site in ft.discover_sites(tiny) if site.part == "unet"]
    assert {kind: cost.sites for kind, cost in costs.items() if kind != "other"} == {
        kind: sum(site.kind == kind for site in sites) for kind in {site.kind for site in sites}
    }
    # A feed-forward is two matrix products and nothing else that counts: 2 x weights x positions.
    counted = 0
    for site in sites:
        if site.kind == "mlp":
            level = 8 if ".down_blocks.0" in site.name or site.name.startswith("unet.up_blocks.1") else 4
            weights = sum(p.numel() for p in site.module.parameters() if p.ndim == 2)
            counted += 2 * weights * level**2
    assert costs["mlp"].flops == counted
    assert all(cost.flops > 0 and cost.seconds > 0 for kind, cost in costs.items() if kind != "other")
    assert costs["other"].flops > 0
    described = describe_unet(tiny.unet).sites
    for kind, cost in costs.items():
        shapes = [described[site.name].shape(Dims(8, 8, 5)) for site in sites if site.kind == kind]
        assert cost.values == 4 * sum(math.prod(shape) for shape in shapes)
        assert cost.held >= max((4 * math.prod(shape) for shape in shapes), default=0)
    assert costs["other"].held > max(cost.held for kind, cost in costs.items() if kind != "other")


def test_live_bytes_are_those_of_storages_until_their_last_view_is_gone() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        first = given + 1
        view = first[10:20]
        del first
        assert live.now == 4000
        given.add_(1)
        assert live.now == 4000
        second = torch.ones(500)
        assert live.now == 6000
        del view
        assert live.now == 2000
        del second
    assert (live.now, live.peak) == (0, 6000)


def test_what_a_module_holds_leaves_out_what_its_caller_holds() -> None:
    inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid(), torch.nn.Tanh())
    outer = torch.nn.Sequential(torch.nn.Identity(), inner)

    def run() -> None:
        kept = torch.ones(10_000)
        outer(torch.ones(1000))
        del kept

    peaks, whole = live_bytes(run, {"inner": inner})
    # A Sequential holds its latest value while it makes the next one; the caller holds 44,000 bytes.
    assert peaks == {"inner": 8000}
    assert whole == 52_000
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in outer.modules())


def test_the_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert LIMITS.floor(flops=5e9, moved=1e8) == 5.0
    assert LIMITS.floor(flops=1e9, moved=1e9) == 10.0


def test_ceilings_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < gemm_rate(cpu, rounds=1) < 1e16
    assert 1e7 < copy_bandwidth(cpu, rounds=1) < 1e14


def test_batch_sizes_double_until_the_time_is_up(tiny_sd15: Any) -> None:
    call = UNetCaller(tiny_sd15)
    assert [point.batch for point in batch_curve(call, budget=0.0)] == [1, 2]
    sizes = [point.batch for point in batch_curve(call, budget=1000.0, largest=4)]
    assert sizes == [1, 2, 4]


def test_savings_are_the_plans_own(tiny_sd15: Any) -> None:
    sites = ft.select_sites(ft.discover_sites(tiny_sd15), "unet")
    steps = 4
    free, forced, grid = savings(tiny_sd15, sites, steps)
    calls = 2 * (steps + 1)  # PNDM takes one step more, and guidance doubles the rows
    assert free.common == 3 * len(sites) * calls
    assert free.shared == (len(sites) + 2) * calls
    assert forced.planned < free.planned <= free.shared
    assert grid.planned < grid.shared


def test_stages_count_the_operations_of_their_modules(tiny_sd15: Any) -> None:
    text, picture = stage_costs(tiny_sd15, LIMITS)
    encoder, length = tiny_sd15.text_encoder, 77
    linears = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    products = 2 * length * sum(linear.weight.numel() for linear in linears)
    attention = 4 * length**2 * encoder.config.hidden_size * encoder.config.num_hidden_layers
    assert text.flops == products + attention
    assert text.weights == sum(parameter.nbytes for parameter in encoder.parameters())
    assert text.floor == max(text.flops / LIMITS.flops, text.weights / LIMITS.bandwidth)
    assert picture.flops > 0
    assert text.seconds > 0
    assert picture.seconds > 0


def test_the_text_sweep_is_every_site_at_every_token(tiny: Any) -> None:
    sweep = text_sweep(tiny)
    assert sweep.runs == 3 * 2 * 77
    assert sweep.planned < sweep.shared < sweep.common
    assert sweep.common / sweep.shared == pytest.approx(3 * sweep.runs / (sweep.runs + 2))
    assert 0 < sweep.sampled < sweep.runs
    assert sweep.seconds > 0


def test_a_texts_keys_and_values_are_a_share_of_the_call(tiny_sd15: Any) -> None:
    whole = sum(cost.flops for cost in kind_costs(UNetCaller(tiny_sd15), 1, LIMITS, rounds=1))
    sites = [site for site in ft.discover_sites(tiny_sd15) if site.kind == "cross_attn"]
    keys = 2 * 77 * sum(m.weight.numel() for site in sites for m in (site.module.to_k, site.module.to_v))
    assert text_share(tiny_sd15) == pytest.approx(keys / whole, rel=0.02)


def test_the_users_pipeline_keeps_no_hooks(tiny_sd15: Any) -> None:
    profile(tiny_sd15, budget=0.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_sd15.unet.modules())


def test_a_profile_is_printed_and_saved(tiny_sd15: Any, tmp_path: Path) -> None:
    measured = profile(tiny_sd15, "unet.mid_block.*", model="tiny", prompts=3, seeds=2, budget=5.0)
    screen = io.StringIO()
    print_profile(measured, Console(file=screen, width=120))
    for text in ("resnet", "ms a sample", "site x step", "Ceilings", "three runs a patch", "MiB held", "VAE decoder"):
        assert text in screen.getvalue()
    measured.save(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert saved["prompts"] == 3
    assert [kind["kind"] for kind in saved["kinds"]] == [cost.kind for cost in measured.kinds]
    assert (tmp_path / "new" / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"sites": "text"}, StudyError), ({"sites": "unet.nothing"}, SiteError), ({"steps": 0}, StudyError)],
)
def test_bad_input_is_refused(tiny_sd15: Any, arguments: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        profile(tiny_sd15, **arguments)


def test_the_command_writes_a_profiler_trace(tmp_path: Path) -> None:
    from fasttrace.cli.app import app

    options = ["profile", "random:tiny-sd15", "--budget", "0.5", "--trace", str(tmp_path / "trace.json")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
