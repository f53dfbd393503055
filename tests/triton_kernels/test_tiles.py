import pytest
import torch
from int8fx.triton_kernels import tiles
from int8fx.triton_kernels.tiles import Decoding, Tile
from support.triton import DTYPES

H100 = ("sm_90", 132)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, 17, 64])
def test_a_weight_only_tile_holds_all_of_few_rows(M, dtype):
    for N, K in ((4096, 4096), (1024, 4096), (28672, 8192), (8, 16)):
        for tile in tiles.for_weight_only(M, N, K, 1, dtype, *H100):
            assert tile.BLOCK_M >= M
            assert tile.SPLIT_K == 1 or 4 * tile.SPLIT_K * tile.BLOCK_K <= K


@pytest.mark.parametrize("M", [1, 16, 64, 100, 1000])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_k_is_in_one_group(M, parts, dtype):
    for size, K in ((32, 4096), (64, 4096), (256, 4096), (96, 960), (128, 4064), (7, 4096), (1, 33), (200, 4096)):
        for decoding in (Decoding(size, parts), Decoding(size, parts, True)):
            for tile in tiles.for_weight_only(M, 4096, K, 1, dtype, *H100, decoding):
                step = tile.BLOCK_K
                assert step >= tiles.MIN_STEP
                assert step.bit_count() == 1
                if size % 32 == 0:
                    assert size % step == K % step == 0
                else:
                    assert step <= max(2 * size, tiles.MIN_STEP)


def test_many_rows_may_take_the_tallest_tile():
    found = tiles.for_weight_only(2048, 4096, 4096, 1, torch.bfloat16, *H100)
    assert [tile.BLOCK_M for tile in found] == [128, 64]
    ranged = tiles.for_weight_only(2048, 4096, 4096, 1, torch.bfloat16, *H100, Decoding(64, 3, True))
    assert {tile.BLOCK_M for tile in ranged} == {64}  # 128 rows with a range of scales would spill


def test_k_is_split_until_most_processors_work():
    device = (1, torch.float16, *H100)
    shapes = ((4096, 4096), (8192, 8192), (28672, 8192), (1024, 4096))
    assert [tiles.for_fused_linear(*shape, *device)[0].SPLIT_K for shape in shapes] == [2, 1, 1, 4]
    assert [tiles.for_weight_only(16, *shape, *device)[0].SPLIT_K for shape in shapes] == [1, 1, 1, 4]
    assert [tiles.for_weight_only(64, *shape, *device)[0].SPLIT_K for shape in shapes] == [2, 1, 1, 8]


@pytest.mark.parametrize(
    ("M", "N", "expected"),
    [
        (2048, 8192, (128, 128, 1)),
        (2048, 4096, (128, 128, 1)),
        (512, 4096, (64, 128, 1)),
        (128, 4096, (64, 64, 1)),
        (17, 4096, (64, 64, 2)),
        (17, 1024, (64, 64, 8)),
    ],
)
def test_the_largest_tile_that_fills_the_device_comes_first(M, N, expected):
    tile = tiles.for_int8_matmul(M, N, 4096, 1, torch.float16, False, *H100)[0]
    assert expected == (tile.BLOCK_M, tile.BLOCK_N, tile.SPLIT_K)


@pytest.mark.parametrize("N", [128, 4096, 28672])
@pytest.mark.parametrize(("M", "largest"), [(1, 16), (16, 16), (17, 64), (128, 128), (2048, 128)])
def test_a_tile_of_few_rows_is_for_few_rows(M, largest, N):
    """Each row of tiles reads the whole weight, so such a tile serves no more rows, even on an idle device."""
    candidates = tiles.for_int8_matmul(M, N, 4096, 1, torch.bfloat16, False, *H100)
    assert all(tile.BLOCK_M == 16 if largest == 16 else tile.BLOCK_M >= 64 for tile in candidates)
    assert N < 28672 or largest == candidates[0].BLOCK_M
    assert len(set(candidates)) == len(candidates)


def test_tiles_are_timed_once_and_never_while_a_graph_is_captured(monkeypatch, tmp_path):
    candidates = tuple(Tile(16, 16, 32, warps, 2) for warps in (1, 2, 4))
    timed = []
    capturing = True
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(tiles, "_time", lambda run: timed.append(run()) or abs(timed[-1] - 2))

    def choose():
        return tiles.fastest("kernel", (1, 2, 3), candidates, lambda tile: tile.num_warps)

    assert choose() is candidates[0]
    assert timed == []
    capturing = False
    assert choose() is choose() is candidates[1]
    monkeypatch.setattr(tiles, "_fastest", {})  # another process
    assert choose() is candidates[1]
    assert timed == [1, 2, 4]
    assert tiles.fastest("kernel", (1,), candidates[:1], None) is candidates[0]
