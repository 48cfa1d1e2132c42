// 256-bit filters: AVX2 adds bytes' products up in 16 bits, four at a time in the narrow format; AVX-VNNI in 32.
#include <immintrin.h>

#include <cstring>
#include <limits>

#include "target.hpp"
#include "units.hpp"

#define SPADE_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))

namespace spade {
namespace {

constexpr int kRows = 2;  // rows at a time: with 16 queries, what the registers hold

SPADE_AVX2 SPADE_INLINE __m256i four_channels(const std::uint8_t* row) {
    std::int32_t codes;
    std::memcpy(&codes, row, 4);
    return _mm256_set1_epi32(codes);
}

// dots[row][half of the panel]: sums of products over all channels.
SPADE_AVX2 SPADE_INLINE void dots_avx2(const std::uint8_t* x, int stride, const std::int8_t* q, const std::int32_t* start,
                                       __m256i dots[kRows][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < 2; ++h) dots[r][h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + 8 * h));
    for (int c = 0; c < stride; c += 16) {
        __m256i sums[kRows][2];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            const auto* of_queries = reinterpret_cast<const __m256i*>(q + static_cast<std::size_t>(c + 4 * u) * kPanel);
            const __m256i q0 = _mm256_load_si256(of_queries), q1 = _mm256_load_si256(of_queries + 1);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m256i of_row = four_channels(x + static_cast<std::size_t>(r) * stride + c + 4 * u);
                const __m256i p0 = _mm256_maddubs_epi16(of_row, q0), p1 = _mm256_maddubs_epi16(of_row, q1);
                sums[r][0] = u ? _mm256_add_epi16(sums[r][0], p0) : p0;
                sums[r][1] = u ? _mm256_add_epi16(sums[r][1], p1) : p1;
                SPADE_HOLD(sums[r][0]);
                SPADE_HOLD(sums[r][1]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
            for (int h = 0; h < 2; ++h) dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(sums[r][h], ones));
    }
}

SPADE_AVXVNNI SPADE_INLINE void dots_avxvnni(const std::uint8_t* x, int stride, const std::int8_t* q,
                                             const std::int32_t* start, __m256i dots[kRows][2]) {
    for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < 2; ++h) dots[r][h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + 8 * h));
    for (int c = 0; c < stride; c += 4) {
        const auto* of_queries = reinterpret_cast<const __m256i*>(q + static_cast<std::size_t>(c) * kPanel);
        const __m256i q0 = _mm256_load_si256(of_queries), q1 = _mm256_load_si256(of_queries + 1);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const __m256i of_row = four_channels(x + static_cast<std::size_t>(r) * stride + c);
            dots[r][0] = _mm256_dpbusd_avx_epi32(dots[r][0], of_row, q0);
            dots[r][1] = _mm256_dpbusd_avx_epi32(dots[r][1], of_row, q1);
        }
    }
}

// The loops around either: a macro, since a function of one target takes no other's as an argument to be inlined.
#define SPADE_FILTER_256(NAME, TARGET, DOTS)                                                                             \
    TARGET void NAME(const RowPack& rows, Range groups, const QueryPack& queries, float* minima) {         \
        for (int panel = 0; panel < queries.panels; ++panel) {                                                    \
            const auto* q = queries.codes.data() + static_cast<std::size_t>(panel) * kPanel * queries.stride;            \
            const auto* start = queries.start.data() + panel * kPanel;                                                   \
            const __m256 step0 = _mm256_load_ps(queries.step.data() + panel * kPanel);                                   \
            const __m256 step1 = _mm256_load_ps(queries.step.data() + panel * kPanel + 8);                               \
            const std::size_t of_group = static_cast<std::size_t>(queries.panels) * kPanel;                               \
            float* to = minima + of_group * groups.begin + panel * kPanel;                              \
            for (int group = groups.begin; group < groups.end; ++group, to += of_group) {                                \
                __m256 least0 = _mm256_set1_ps(std::numeric_limits<float>::infinity()), least1 = least0;                 \
                for (int row = group * kGroup; row < (group + 1) * kGroup; row += kRows) {                               \
                    __m256i dots[kRows][2];                                                                              \
                    DOTS(rows.codes.data() + static_cast<std::size_t>(row) * rows.stride, rows.stride, q, start, dots);  \
                    _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) {                                            \
                        const __m256 step = _mm256_broadcast_ss(rows.step.data() + row + r);                             \
                        const __m256 half = _mm256_broadcast_ss(rows.half.data() + row + r);                             \
                        const __m256 dot0 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][0]), step);                         \
                        const __m256 dot1 = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][1]), step);                         \
                        least0 = _mm256_min_ps(_mm256_fnmadd_ps(dot0, step0, half), least0);                             \
                        least1 = _mm256_min_ps(_mm256_fnmadd_ps(dot1, step1, half), least1);                             \
                    }                                                                                                    \
                }                                                                                                        \
                _mm256_storeu_ps(to, least0);                                                                            \
                _mm256_storeu_ps(to + 8, least1);                                                                        \
            }                                                                                                            \
        }                                                                                                                \
    }

}  // namespace

SPADE_FILTER_256(filter_avx2, SPADE_AVX2, dots_avx2)
SPADE_FILTER_256(filter_avxvnni, SPADE_AVXVNNI, dots_avxvnni)

}  // namespace spade
