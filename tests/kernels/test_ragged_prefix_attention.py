"""``ragged_prefix_attention`` against each run by itself in float64: ragged suffixes, several bases, masked keys."""

from __future__ import annotations

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.ragged_prefix_attention import padded_sdpa, ragged_prefix_attention, reference

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

SMALL = (16, 16, 4, 1)
RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}


def inputs(lengths, length, heads, width, dtype=torch.float32, groups=1, seed=0):
    """q, k, v, k_base, v_base, cu_seqlens of runs whose suffixes have the given lengths."""
    g = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    shapes = [(sum(lengths), heads, width)] * 3 + [(groups, length, heads, width)] * 2
    return [*(torch.randn(shape, generator=g).to(dtype) for shape in shapes), bounds]


def launch(guarded, arguments, *, blocks=SMALL, **options):
    """The kernel between guard regions, with poisoned gaps between tokens, as in a fused projection."""
    from fasttrace.kernels.ragged_prefix_attention.launch import ragged_prefix_attention as triton_attention

    *tensors, bounds = arguments
    out = guarded(tuple(tensors[0].shape), tensors[0].dtype)
    tensors = [guarded(x.flatten(-2), gap=8).unflatten(-1, x.shape[-2:]) for x in tensors]
    options = {n: guarded(o) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    triton_attention(*tensors, guarded(bounds), **options, out=out, blocks=blocks)
    return out


def truth(arguments, **options):
    *tensors, bounds = arguments
    return reference(*(x.double() for x in tensors), bounds, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("width", [8, 32, 64, 80, 128])
def test_head_dimensions(width, dtype, device, guarded, assert_close):
    arguments = inputs([3, 17], 19, 1, width, dtype)
    assert_close(launch(guarded, arguments), truth(arguments), RATIO[dtype])


@pytest.mark.parametrize("lengths", [[1], [21], [0, 5, 0], [1, 1, 1], [16, 21, 2], [21, 0, 20, 17]], ids=str)
def test_suffixes_from_nothing_to_the_whole_sequence(lengths, device, guarded, assert_close):
    arguments = inputs(lengths, 21, 1, 8)
    assert_close(launch(guarded, arguments), truth(arguments), 2e-6)


@pytest.mark.parametrize("blocks", [(16, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 2)], ids=str)
def test_any_block_shape(blocks, device, guarded, assert_close):
    arguments = inputs([2, 35, 18], 35, 1, 8)
    assert_close(launch(guarded, arguments, blocks=blocks), truth(arguments), 2e-6)


def test_several_base_runs_and_heads(device, guarded, assert_close):
    arguments = inputs([4, 11, 1, 8], 11, 2, 8, groups=3)
    base = torch.tensor([2, 0, 0, 1], dtype=torch.int32)
    assert_close(launch(guarded, arguments, base=base, scale=0.3), truth(arguments, base=base, scale=0.3), 2e-6)


HOLES = torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize(
    "keys",
    [slice(0), slice(None), slice(18, None), slice(5), HOLES],
    ids=["none_seen", "all_seen", "left_padded", "right_padded", "holes"],
)
def test_masked_keys(keys, device, guarded, assert_close):
    arguments = inputs([4, 20, 18], 20, 1, 8, groups=2)
    base = torch.tensor([1, 0, 1], dtype=torch.int32)
    seen = torch.zeros(2, 20, dtype=torch.bool)
    seen[:, keys] = True
    out = launch(guarded, arguments, base=base, key_mask=seen)
    assert_close(out, truth(arguments, base=base, key_mask=seen), 2e-6)
    if not seen.any():
        assert not out.any()


def test_base_tokens_that_a_run_replaces_are_not_read(device, guarded, assert_close):
    arguments = inputs([7, 5], 20, 1, 8)
    expected = truth(arguments)
    for cache in arguments[3:5]:
        cache[:, 15:] = float("nan")
    assert_close(launch(guarded, arguments), expected, 2e-6)


def test_a_run_does_not_depend_on_its_batch_mates(device, guarded):
    arguments = inputs([6, 19, 3], 19, 1, 8)
    whole = launch(guarded, arguments)
    *tensors, _ = arguments
    alone = [*(x[6:25] for x in tensors[:3]), *tensors[3:], torch.tensor([0, 19], dtype=torch.int32)]
    assert torch.equal(launch(guarded, alone), whole[6:25])


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_an_empty_plan_launches_nothing(lengths, device, guarded):
    assert launch(guarded, inputs(lengths, 5, 1, 8)).shape == (0, 1, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_padded_sdpa_matches_the_reference(masked, dtype, assert_close):
    arguments = inputs([4, 0, 11, 1], 11, 2, 8, dtype, groups=2)
    options = {"base": torch.tensor([1, 0, 0, 1], dtype=torch.int32)}
    if masked:
        options["key_mask"] = torch.arange(11).expand(2, -1) >= torch.tensor([[3], [8]])
    assert_close(padded_sdpa(*arguments, **options), truth(arguments, **options), RATIO[dtype])


def test_wrong_shapes_and_layouts_are_named():
    from fasttrace.kernels.ragged_prefix_attention.launch import ragged_prefix_attention as triton_attention

    q, k, v, k_base, v_base, bounds = inputs([2, 3], 5, 2, 8)
    with pytest.raises(KernelError, match="expected one"):
        ragged_prefix_attention(q, k[:1], v, k_base, v_base, bounds)
    with pytest.raises(KernelError, match="k_base"):
        ragged_prefix_attention(q, k, v, k_base[..., :4], v_base, bounds)
    with pytest.raises(KernelError, match="key_mask"):
        ragged_prefix_attention(q, k, v, k_base, v_base, bounds, key_mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads must be adjacent"):
        triton_attention(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, k_base, v_base, bounds)
    with pytest.raises(ValueError, match="at most 128"):
        triton_attention(*inputs([2], 5, 1, 130))


def test_registration_is_sound():
    op, arguments = torch.ops.fasttrace.ragged_prefix_attention.default, tuple(inputs([2, 3], 5, 2, 8))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
