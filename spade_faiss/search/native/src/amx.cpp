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

// What tiles of sums begin with: the same line in all of their rows, by a stride of 0, or zeros.
#define SPADE_BEGIN_TILE(tile, line)    \
    do {                                \
        if constexpr (Result::kStarted) \
            _tile_loadd(tile, line, 0); \
        else                            \
            _tile_zero(tile);           \
    } while (false)

// Hands the sums of a tile of rows with P panels on.
template <int P, typename Result>
SPADE_TARGET_AMX SPADE_INLINE void hand_on(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                           const std::int32_t* sums, const __m512* begun, const Result& result) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int g = 0; g < kTileGroups; ++g)
            result(rows, group + g, queries, panel + p, begun[p],
                   reinterpret_cast<const __m512i*>(sums + p * kTileSums + g * kGroup * kTile));
}

// Packs whose codes fit in one tile. A tile of rows goes through three stages, each while others are in the next: multiplying
// it with the panels, which stay in tiles 6 and 7; storing the sums; and looking at them. `B`, 0 or 1, says which tiles it
// uses.
template <int P, typename Result>
struct OneTile {
    const RowCodes& rows;
    const GroupRange groups;
    const QueryPack& queries;
    const int panel;
    const Result& result;
    const __m512* begun;
    std::int32_t (*sums)[2 * kTileSums];

    int group(int i) const { return groups.begin + i * kTileGroups; }

    template <int B>
    SPADE_TARGET_AMX SPADE_INLINE void multiply(int i) const {
        const std::int32_t* const initial_dot = queries.initial_dot.data() + panel * kPanel;
        const std::uint8_t* const x = rows.codes + static_cast<std::size_t>(group(i)) * kGroup * kTileBytes;
        if constexpr (B == 0) {
            SPADE_BEGIN_TILE(0, initial_dot);
            if constexpr (P == 2) SPADE_BEGIN_TILE(1, initial_dot + kPanel);
            _tile_loadd(4, x, kTileBytes);
            _tile_dpbusd(0, 4, 6);
            if constexpr (P == 2) _tile_dpbusd(1, 4, 7);
        } else {
            SPADE_BEGIN_TILE(2, initial_dot);
            if constexpr (P == 2) SPADE_BEGIN_TILE(3, initial_dot + kPanel);
            _tile_loadd(5, x, kTileBytes);
            _tile_dpbusd(2, 5, 6);
            if constexpr (P == 2) _tile_dpbusd(3, 5, 7);
        }
    }

    template <int B>
    SPADE_TARGET_AMX SPADE_INLINE void store() const {
        if constexpr (B == 0) {
            _tile_stored(0, sums[0], kTile * 4);
            if constexpr (P == 2) _tile_stored(1, sums[0] + kTileSums, kTile * 4);
        } else {
            _tile_stored(2, sums[1], kTile * 4);
            if constexpr (P == 2) _tile_stored(3, sums[1] + kTileSums, kTile * 4);
        }
        SPADE_MEMORY_FENCE();
    }

    template <int B>
    SPADE_TARGET_AMX SPADE_INLINE void look(int i) const {
        hand_on<P>(rows, group(i), queries, panel, sums[B], begun, result);
    }

    SPADE_TARGET_AMX SPADE_INLINE void run() const {
        const int count = (groups.end - groups.begin) / kTileGroups;
        for (int i = 0; i < count + 2; i += 2) {
            if (i < count) multiply<0>(i);
            if (i > 0 && i <= count) store<1>();
            if (i > 0) look<0>(i - 2);
            if (i + 1 < count) multiply<1>(i + 1);
            if (i < count) store<0>();
            if (i > 0 && i <= count) look<1>(i - 1);
        }
    }
};

// Packs of more codes, step by step: R tiles of rows with P panels, R and P up to 2. Tiles 0 to 3 hold sums, 4 and 5 rows, 6
// and 7 queries.
template <int R, int P, typename Result>
SPADE_TARGET_AMX SPADE_INLINE void filter_tiles(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                                const __m512* begun, const Result& result) {
    // Nothing waits for the results, so the processor may begin with the next tiles while it computes these.
    alignas(64) std::int32_t sums[4 * kTileSums];
    const std::size_t tile_size = static_cast<std::size_t>(kTile) * rows.stride;
    const std::size_t panel_size = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * panel_size;
    const std::int32_t* initial_dot = queries.initial_dot.data() + panel * kPanel;
    SPADE_MEMORY_FENCE();
    SPADE_BEGIN_TILE(0, initial_dot);
    if constexpr (P == 2) SPADE_BEGIN_TILE(1, initial_dot + kPanel);
    if constexpr (R == 2) SPADE_BEGIN_TILE(2, initial_dot);
    if constexpr (R == 2 && P == 2) SPADE_BEGIN_TILE(3, initial_dot + kPanel);
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
    hand_on<P>(rows, group, queries, panel, sums, begun, result);
    if constexpr (R == 2) hand_on<P>(rows, group + kTileGroups, queries, panel, sums + 2 * kTileSums, begun, result);
}

// Filters groups for P panels.
template <int P, typename Result>
SPADE_TARGET_AMX SPADE_INLINE void filter_panels(const RowCodes& rows, GroupRange groups, const QueryPack& queries, int panel,
                                                 const Result& result) {
    __m512 begun[P];
    for (int p = 0; p < P; ++p) begun[p] = result.begin(queries, panel + p);
    if (rows.stride == kTileBytes) {
        alignas(64) std::int32_t sums[2][2 * kTileSums];
        const std::int8_t* q = queries.codes.data() + static_cast<std::size_t>(panel) * kPanel * kTileBytes;
        _tile_loadd(6, q, kTileBytes);
        if constexpr (P == 2) _tile_loadd(7, q + kPanel * kTileBytes, kTileBytes);
        OneTile<P, Result>{rows, groups, queries, panel, result, begun, sums}.run();
        return;
    }
    int group = groups.begin;
    for (; group + 2 * kTileGroups <= groups.end; group += 2 * kTileGroups)
        filter_tiles<2, P>(rows, group, queries, panel, begun, result);
    if (group < groups.end) filter_tiles<1, P>(rows, group, queries, panel, begun, result);
}

template <typename Result>
SPADE_TARGET_AMX void filter_all(const RowCodes& rows, GroupRange groups, const QueryPack& queries, const Result result) {
    static const TileConfig config;
    SPADE_MEMORY_FENCE();
    _tile_loadconfig(&config);
    for (int panel = 0; panel < queries.panels; panel += 2)
        if (panel + 1 < queries.panels)
            filter_panels<2>(rows, groups, queries, panel, result);
        else
            filter_panels<1>(rows, groups, queries, panel, result);
    _tile_release();
}

#undef SPADE_BEGIN_TILE

}  // namespace

void filter_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    if (rows.has_digits())
        filter_all(rows, groups, queries, Minima<ByDigits<false>>{minima, groups.begin});
    else
        filter_all(rows, groups, queries, Minima<ByRow>{minima, groups.begin});
}

void screen_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                std::uint16_t* within) {
    if (rows.has_digits())
        filter_all(rows, groups, queries, Within<ByDigits<false>>(rows, groups, thresholds, within));
    else
        filter_all(rows, groups, queries, Within<ByRow>(rows, groups, thresholds, within));
}

}  // namespace spade
