// The kernel of rank_update.cu. A block updates a tile of 32 x 128 elements: each of its four warps holds eight rows in
// registers, four columns a lane, and adds the outer products while the factors pass through shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rank_update.h"

namespace fasttrace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowsPerWarp = 8;
constexpr int kRows = kWarps * kRowsPerWarp;
constexpr int kLaneColumns = 4;
constexpr int kColumns = 32 * kLaneColumns;
constexpr int kRankChunk = 16;
constexpr int kBatch = 48;  // the table travels as a kernel argument, of which 4 KiB are allowed everywhere

struct RankUpdateTile {
  RankUpdateMatrix matrix;
  int32_t first;         // index of the matrix's first tile in the grid
  int32_t column_tiles;
  bool vector;           // rows start on vector boundaries and are whole vectors
};

struct RankUpdateBatch {
  RankUpdateTile tiles[kBatch];
  int32_t count;
};
static_assert(sizeof(RankUpdateBatch) <= 4096);

template <typename T>
struct alignas(kLaneColumns * sizeof(T)) Vector {
  T value[kLaneColumns];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

__device__ inline int find_matrix(const RankUpdateBatch& batch, int tile) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.tiles[middle].first <= tile) low = middle;
    else high = middle - 1;
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) rank_update_kernel(const __grid_constant__ RankUpdateBatch batch) {
  __shared__ __align__(16) float left[kRankChunk][kRows];
  __shared__ __align__(16) float right[kRankChunk][kColumns];

  const RankUpdateTile& entry = batch.tiles[find_matrix(batch, blockIdx.x)];
  const RankUpdateMatrix& m = entry.matrix;
  const int tile = blockIdx.x - entry.first;
  const int tile_row = tile / entry.column_tiles * kRows, tile_column = tile % entry.column_tiles * kColumns;
  const int thread = threadIdx.x, lane = thread % 32, warp_row = thread / 32 * kRowsPerWarp;
  const int row = tile_row + warp_row, column = tile_column + lane * kLaneColumns;
  const int64_t weight_stride = m.weight_stride, out_stride = m.out_stride;
  const T* weight = static_cast<const T*>(m.weight) + row * weight_stride + column;
  T* out = static_cast<T*>(m.out) + row * out_stride + column;

  float sum[kRowsPerWarp][kLaneColumns];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    Vector<T> vector = {};
    if (row + r < m.rows) {
      if (entry.vector && column < m.columns) vector = *reinterpret_cast<const Vector<T>*>(weight + r * weight_stride);
      else
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c)
          if (column + c < m.columns) vector.value[c] = weight[r * weight_stride + c];
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) sum[r][c] = widen(vector.value[c]);
  }

  for (int start = 0; start < m.rank; start += kRankChunk) {
    const int chunk = min(kRankChunk, m.rank - start);
    __syncthreads();
    for (int i = thread / kRows; i < chunk; i += kThreads / kRows) {
      const int r = thread % kRows;
      left[i][r] = tile_row + r < m.rows ? m.left[int64_t(tile_row + r) * m.rank + start + i] : 0.0f;
    }
    for (int i = 0; i < chunk; ++i)
      right[i][thread] =
          tile_column + thread < m.columns ? m.right[int64_t(tile_column + thread) * m.rank + start + i] : 0.0f;
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < chunk; ++i) {
      const Vector<float> b = *reinterpret_cast<const Vector<float>*>(&right[i][lane * kLaneColumns]);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r)
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) sum[r][c] = fmaf(left[i][warp_row + r], b.value[c], sum[r][c]);
    }
  }

#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (row + r >= m.rows) break;
    Vector<T> vector;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) narrow(sum[r][c], vector.value[c]);
    if (entry.vector && column < m.columns) *reinterpret_cast<Vector<T>*>(out + r * out_stride) = vector;
    else
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c)
        if (column + c < m.columns) out[r * out_stride + c] = vector.value[c];
  }
}

// Fills one launch from the front of the list. Returns how many matrices it took; `grid` receives the number of tiles.
inline int fill_batch(const RankUpdateMatrix* matrices, int count, int64_t vector_bytes, RankUpdateBatch& batch, int& grid) {
  batch.count = 0;
  grid = 0;
  int taken = 0;
  for (; taken < count && batch.count < kBatch; ++taken) {
    const RankUpdateMatrix& m = matrices[taken];
    if (m.rows == 0 || m.columns == 0) continue;
    const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % vector_bytes == 0; };
    const auto whole = [](int64_t n) { return n % kLaneColumns == 0; };
    RankUpdateTile& tile = batch.tiles[batch.count++];
    tile.matrix = m;
    tile.first = grid;
    tile.column_tiles = (m.columns + kColumns - 1) / kColumns;
    tile.vector = aligned(m.weight) && aligned(m.out) && whole(m.columns) && whole(m.weight_stride) && whole(m.out_stride);
    grid += (m.rows + kRows - 1) / kRows * tile.column_tiles;
  }
  return taken;
}

}  // namespace fasttrace
