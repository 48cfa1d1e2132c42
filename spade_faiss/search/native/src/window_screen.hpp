// The loops of the window screens: the SIMD levels differ in how they multiply codes, and in nothing else.
//
// A function cannot inline another whose target has more instructions, so these functions are compiled anew for each file: it
// defines SPADE_TARGET before it includes this header. The unnamed namespace keeps the versions apart.
#pragma once

#ifndef SPADE_TARGET
#error "define SPADE_TARGET, the target attribute of the including file, before including window_screen.hpp"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "target.hpp"
#include "window_codes.hpp"

namespace spade {
namespace {

// Queries side by side whose windows lie within the same eight cells.
template <int Q>
struct Neighbors {
    const std::uint8_t* codes[Q];
    __m256i threshold[Q];
    int shift[Q];  // from the cells that are read to those of a query's own span
    unsigned inside[Q];
    std::uint8_t* within[Q];
};

// The cells of R rows of Q windows that pass: a byte for each row of each window.
template <typename Products, int Q, int R>
SPADE_TARGET SPADE_INLINE void screen_rows(const WindowMap& map, int top, int begin, int row, const Neighbors<Q>& queries) {
    const std::size_t line = static_cast<std::size_t>(map.padded_width) * kQuad;
    const std::int8_t* codes = map.codes + (top + row) * map.quads * line + static_cast<std::size_t>(begin) * kQuad;
    const std::int32_t* initial = map.initial + static_cast<std::size_t>(top + row) * map.padded_width + begin;
    __m256i sums[Q][R];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q)
            sums[q][r] =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(initial + static_cast<std::size_t>(r) * map.padded_width));
    for (int c = 0; c < map.quads; ++c, codes += line) {
        __m256i four[Q];
        for (int q = 0; q < Q; ++q) {
            std::int32_t query;
            std::memcpy(&query, queries.codes[q] + c * kQuad, kQuad);
            four[q] = _mm256_set1_epi32(query);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256i cells = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + r * map.quads * line));
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) sums[q][r] = Products::add(sums[q][r], four[q], cells);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        // Of most windows nothing passes; what is written is zeros before.
        __m256i most = sums[q][0];
        for (int r = 1; r < R; ++r) most = _mm256_max_epi32(most, sums[q][r]);
        const __m256i any = _mm256_cmpgt_epi32(most, queries.threshold[q]);
        if (_mm256_testz_si256(any, any)) continue;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256 passes = _mm256_castsi256_ps(_mm256_cmpgt_epi32(sums[q][r], queries.threshold[q]));
            const unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(passes)) >> queries.shift[q];
            queries.within[q][row + r] = static_cast<std::uint8_t>(bits & queries.inside[q]);
        }
    }
}

// Q sums of each of R rows are what registers hold, beside the codes that they are made of.
template <typename Products, int Q>
SPADE_TARGET SPADE_INLINE void screen_span(const WindowMap& map, int top, int begin, int rows, const Neighbors<Q>& queries) {
    constexpr int kMost = Q == 1 ? 8 : Q == 2 ? 7 : 3;
    int row = 0;
    for (; row + kMost <= rows; row += kMost) screen_rows<Products, Q, kMost>(map, top, begin, row, queries);
    switch (rows - row) {
        case 7:
            return screen_rows < Products, Q, kMost<7 ? 1 : 7>(map, top, begin, row, queries);
        case 6:
            return screen_rows < Products, Q, kMost<6 ? 1 : 6>(map, top, begin, row, queries);
        case 5:
            return screen_rows < Products, Q, kMost<5 ? 1 : 5>(map, top, begin, row, queries);
        case 4:
            return screen_rows < Products, Q, kMost<4 ? 1 : 4>(map, top, begin, row, queries);
        case 3:
            return screen_rows<Products, Q, 3>(map, top, begin, row, queries);
        case 2:
            return screen_rows<Products, Q, 2>(map, top, begin, row, queries);
        case 1:
            return screen_rows<Products, Q, 1>(map, top, begin, row, queries);
    }
}

// Screens the windows of the Q queries from number i on.
template <typename Products, int Q>
SPADE_TARGET SPADE_INLINE void screen_neighbors(const WindowMap& map, const WindowLine& line, const WindowShape& window, int i,
                                                std::uint8_t* within) {
    const int top = window.top(line.y), rows = window.bottom(line.y, map.height) - top + 1;
    for (int number = 0; number < window.spans(); ++number) {
        const int begin = window.at(line.first + i, number, map).begin;
        Neighbors<Q> queries;
        bool any = false;
        for (int q = 0; q < Q; ++q) {
            const WindowSpan span = window.at(line.first + i + q, number, map);
            any |= span.inside != 0;
            queries.codes[q] = line.codes + static_cast<std::size_t>(i + q) * map.quads * kQuad;
            queries.threshold[q] = _mm256_set1_epi32(line.threshold[i + q]);
            queries.shift[q] = span.begin - begin;
            queries.inside[q] = span.inside;
            queries.within[q] = within + static_cast<std::size_t>(i + q) * window.bytes() + number * rows;
        }
        if (any) screen_span<Products, Q>(map, top, begin, rows, queries);
    }
}

template <typename Products>
SPADE_TARGET void screen_windows_by(const WindowMap& map, const WindowLine& line, const WindowShape& window,
                                    std::uint8_t* within) {
    std::memset(within, 0, static_cast<std::size_t>(line.count) * window.bytes());
    // Windows of so many neighbors lie within eight cells.
    const int together = kCells - 2 * window.reach_x;
    int i = 0;
    if (together >= 4 && window.reach_y <= 1)
        for (; i + 4 <= line.count; i += 4) screen_neighbors<Products, 4>(map, line, window, i, within);
    if (together >= 2)
        for (; i + 2 <= line.count; i += 2) screen_neighbors<Products, 2>(map, line, window, i, within);
    for (; i < line.count; ++i) screen_neighbors<Products, 1>(map, line, window, i, within);
}

}  // namespace
}  // namespace spade
