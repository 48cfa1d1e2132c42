// What the filter's estimates rule out: for a pack of queries and a pack of rows, which queries a group of rows may matter to,
// and which of its rows.
//
// The filter estimates |x|^2 / 2 - q.x, that is (|q - x|^2 - |q|^2) / 2, with a known error. A squared distance corresponds to
// a threshold of that estimate: rows whose estimate is beyond the threshold by more than the error are ruled out.
#pragma once

#include <immintrin.h>

#include <limits>

#include "packs.hpp"
#include "target.hpp"

namespace spade {

class Bounds {
public:
    // `margin`: which share of the error is added; 1 is exact.
    Bounds(const QueryPack& queries, const RowPack& rows, float margin)
        : queries_(queries),
          rows_(rows),
          margin_(margin),
          rounding_(rows.packing->rounding),
          vanishing_(static_cast<float>(rows.packing->d) * std::numeric_limits<float>::min()) {}

    // The estimate that a squared distance of query i corresponds to, rounded up. The filter's error is not part of it.
    float threshold(int i, float sq_dist) const {
        const float sq_norm = queries_.sq_norm[i];
        return (sq_dist * (1 + rounding_) - sq_norm) / 2 + margin_ * rounding_ * sq_norm + vanishing_;
    }

    // Which queries of a panel cannot rule a group out, as bits: the group's minimum is within threshold and error, or NaN.
    // `minima` and `thresholds` are those of the panel.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned queries_within(int group, int panel, const float* minima,
                                                           const float* thresholds) const {
        const float norm = rows_.max_norm[group];
        const __m256 row_norm = _mm256_set1_ps(margin_ * norm);
        const __m256 row_residual = _mm256_set1_ps(margin_ * rows_.max_residual[group]);
        const __m256 rounding = _mm256_set1_ps(margin_ * rounding_ * norm * norm);
        unsigned found = 0;
        for (int lane = 0; lane < kPanel; lane += 8) {
            const int i = panel * kPanel + lane;
            const __m256 query_residual = _mm256_load_ps(queries_.residual.data() + i);
            const __m256 query_norm = _mm256_load_ps(queries_.norm.data() + i);
            const __m256 error = _mm256_fmadd_ps(query_residual, row_norm, _mm256_fmadd_ps(query_norm, row_residual, rounding));
            const __m256 limit = _mm256_add_ps(_mm256_loadu_ps(thresholds + lane), error);
            const __m256 within = _mm256_cmp_ps(_mm256_loadu_ps(minima + lane), limit, _CMP_NGT_UQ);
            found |= static_cast<unsigned>(_mm256_movemask_ps(within)) << lane;
        }
        return found;
    }

    // Which rows of a group query i cannot rule out, as bits; `thresholds` has one for each row.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned rows_within(int group, int i, __m256 thresholds) const {
        const __m256 margin = _mm256_set1_ps(margin_);
        const __m256 row_norm = _mm256_loadu_ps(rows_.norm.data() + group * kGroup);
        const __m256 row_residual = _mm256_loadu_ps(rows_.residual.data() + group * kGroup);
        const __m256 rounding = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(rounding_), row_norm), row_norm);
        const __m256 error = _mm256_fmadd_ps(_mm256_set1_ps(queries_.fine_residual[i]), row_norm,
                                             _mm256_fmadd_ps(_mm256_set1_ps(queries_.norm[i]), row_residual, rounding));
        const __m256 limit = _mm256_fmadd_ps(margin, error, thresholds);
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(estimates(group, i), limit, _CMP_NGT_UQ)));
    }

    // Estimates of a group's rows for query i, as the filter makes them, but by the finer codes of the query.
    SPADE_TARGET_AVX2 SPADE_INLINE __m256 estimates(int group, int i) const {
        const int stride = rows_.stride, code_stride = rows_.packing->code_stride;
        const std::uint8_t* x = rows_.codes.data() + static_cast<std::size_t>(group) * kGroup * stride;
        const std::int16_t* q = queries_.fine_codes.data() + static_cast<std::size_t>(i) * code_stride;
        __m256i dots[kGroup];
        for (int r = 0; r < kGroup; ++r) dots[r] = _mm256_setzero_si256();
        for (int c = 0; c < code_stride; c += 16) {
            const __m256i query_codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + c));
#pragma GCC unroll 8
            for (int r = 0; r < kGroup; ++r) {
                const auto* row = reinterpret_cast<const __m128i*>(x + static_cast<std::size_t>(r) * stride + c);
                const __m256i row_codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(row));
                dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(row_codes, query_codes));
            }
        }
        const __m256i dot = _mm256_add_epi32(sums_of_lanes(dots), _mm256_set1_epi32(queries_.fine_initial_dot[i]));
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_loadu_ps(rows_.step.data() + group * kGroup));
        const __m256 half_sq_norm = _mm256_loadu_ps(rows_.half_sq_norm.data() + group * kGroup);
        return _mm256_fnmadd_ps(scaled, _mm256_set1_ps(queries_.fine_step[i]), half_sq_norm);
    }

    // The sum of the eight lanes of each of eight registers.
    SPADE_TARGET_AVX2 SPADE_INLINE static __m256i sums_of_lanes(const __m256i* x) {
        const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
        const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
        return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    }

private:
    const QueryPack& queries_;
    const RowPack& rows_;
    const float margin_, rounding_, vanishing_;
};

}  // namespace spade
