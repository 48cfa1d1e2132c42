// What the 512-bit filters share: how sums of products become minima, and bits. Products are computed in avx512vnni.cpp and
// amx.cpp.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "filter.hpp"
#include "target.hpp"

#define SPADE_AVX512VNNI_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define SPADE_TARGET_AVX512VNNI __attribute__((target(SPADE_AVX512VNNI_FEATURES)))

namespace spade {
namespace {

// Masks of ones change nothing; they avoid GCC's unmasked intrinsics, whose definitions raise false warnings (GCC bug 105593).
constexpr __mmask16 kAll = 0xFFFF;

// The minima of a group for a panel, from `sums`, the products of each of its rows with the panel's queries.
struct ByRow {
    // Whether sums begin with `initial_dot`.
    static constexpr bool kStarted = true;
    SPADE_TARGET_AVX512VNNI SPADE_INLINE static __m512 minima(const RowCodes& rows, int group, const QueryPack& queries,
                                                              int panel, const __m512i* sums) {
        const __m512 query_step = _mm512_load_ps(queries.step.data() + panel * kPanel);
        __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) {
            const int row = group * kGroup + r;
            const __m512 dot = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(kAll, sums[r]), _mm512_set1_ps(rows.step[row]));
            const __m512 estimate = _mm512_fnmadd_ps(dot, query_step, _mm512_set1_ps(rows.half_sq_norm[row]));
            least = _mm512_maskz_min_ps(kAll, estimate, least);
        }
        return least;
    }
};

// The same from digits: the largest sum has the least bound.
template <bool Started>
struct ByDigits {
    static constexpr bool kStarted = Started;
    SPADE_TARGET_AVX512VNNI SPADE_INLINE static __m512 minima(const RowCodes& rows, int group, const QueryPack& queries,
                                                              int panel, const __m512i* sums) {
        __m512i most = sums[0];
#pragma GCC unroll 8
        for (int r = 1; r < kGroup; ++r) most = _mm512_maskz_max_epi32(kAll, most, sums[r]);
        if constexpr (!Started) most = _mm512_add_epi32(most, _mm512_load_si512(queries.initial_dot.data() + panel * kPanel));
        const __m512 dot = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(kAll, most), _mm512_set1_ps(rows.group_step[group]));
        return _mm512_fnmadd_ps(dot, _mm512_load_ps(queries.step.data() + panel * kPanel),
                                _mm512_set1_ps(rows.least_half_sq_norm[group]));
    }
};

// What becomes of a group's sums with a panel: its minima are written down.
template <typename Kind>
struct Minima {
    static constexpr bool kStarted = Kind::kStarted;
    float* minima;
    int first;
    SPADE_TARGET_AVX512VNNI SPADE_INLINE __m512 begin(const QueryPack&, int) const { return _mm512_setzero_ps(); }
    SPADE_TARGET_AVX512VNNI SPADE_INLINE void operator()(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                                         __m512, const __m512i* sums) const {
        float* const to = minima + (static_cast<std::size_t>(group - first) * queries.panels + panel) * kPanel;
        _mm512_storeu_ps(to, Kind::minima(rows, group, queries, panel, sums));
    }
};

// Or they are compared with limits.
template <typename Kind>
struct Within {
    static constexpr bool kStarted = Kind::kStarted;
    Thresholds thresholds;
    float rounding, most_norm, most_residual;
    std::uint16_t* within;
    int first;

    Within(const RowCodes& rows, GroupRange groups, Thresholds thresholds_, std::uint16_t* within_)
        : thresholds(thresholds_),
          rounding(rows.rounding),
          most_norm(*std::max_element(rows.max_norm + groups.begin, rows.max_norm + groups.end)),
          most_residual(*std::max_element(rows.max_residual + groups.begin, rows.max_residual + groups.end)),
          within(within_),
          first(groups.begin) {}

    SPADE_TARGET_AVX512VNNI SPADE_INLINE __m512 limits(float norm, float residual, const QueryPack& queries, int panel) const {
        const __m512 row_norm = _mm512_set1_ps(thresholds.margin * norm);
        const __m512 row_residual = _mm512_set1_ps(thresholds.margin * residual);
        const __m512 rounded = _mm512_set1_ps(thresholds.margin * rounding * norm * norm);
        const __m512 query_residual = _mm512_load_ps(queries.residual.data() + panel * kPanel);
        const __m512 query_norm = _mm512_load_ps(queries.norm.data() + panel * kPanel);
        const __m512 error = _mm512_fmadd_ps(query_residual, row_norm, _mm512_fmadd_ps(query_norm, row_residual, rounded));
        return _mm512_add_ps(_mm512_loadu_ps(thresholds.of_query + panel * kPanel), error);
    }

    // Limits that are no lower than those of any group: most groups are beyond them already.
    SPADE_TARGET_AVX512VNNI SPADE_INLINE __m512 begin(const QueryPack& queries, int panel) const {
        return limits(most_norm, most_residual, queries, panel);
    }

    SPADE_TARGET_AVX512VNNI SPADE_INLINE void operator()(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                                         __m512 highest, const __m512i* sums) const {
        const __m512 minima = Kind::minima(rows, group, queries, panel, sums);
        __mmask16 found = _mm512_cmp_ps_mask(minima, highest, _CMP_NGT_UQ);
        if (found) {
            const __m512 limit = limits(rows.max_norm[group], rows.max_residual[group], queries, panel);
            found = _mm512_cmp_ps_mask(minima, limit, _CMP_NGT_UQ);
        }
        within[static_cast<std::size_t>(group - first) * queries.panels + panel] = static_cast<std::uint16_t>(found);
    }
};

}  // namespace
}  // namespace spade
