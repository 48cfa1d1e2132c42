// The filter for AMX: tiles multiply codes, and 512-bit instructions turn their sums into minima.
#include <cstdint>

#include "filter512.hpp"

#define SPADE_TARGET_AMX __attribute__((target(SPADE_AVX512VNNI_FEATURES ",amx-tile,amx-int8")))
// The compiler does not know that tile instructions read and write memory.
#define SPADE_MEMORY_FENCE() asm volatile("" ::: "memory")

namespace spade {
namespace {

constexpr int kTile = 16;       // rows and queries of a tile of sums
constexpr int kTileBytes = 64;  // channels of a tile of codes
constexpr int kTileSums = kTile * kTile;
constexpr int kTileGroups = kTile / kGroup;

// The argument of _tile_loadconfig: all eight tiles are of full size.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes};
    std::uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

// Writes the minima of a tile's groups.
SPADE_TARGET_AMX SPADE_INLINE void write_minima(const std::int32_t* sums, const RowCodes& rows, int group, __m512 query_step,
                                                float* out, std::size_t group_size) {
    for (int g = 0; g < kTileGroups; ++g, sums += kGroup * kTile, out += group_size) {
        __m512 least = no_minima();
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r)
            least = with_row(least, _mm512_load_si512(sums + r * kTile), rows, (group + g) * kGroup + r, query_step);
        _mm512_storeu_ps(out, least);
    }
}

// Computes the sums of R * kTile rows with P panels, R and P up to 2. Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 queries.
template <int R, int P>
SPADE_TARGET_AMX SPADE_INLINE void multiply(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                            std::int32_t* sums) {
    const std::size_t tile_size = static_cast<std::size_t>(kTile) * rows.stride;
    const std::size_t panel_size = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * panel_size;
    const std::int32_t* initial_dot = queries.initial_dot.data() + panel * kPanel;
    SPADE_MEMORY_FENCE();
    // All rows of a tile begin with the same line: its stride is 0.
    _tile_loadd(0, initial_dot, 0);
    if constexpr (P == 2) _tile_loadd(1, initial_dot + kPanel, 0);
    if constexpr (R == 2) _tile_loadd(2, initial_dot, 0);
    if constexpr (R == 2 && P == 2) _tile_loadd(3, initial_dot + kPanel, 0);
    // Where a row has fewer codes than fill its tiles, what is read of the next row meets zeros.
    for (int c = 0; c < queries.stride; c += kTileBytes) {
        _tile_loadd(4, x + c, rows.stride);
        _tile_loadd(6, q + static_cast<std::size_t>(c) * kPanel, kTileBytes);
        _tile_dpbusd(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, q + panel_size + static_cast<std::size_t>(c) * kPanel, kTileBytes);
            _tile_dpbusd(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, x + tile_size + c, rows.stride);
            _tile_dpbusd(2, 5, 6);
        }
        if constexpr (R == 2 && P == 2) _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, kTile * 4);
    if constexpr (P == 2) _tile_stored(1, sums + kTileSums, kTile * 4);
    if constexpr (R == 2) _tile_stored(2, sums + 2 * kTileSums, kTile * 4);
    if constexpr (R == 2 && P == 2) _tile_stored(3, sums + 3 * kTileSums, kTile * 4);
    SPADE_MEMORY_FENCE();
}

// Writes the minima of R * kTile rows for P panels.
template <int R, int P>
SPADE_TARGET_AMX SPADE_INLINE void filter_tiles(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                                float* out, std::size_t group_size) {
    // Nothing waits for the minima, so the processor may begin with the next tiles while it computes these.
    alignas(64) std::int32_t sums[4 * kTileSums];
    multiply<R, P>(rows, group, queries, panel, sums);
    for (int p = 0; p < P; ++p) {
        const __m512 query_step = _mm512_load_ps(queries.step.data() + (panel + p) * kPanel);
        for (int r = 0; r < R; ++r)
            write_minima(sums + (2 * r + p) * kTileSums, rows, group + r * kTileGroups, query_step,
                         out + r * kTileGroups * group_size + p * kPanel, group_size);
    }
}

}  // namespace

SPADE_TARGET_AMX void filter_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    static const TileConfig config;
    SPADE_MEMORY_FENCE();
    _tile_loadconfig(&config);
    const std::size_t group_size = static_cast<std::size_t>(queries.panels) * kPanel;
    for (int panel = 0; panel < queries.panels; panel += 2) {
        float* out = minima + panel * kPanel;
        for (int group = groups.begin; group < groups.end; group += 2 * kTileGroups, out += 2 * kTileGroups * group_size) {
            const bool two_tiles = group + kTileGroups < groups.end, two_panels = panel + 1 < queries.panels;
            if (two_tiles && two_panels)
                filter_tiles<2, 2>(rows, group, queries, panel, out, group_size);
            else if (two_tiles)
                filter_tiles<2, 1>(rows, group, queries, panel, out, group_size);
            else if (two_panels)
                filter_tiles<1, 2>(rows, group, queries, panel, out, group_size);
            else
                filter_tiles<1, 1>(rows, group, queries, panel, out, group_size);
        }
    }
    _tile_release();
}

}  // namespace spade
