// 512-bit filters: VNNI, and the tile unit (AMX) for the products with 512-bit minima behind it.
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "target.hpp"
#include "units.hpp"

#define SPADE_AVX512VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define SPADE_AMX __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))

namespace spade {
namespace {

constexpr int kTile = 16;        // rows and queries of a tile of sums
constexpr int kTileBytes = 64;   // channels of a tile of codes
constexpr int kTileSums = kTile * kTile;

SPADE_AVX512VNNI SPADE_INLINE __m512 lower(__m512i dots, float step_x, float half, __m512 step_q, __m512 least) {
    const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(step_x));
    return _mm512_min_ps(_mm512_fnmadd_ps(dot, step_q, _mm512_set1_ps(half)), least);
}

// A group's minima for P panels, side by side.
template <int P>
SPADE_AVX512VNNI void group_minima(const RowPack& rows, int group, const QueryPack& queries, int panel, float* to) {
    const std::size_t of_panel = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes.data() + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * of_panel;
    __m512i dots[kGroup][P];
    for (int r = 0; r < kGroup; ++r)
        for (int p = 0; p < P; ++p) dots[r][p] = _mm512_load_si512(queries.start.data() + (panel + p) * kPanel);
    for (int c = 0; c < rows.stride; c += 4) {
        __m512i of_queries[P];
        for (int p = 0; p < P; ++p) of_queries[p] = _mm512_load_si512(q + p * of_panel + static_cast<std::size_t>(c) * kPanel);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) {
            std::int32_t codes;
            std::memcpy(&codes, x + static_cast<std::size_t>(r) * rows.stride + c, 4);
            const __m512i of_row = _mm512_set1_epi32(codes);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], of_row, of_queries[p]);
        }
    }
    for (int p = 0; p < P; ++p) {
        const __m512 step = _mm512_load_ps(queries.step.data() + (panel + p) * kPanel);
        __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity());
        for (int r = 0; r < kGroup; ++r)
            least = lower(dots[r][p], rows.step[group * kGroup + r], rows.half[group * kGroup + r], step, least);
        _mm512_storeu_ps(to + p * kPanel, least);
    }
}

// A tile of sums to the minima of its two groups.
SPADE_AMX SPADE_INLINE void tile_minima(const std::int32_t* sums, const RowPack& rows, int group, __m512 step, float* to,
                                        std::size_t of_group) {
    for (int g = 0; g < kTile / kGroup; ++g, sums += kGroup * kTile, to += of_group) {
        __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) {
            const int row = (group + g) * kGroup + r;
            least = lower(_mm512_load_si512(sums + r * kTile), rows.step[row], rows.half[row], step, least);
        }
        _mm512_storeu_ps(to, least);
    }
}

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes, kTileBytes};
    std::uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

// The compiler does not know that tiles read and write memory.
#define SPADE_FENCE() asm volatile("" ::: "memory")

// Sums of R * kTile rows with P panels, R and P up to 2: tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 queries.
template <int R, int P>
SPADE_AMX SPADE_INLINE void tile_sums(const RowPack& rows, int group, const QueryPack& queries, int panel, std::int32_t* sums) {
    const std::size_t of_rows = static_cast<std::size_t>(kTile) * rows.stride, of_panel = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes.data() + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * of_panel;
    const std::int32_t* start = queries.start.data() + panel * kPanel;
    SPADE_FENCE();
    // All rows of a tile begin with the same line: a stride of 0.
    _tile_loadd(0, start, 0);
    if constexpr (P == 2) _tile_loadd(1, start + kPanel, 0);
    if constexpr (R == 2) _tile_loadd(2, start, 0);
    if constexpr (R == 2 && P == 2) _tile_loadd(3, start + kPanel, 0);
    for (int c = 0; c < rows.stride; c += kTileBytes) {
        _tile_loadd(4, x + c, rows.stride);
        _tile_loadd(6, q + static_cast<std::size_t>(c) * kPanel, kTileBytes);
        _tile_dpbusd(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, q + of_panel + static_cast<std::size_t>(c) * kPanel, kTileBytes);
            _tile_dpbusd(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, x + of_rows + c, rows.stride);
            _tile_dpbusd(2, 5, 6);
        }
        if constexpr (R == 2 && P == 2) _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, kTile * 4);
    if constexpr (P == 2) _tile_stored(1, sums + kTileSums, kTile * 4);
    if constexpr (R == 2) _tile_stored(2, sums + 2 * kTileSums, kTile * 4);
    if constexpr (R == 2 && P == 2) _tile_stored(3, sums + 3 * kTileSums, kTile * 4);
    SPADE_FENCE();
}

template <int R, int P>
SPADE_AMX SPADE_INLINE void tiles(const RowPack& rows, int group, const QueryPack& queries, int panel, float* to,
                                  std::size_t of_group) {
    // The processor may begin the next tiles while it turns these sums into minima: nothing here waits for them to be.
    alignas(64) std::int32_t sums[4 * kTileSums];
    tile_sums<R, P>(rows, group, queries, panel, sums);
    for (int p = 0; p < P; ++p) {
        const __m512 step = _mm512_load_ps(queries.step.data() + (panel + p) * kPanel);
        for (int r = 0; r < R; ++r) {
            const int of_tile = group + r * (kTile / kGroup);
            tile_minima(sums + (2 * r + p) * kTileSums, rows, of_tile, step, to + r * (kTile / kGroup) * of_group + p * kPanel, of_group);
        }
    }
}

}  // namespace

SPADE_AVX512VNNI void filter_avx512vnni(const RowPack& rows, Range groups, const QueryPack& queries, float* minima) {
    const std::size_t of_group = static_cast<std::size_t>(queries.panels) * kPanel;
    for (int panel = 0; panel < queries.panels; panel += 2) {
        float* to = minima + of_group * groups.begin + panel * kPanel;
        for (int group = groups.begin; group < groups.end; ++group, to += of_group)
            if (panel + 1 < queries.panels)
                group_minima<2>(rows, group, queries, panel, to);
            else
                group_minima<1>(rows, group, queries, panel, to);
    }
}

SPADE_AMX void filter_amx(const RowPack& rows, Range groups, const QueryPack& queries, float* minima) {
    constexpr int per_tile = kTile / kGroup;
    static const TileShapes shapes;
    SPADE_FENCE();
    _tile_loadconfig(&shapes);
    const std::size_t of_group = static_cast<std::size_t>(queries.panels) * kPanel;
    for (int panel = 0; panel < queries.panels; panel += 2) {
        float* to = minima + of_group * groups.begin + panel * kPanel;
        for (int group = groups.begin; group < groups.end; group += 2 * per_tile, to += 2 * per_tile * of_group) {
            const bool two_tiles = group + per_tile < groups.end, two_panels = panel + 1 < queries.panels;
            if (two_tiles && two_panels)
                tiles<2, 2>(rows, group, queries, panel, to, of_group);
            else if (two_tiles)
                tiles<2, 1>(rows, group, queries, panel, to, of_group);
            else if (two_panels)
                tiles<1, 2>(rows, group, queries, panel, to, of_group);
            else
                tiles<1, 1>(rows, group, queries, panel, to, of_group);
        }
    }
    _tile_release();
}

}  // namespace spade
