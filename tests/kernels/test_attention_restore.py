"""``attention_restore`` against its definition in float64: every split of the head, odd lengths, adversarial maps."""

from __future__ import annotations

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.attention_restore import attention_restore, attention_sdpa, reference, shape_class
from fasttrace.ops.restore import ADD, KEEP, ZERO, add_code, slot_code

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

SMALL = (16, 16, 4, 1)
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3}


def qkv(rows, queries, keys, heads, width, dtype=torch.float32, seed=0, kv_rows=None):
    g = torch.Generator().manual_seed(seed)
    kv = (kv_rows or rows, keys, heads, width)
    shapes = ((rows, queries, heads, width), kv, kv)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def launch(guarded, q, k, v, *, blocks=SMALL, **options):
    """The kernel between guard regions; q, k and v lie in rows with poisoned gaps, as in a fused projection."""
    from fasttrace.kernels.attention_restore.launch import attention_restore as triton_attention

    out = guarded(tuple(q.shape), q.dtype)
    q, k, v = (guarded(x.flatten(2), gap=8).unflatten(2, x.shape[2:]) for x in (q, k, v))
    options = {n: guarded(o) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    triton_attention(q, k, v, **options, out=out, blocks=blocks)
    return out


def truth(q, k, v, **options):
    options = {n: o.double() if n == "bank" else o for n, o in options.items()}
    return reference(q.double(), k.double(), v.double(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("width", [8, 16, 40, 64, 80, 160])
def test_every_split_of_the_head(width, dtype, device, guarded, assert_close):
    q, k, v = qkv(1, 18, 35, 2, width, dtype)
    assert_close(launch(guarded, q, k, v), truth(q, k, v), RATIO[dtype])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (16, 16), (17, 32), (33, 5)])
def test_odd_and_even_lengths(queries, keys, device, guarded, assert_close):
    q, k, v = qkv(2, queries, keys, 1, 16, seed=queries)
    assert_close(launch(guarded, q, k, v, scale=0.5), truth(q, k, v, scale=0.5), 2e-6)


@pytest.mark.parametrize("blocks", [(16, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 16, 41])
def test_causal(length, blocks, device, guarded, assert_close):
    q, k, v = qkv(1, length, length, 2, 16)
    assert_close(launch(guarded, q, k, v, causal=True, blocks=blocks), truth(q, k, v, causal=True), 2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_rows_without_a_visible_key(causal, device, guarded, assert_close):
    q, k, v = qkv(4, 20, 20, 1, 16)
    lengths = torch.tensor([20, 0, 1, 17], dtype=torch.int32)
    k[3, 17:], v[3, 17:] = float("nan"), float("nan")
    out = launch(guarded, q, k, v, kv_length=lengths, causal=causal)
    k[3, 17:], v[3, 17:] = 0, 0
    assert_close(out, truth(q, k, v, kv_length=lengths, causal=causal), 2e-6)
    assert not out[1].any()


@pytest.mark.parametrize("width", [40, 48, 80])
def test_heads_padded_to_a_power_of_two(width, device, guarded, assert_close):
    from fasttrace.kernels.attention_restore.launch import padded, split

    assert padded(width)[0] > sum(split(width)) or width == 48
    q, k, v = qkv(1, 18, 35, 2, width)
    assert_close(launch(guarded, q, k, v, columns=padded(width)), truth(q, k, v), 2e-6)


@pytest.mark.parametrize("options", ["plain", "lengths", "shared", "restored", "heads"])
@pytest.mark.parametrize("more", [1, 16, 35])
def test_a_second_segment_of_keys(more, options, device, guarded, assert_close):
    q, k, v = qkv(3, 18, 7, 2, 16, kv_rows=2 if options == "shared" else 3)
    _, more_k, more_v = qkv(k.shape[0], 1, more, 2, 16, seed=1)
    row = {"kv_row": torch.tensor([1, 0, 1], dtype=torch.int32)}
    given = {
        "plain": {},
        "lengths": {"kv_length": torch.tensor([7, 0, 3], dtype=torch.int32)},
        "shared": row,
        "restored": {"source": torch.tensor([[0], [ZERO], [KEEP]], dtype=torch.int32).expand(3, 18).contiguous()},
        "heads": {
            "head_source": torch.tensor([[2], [KEEP], [ZERO]]).int().expand(3, 36).reshape(3, 18, 2).contiguous()
        },
    }[options]
    expected = truth(q, k, v, **given, more_k=more_k.double(), more_v=more_v.double())
    assert_close(launch(guarded, q, k, v, **given, more_k=more_k, more_v=more_v), expected, 2e-6)
    assert_close(attention_sdpa(q, k, v, **given, more_k=more_k, more_v=more_v), expected, 2e-6)
    if options == "plain":
        both = truth(q, torch.cat([k, more_k], 1), torch.cat([v, more_v], 1))
        assert_close(expected, both, 1e-12)


@pytest.mark.parametrize("wrong", ["absent", "shape", "causal"])
def test_a_second_segment_that_does_not_fit_is_named(wrong):
    q, k, v = qkv(2, 7, 7, 1, 8)
    more = {"more_k": k, "more_v": v}
    more |= {"absent": {"more_v": None}, "shape": {"more_v": v[:1]}, "causal": {"causal": True}}[wrong]
    with pytest.raises(KernelError, match=r"more_k .*expected both"):
        attention_restore(q, k, v, **more)


def test_a_backend_that_is_not_there_says_so():
    q, k, v = qkv(1, 3, 3, 1, 8)
    with pytest.raises(KernelError, match="CUDNN_ATTENTION cannot serve this call"):
        attention_restore(q, k, v, implementation="cudnn")


def test_rows_that_share_the_keys_of_one_text(device, guarded, assert_close):
    q, k, v = qkv(5, 17, 7, 2, 8, kv_rows=2)
    options = {
        "kv_row": torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32),
        "kv_length": torch.tensor([7, 3], dtype=torch.int32),
    }
    assert_close(launch(guarded, q, k, v, **options), truth(q, k, v, **options), 2e-6)


def maps(rows, queries):
    """Source maps by name: from nothing restored to everything, ragged across blocks of 16, every kind of code."""
    keep = torch.full((rows, queries), KEEP, dtype=torch.int32)
    every = torch.tensor([KEEP, ZERO, 0, slot_code(0, rows), ADD, add_code(3)], dtype=torch.int32)
    ragged, block, row = keep.clone(), keep.clone(), keep.clone()
    ragged[1, 5:18], block[1, :16], row[1] = 0, 0, 0
    mixed = every[torch.randint(0, 6, (rows, queries), generator=torch.Generator().manual_seed(3))]
    mixed[0] = torch.where(mixed[0] == ZERO, 0, KEEP)
    return {
        "keep": keep,
        "ragged": ragged,
        "block": block,
        "row": row,
        "all": torch.full_like(keep, ZERO),
        "added": torch.full_like(keep, add_code(1)),
        "mixed": mixed,
    }


@pytest.mark.parametrize("name", ["keep", "ragged", "block", "row", "all", "added", "mixed"])
def test_positions_restored_at_the_site_are_zero(name, device, guarded, assert_close):
    q, k, v = qkv(3, 20, 19, 1, 8)
    source = maps(3, 20)[name]
    read = (source == KEEP) | (source <= ADD)
    read[0] |= source[0] == 0
    q[~read] = float("nan")
    out = launch(guarded, q, k, v, source=source)
    expected = truth(q.nan_to_num(0.0), k, v, source=source)
    assert not out[~read].any()
    assert_close(out, expected, 2e-6)


def test_a_source_map_expanded_from_one_code_a_row(device, guarded, assert_close):
    from fasttrace.kernels.attention_restore.launch import attention_restore as triton_attention

    q, k, v = (guarded(x) for x in qkv(3, 20, 19, 1, 8))
    source = guarded(torch.tensor([[KEEP], [0], [KEEP]], dtype=torch.int32)).expand(3, 20)
    out = triton_attention(q, k, v, source, out=guarded((3, 20, 1, 8)), blocks=SMALL)
    assert_close(out, truth(q.cpu(), k.cpu(), v.cpu(), source=source.cpu()), 2e-6)


@pytest.mark.parametrize(
    ("name", "width"),
    [("ragged", 8), ("block", 8), ("row", 8), ("all", 8), ("added", 8), ("mixed", 8), ("mixed", 40)],
)
def test_restored_head_values(name, width, device, guarded, assert_close):
    rows, queries, heads = 3, 18, 2
    q, k, v = qkv(rows, queries, 5, heads, width)
    head_source = torch.full((rows, queries, heads), KEEP, dtype=torch.int32)
    head_source[..., 1] = maps(rows, queries)[name]
    bank = torch.randn(5, queries, heads, width, generator=torch.Generator().manual_seed(1))
    out = launch(guarded, q, k, v, head_source=head_source, bank=bank)
    assert_close(out, truth(q, k, v, head_source=head_source, bank=bank), 2e-6)
    if name == "row":
        assert torch.equal(out[1, :, 1], out[0, :, 1])


def test_head_values_beside_a_restored_site_shared_texts_and_lengths(device, guarded, assert_close):
    q, k, v = qkv(3, 18, 9, 1, 8, kv_rows=2)
    g = torch.Generator().manual_seed(4)
    options = {
        "source": maps(3, 18)["ragged"],
        "head_source": torch.randint(-1, 3, (3, 18, 1), generator=g, dtype=torch.int32),
        "kv_row": torch.tensor([1, 0, 1], dtype=torch.int32),
        "kv_length": torch.tensor([4, 9], dtype=torch.int32),
    }
    assert_close(launch(guarded, q, k, v, **options), truth(q, k, v, **options), 2e-6)


def test_rows_do_not_depend_on_their_batch_mates(device, guarded):
    q, k, v = qkv(3, 18, 21, 2, 8)
    whole = launch(guarded, q, k, v)
    assert torch.equal(launch(guarded, q[1:2], k[1:2], v[1:2])[0], whole[1])


def test_empty_batches_and_no_keys(device, guarded):
    assert launch(guarded, *qkv(0, 5, 5, 1, 8)).shape == (0, 5, 1, 8)
    assert not launch(guarded, *qkv(2, 5, 0, 1, 8)).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sdpa_with_copies_matches_the_reference(dtype, causal, assert_close):
    q, k, v = qkv(3, 18, 18, 2, 8, dtype)
    lengths = torch.tensor([18, 0, 5], dtype=torch.int32)
    head_source = torch.randint(-4, 5, (3, 18, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    bank = torch.randn(2, 18, 2, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    kv_row = torch.tensor([2, 1, 0], dtype=torch.int32)
    for lengths_or_none in (lengths, None):
        options = {"source": maps(3, 18)["mixed"], "head_source": head_source, "bank": bank}
        options |= {"kv_row": kv_row, "kv_length": lengths_or_none, "causal": causal}
        ratio = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        assert_close(attention_sdpa(q, k, v, **options), truth(q, k, v, **options), ratio)


def test_wrong_layouts_are_named():
    from fasttrace.kernels.attention_restore.launch import attention_restore as triton_attention

    q, k, v = qkv(2, 6, 6, 2, 8)
    with pytest.raises(ValueError, match="heads must be adjacent"):
        triton_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    with pytest.raises(ValueError, match="at most 160"):
        triton_attention(*qkv(1, 2, 2, 1, 168))
    with pytest.raises(KernelError, match="kv_row"):
        attention_restore(q, k[:1], v[:1])
    with pytest.raises(KernelError, match="source"):
        attention_restore(q, k, v, torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(KernelError, match="as many keys"):
        attention_restore(q, k[:, :3], v[:, :3], causal=True)


@pytest.mark.parametrize(
    ("width", "columns"),
    [(8, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (160, (128, 32))],
)
def test_columns_of_a_split_head(width, columns):
    from fasttrace.kernels.attention_restore.launch import CONFIGS, config, split

    assert split(width) == columns
    for arch in (75, 80, 86, 90, 100):
        assert config(arch, width, 4096, 4096, False) in CONFIGS.values()
    q = torch.empty(1, 200, 1, width)
    assert shape_class(q, q) == f"hd{width}_long"
    assert shape_class(q, q[:, :77]) == f"hd{width}_cross"


def test_every_config_is_compiled_somewhere():
    from fasttrace.kernels.attention_restore.launch import CONFIGS, compile_cases

    compiled = {(c.archs[0], c.constants["BM"], c.constants["BN"], c.num_warps, c.num_stages) for c in compile_cases()}
    assert {(arch, *blocks) for (arch, *_), blocks in CONFIGS.items()} <= compiled


def test_registration_is_sound():
    q, k, v = qkv(2, 6, 6, 2, 8)
    arguments = (q, k, v, maps(2, 6)["keep"])
    torch.library.opcheck(
        torch.ops.fasttrace.attention_restore.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
