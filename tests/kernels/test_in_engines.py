"""The kernels run the engines: sweeps of the smallest models through Triton, interpreted on a CPU, equal the oracle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.edit import select_matrices
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims
from fasttrace.ops.attention_restore import attention_restore
from fasttrace.ops.geglu import geglu
from fasttrace.ops.gelu_up import gelu_up
from fasttrace.ops.group_norm_silu import group_norm_silu
from fasttrace.ops.linear_restore import linear_restore
from fasttrace.ops.quick_gelu import quick_gelu
from fasttrace.ops.ragged_prefix_attention import ragged_prefix_attention
from fasttrace.ops.rank_update import update
from fasttrace.ops.residual_restore import residual_restore
from fasttrace.sites import part_sites
from tests.engine.text_models import text_model
from tests.engine.unet_cases import both, difference

pytestmark = pytest.mark.interpreter

TINY = ["tiny-sd15", "tiny-sd21", "tiny-sdxl"]
OF_A_UNET = (attention_restore, geglu, group_norm_silu, linear_restore, residual_restore)
OTHERS = (gelu_up, quick_gelu, ragged_prefix_attention, update)
LATENTS = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of each op's kernel, which every call takes."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    monkeypatch.setenv("FASTTRACE_UNITS", "ops")
    monkeypatch.setenv("FASTTRACE_IMPL", "triton")
    count: Counter[str] = Counter()
    for op in (*OF_A_UNET, *OTHERS):

        def launch(*args: Any, run: Any = op.implementations["triton"], name: str = op.name, **kwargs: Any) -> Any:
            count[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setitem(op.implementations, "triton", launch)
    return count


def mix(pipe: Any) -> list[Any]:
    """A run for every fourth site, and one for each other thing that a patch may say."""
    sites = describe_unet(pipe.unet).sites
    first = {kind: next(name for name, site in sites.items() if site.kind == kind) for kind in
             ("resnet", "self_attn", "cross_attn", "mlp", "hidden")}  # fmt: skip
    return [
        *(ft.Patch(name) for name in list(sites)[::4]),
        ft.Patch(first["self_attn"], positions=[0, 3], branch="both"),
        ft.Patch(first["cross_attn"], positions=[1], source=ft.ZERO),
        (ft.Patch(first["mlp"]), ft.Patch(first["mlp"], positions=[2], source=ft.Noise(0.5, 1))),
        (ft.Patch(first["resnet"], source="other"), ft.Patch(first["hidden"])),
        ft.Patch(first["mlp"], source=ft.Add(torch.full((sites[first["mlp"]].shape(Dims(4, 4))[-1],), 0.5))),
    ]


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("name", TINY)
def test_a_sweep_of_a_unet(name: str, protocol: str, launches: Counter[str]) -> None:
    pipe = ft.zoo.random_pipeline(name)
    options = {"protocol": protocol, "num_inference_steps": 1, "latents": LATENTS, "max_batch": 12}
    assert difference(*both(pipe, mix(pipe), **options)) < 1e-4
    assert launches.keys() == {op.name for op in OF_A_UNET}


@pytest.mark.parametrize("name", ["clip", "clip-projection", "gpt2"])
def test_a_text_sweep(name: str, launches: Counter[str]) -> None:
    model = text_model(name, torch.float32)
    ids = torch.arange(5) + 3
    noise = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    sites = [site.name for site in part_sites(model, "text_encoder")]
    patches = [ft.Patch(site, [token]) for site in sites[:6] for token in (1, 4)]
    fast, oracle = (ft.trace_text(model, ids, patches, noise, engine=engine) for engine in ("fast", "oracle"))
    torch.testing.assert_close(fast.restored, oracle.restored, rtol=1e-4, atol=1e-4)
    activation = {"gpt2": set(), "clip": {"quick_gelu"}, "clip-projection": {"gelu_up"}}[name]
    assert launches.keys() >= {"ragged_prefix_attention"} | activation


def test_an_edit(launches: Counter[str]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    edit = ft.fit_edit(pipe, {"van gogh": "painting"}, method="uce")
    with edit.applied(pipe):
        edited = {one.name: select_matrices(pipe, one.name)[0].weight.clone() for one in edit.updates}
    for one in edit.updates:
        own = select_matrices(pipe, one.name)[0].weight
        torch.testing.assert_close(edited[one.name], own + one.left @ one.right.T, rtol=1e-5, atol=1e-6)
    assert launches == {"rank_update": 1}
