// The loops of the 256-bit filters: avx2.cpp and avxvnni.cpp differ in how they multiply codes, and in nothing else.
//
// A function cannot inline another whose target has more instructions, so these functions are compiled anew for each file: it
// defines SPADE_TARGET before it includes this header. The unnamed namespace keeps the two versions apart.
#pragma once

#ifndef SPADE_TARGET
#error "define SPADE_TARGET, the target attribute of the including file, before including filter256.hpp"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "filter.hpp"
#include "target.hpp"

namespace spade {
namespace {

// Rows that are multiplied at a time: their sums with the 16 queries of a panel are what the registers hold.
constexpr int kRows = 2;
// A panel of 32-bit sums takes two registers.
constexpr int kRegisters = kPanel / 8;

// Four codes of a row, in each lane.
SPADE_TARGET SPADE_INLINE __m256i broadcast_codes(const std::uint8_t* row) {
    std::int32_t codes;
    std::memcpy(&codes, row, 4);
    return _mm256_set1_epi32(codes);
}

SPADE_TARGET SPADE_INLINE void load_initial_dots(const std::int32_t* initial_dot, __m256i dots[kRows][kRegisters]) {
    for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < kRegisters; ++h)
            dots[r][h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(initial_dot + 8 * h));
}

// The minima of a group for a panel: `add` takes the products of each row with the panel's queries.
struct ByRow {
    __m256 least[kRegisters];
    SPADE_TARGET SPADE_INLINE void begin() {
        for (__m256& value : least) value = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    }
    SPADE_TARGET SPADE_INLINE void add(const RowCodes& rows, int row, const QueryPack& queries, int panel,
                                       const __m256i* dots) {
        const __m256 row_step = _mm256_broadcast_ss(rows.step + row);
        const __m256 half_sq_norm = _mm256_broadcast_ss(rows.half_sq_norm + row);
        for (int h = 0; h < kRegisters; ++h) {
            const __m256 query_step = _mm256_load_ps(queries.step.data() + panel * kPanel + 8 * h);
            const __m256 dot = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[h]), row_step);
            least[h] = _mm256_min_ps(_mm256_fnmadd_ps(dot, query_step, half_sq_norm), least[h]);
        }
    }
    SPADE_TARGET SPADE_INLINE __m256 minima(const RowCodes&, int, const QueryPack&, int, int h) const { return least[h]; }
};

// The same from digits: the largest sum has the least bound.
struct ByDigits {
    __m256i most[kRegisters];
    SPADE_TARGET SPADE_INLINE void begin() {
        for (__m256i& value : most) value = _mm256_set1_epi32(std::numeric_limits<std::int32_t>::min());
    }
    SPADE_TARGET SPADE_INLINE void add(const RowCodes&, int, const QueryPack&, int, const __m256i* dots) {
        for (int h = 0; h < kRegisters; ++h) most[h] = _mm256_max_epi32(dots[h], most[h]);
    }
    SPADE_TARGET SPADE_INLINE __m256 minima(const RowCodes& rows, int group, const QueryPack& queries, int panel, int h) const {
        const __m256 group_step = _mm256_broadcast_ss(rows.group_step + group);
        const __m256 half_sq_norm = _mm256_broadcast_ss(rows.least_half_sq_norm + group);
        const __m256 dot = _mm256_mul_ps(_mm256_cvtepi32_ps(most[h]), group_step);
        return _mm256_fnmadd_ps(dot, _mm256_load_ps(queries.step.data() + panel * kPanel + 8 * h), half_sq_norm);
    }
};

// What becomes of them: they are written down.
template <typename Kind>
struct Minima {
    using State = Kind;
    float* to;
    SPADE_TARGET SPADE_INLINE static void prepare(const QueryPack&, int, __m256*) {}
    SPADE_TARGET SPADE_INLINE void finish(const Kind& state, const RowCodes& rows, int group, const QueryPack& queries,
                                          int panel, const __m256*, std::size_t place) const {
        for (int h = 0; h < kRegisters; ++h)
            _mm256_storeu_ps(to + place * kPanel + 8 * h, state.minima(rows, group, queries, panel, h));
    }
};

// Or they are compared with limits.
template <typename Kind>
struct Within {
    using State = Kind;
    Within(const RowCodes& rows, GroupRange groups, Thresholds thresholds_, std::uint16_t* within_)
        : thresholds(thresholds_),
          rounding(rows.rounding),
          most_norm(*std::max_element(rows.max_norm + groups.begin, rows.max_norm + groups.end)),
          most_residual(*std::max_element(rows.max_residual + groups.begin, rows.max_residual + groups.end)),
          within(within_) {}
    Thresholds thresholds;
    float rounding, most_norm, most_residual;
    std::uint16_t* within;

    SPADE_TARGET SPADE_INLINE __m256 limits(float norm, float residual, const QueryPack& queries, int i) const {
        const __m256 row_norm = _mm256_set1_ps(thresholds.margin * norm);
        const __m256 row_residual = _mm256_set1_ps(thresholds.margin * residual);
        const __m256 rounded = _mm256_set1_ps(thresholds.margin * rounding * norm * norm);
        const __m256 query_residual = _mm256_load_ps(queries.residual.data() + i);
        const __m256 query_norm = _mm256_load_ps(queries.norm.data() + i);
        const __m256 error = _mm256_fmadd_ps(query_residual, row_norm, _mm256_fmadd_ps(query_norm, row_residual, rounded));
        return _mm256_add_ps(_mm256_loadu_ps(thresholds.of_query + i), error);
    }

    // Limits that are no lower than those of any group: most groups are beyond them already.
    SPADE_TARGET SPADE_INLINE void prepare(const QueryPack& queries, int panel, __m256* highest) const {
        for (int h = 0; h < kRegisters; ++h) highest[h] = limits(most_norm, most_residual, queries, panel * kPanel + 8 * h);
    }

    SPADE_TARGET SPADE_INLINE void finish(const Kind& state, const RowCodes& rows, int group, const QueryPack& queries,
                                          int panel, const __m256* highest, std::size_t place) const {
        __m256 minima[kRegisters];
        unsigned found = 0;
        for (int h = 0; h < kRegisters; ++h) {
            minima[h] = state.minima(rows, group, queries, panel, h);
            found |= bits(minima[h], highest[h], h);
        }
        if (found) {
            found = 0;
            for (int h = 0; h < kRegisters; ++h)
                found |=
                    bits(minima[h], limits(rows.max_norm[group], rows.max_residual[group], queries, panel * kPanel + 8 * h), h);
        }
        within[place] = static_cast<std::uint16_t>(found);
    }

    SPADE_TARGET SPADE_INLINE static unsigned bits(__m256 minima, __m256 limit, int h) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(minima, limit, _CMP_NGT_UQ))) << 8 * h;
    }
};

// Filters all groups in `groups`. `Products::multiply(x, stride, q, initial_dot, dots)` computes the products of kRows rows
// with a panel of queries: dots[row][register] = initial_dot + the sum over all channels of row code * query code.
//
// It must be inlined: left to itself, GCC 12 keeps fewer of the inner loop's pointers in registers, which costs up to a
// quarter.
template <typename Products, typename Result>
SPADE_TARGET SPADE_INLINE void filter256(const RowCodes& rows, GroupRange groups, const QueryPack& queries,
                                         const Result result) {
    for (int panel = 0; panel < queries.panels; ++panel) {
        const std::int8_t* q = queries.codes.data() + static_cast<std::size_t>(panel) * kPanel * queries.stride;
        const std::int32_t* initial_dot = queries.initial_dot.data() + panel * kPanel;
        __m256 prepared[kRegisters] = {};
        result.prepare(queries, panel, prepared);
        std::size_t place = panel;
        for (int group = groups.begin; group < groups.end; ++group, place += queries.panels) {
            typename Result::State state;
            state.begin();
            for (int row = group * kGroup; row < (group + 1) * kGroup; row += kRows) {
                const std::uint8_t* x = rows.codes + static_cast<std::size_t>(row) * rows.stride;
                __m256i dots[kRows][kRegisters];
                Products::multiply(x, rows.stride, q, initial_dot, dots);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) state.add(rows, row + r, queries, panel, dots[r]);
            }
            result.finish(state, rows, group, queries, panel, prepared, place);
        }
    }
}

// The filter and the screen of a SIMD level.
template <typename Products>
SPADE_TARGET void filter_by(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    if (rows.has_digits())
        filter256<Products>(rows, groups, queries, Minima<ByDigits>{minima});
    else
        filter256<Products>(rows, groups, queries, Minima<ByRow>{minima});
}

template <typename Products>
SPADE_TARGET void screen_by(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                            std::uint16_t* within) {
    if (rows.has_digits())
        filter256<Products>(rows, groups, queries, Within<ByDigits>(rows, groups, thresholds, within));
    else
        filter256<Products>(rows, groups, queries, Within<ByRow>(rows, groups, thresholds, within));
}

}  // namespace
}  // namespace spade
