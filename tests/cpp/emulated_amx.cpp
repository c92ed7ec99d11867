// The AMX kernels with the tile instructions replaced by plain loops, so that processors with AVX-512 but no AMX test
// them too. The table is emulated_amx_kernels, and all it consists of lives in the namespace emulated_amx.
//
// TDPBF16PS adds products of pairs in float32, rounds to nearest and flushes subnormal numbers to zero; the loops
// differ from it in the order of additions and in flushing.

// As in vec_avx512.h, which would otherwise be the first to include it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace emulation {
namespace {

struct Tile {
  unsigned char rows[16][64];
};
thread_local Tile tiles[8];
thread_local bool configured = false;

// An instruction on tiles that were never configured is illegal.
inline Tile& configured_tile(int tile) {
  if (!configured) __builtin_trap();
  return tiles[tile];
}

inline void configure() {
  std::memset(tiles, 0, sizeof(tiles));
  configured = true;
}

inline void load(int tile, const void* data, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(configured_tile(tile).rows[row], static_cast<const unsigned char*>(data) + row * row_bytes, 64);
}

inline void store(int tile, void* data, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<unsigned char*>(data) + row * row_bytes, configured_tile(tile).rows[row], 64);
}

inline void multiply(int c, int a, int b) {
  for (int row = 0; row < 16; ++row) {
    float sums[16];
    attnrb::bfloat16 left[32];
    std::memcpy(sums, configured_tile(c).rows[row], 64);
    std::memcpy(left, configured_tile(a).rows[row], 64);
    for (int pair = 0; pair < 16; ++pair) {
      attnrb::bfloat16 right[32];
      std::memcpy(right, configured_tile(b).rows[pair], 64);
      for (int column = 0; column < 16; ++column)
        for (int half = 0; half < 2; ++half)
          sums[column] += attnrb::to_float(left[2 * pair + half]) * attnrb::to_float(right[2 * column + half]);
    }
    std::memcpy(configured_tile(c).rows[row], sums, 64);
  }
}

}  // namespace
}  // namespace emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (static_cast<void>(config), emulation::configure())
#define _tile_release() static_cast<void>(emulation::configured = false)
#define _tile_loadd emulation::load
#define _tile_stream_loadd emulation::load
#define _tile_stored emulation::store
#define _tile_zero(tile) static_cast<void>(emulation::configured_tile(tile) = emulation::Tile())
#define _tile_dpbf16ps emulation::multiply

#define amx emulated_amx
#define amx_kernels emulated_amx_kernels
#include "core/kernels/amx.cpp"
