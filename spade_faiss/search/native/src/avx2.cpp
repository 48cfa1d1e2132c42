// The filter for AVX2, which adds products of bytes up in 16 bits: four such sums of six-bit codes fit before they are widened.
#include "target.hpp"
#define SPADE_TARGET SPADE_TARGET_AVX2
#include "filter256.hpp"

namespace spade {
namespace {

struct Avx2Products {
    SPADE_TARGET SPADE_INLINE static void multiply(const std::uint8_t* x, int stride, const std::int8_t* q,
                                                   const std::int32_t* initial_dot, __m256i dots[kRows][kRegisters]) {
        const __m256i ones = _mm256_set1_epi16(1);
        load_initial_dots(initial_dot, dots);
        for (int c = 0; c < stride; c += 16) {
            __m256i sums[kRows][kRegisters];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                const auto* query_codes = reinterpret_cast<const __m256i*>(q + static_cast<std::size_t>(c + 4 * u) * kPanel);
                const __m256i q0 = _mm256_load_si256(query_codes), q1 = _mm256_load_si256(query_codes + 1);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    const __m256i row_codes = broadcast_codes(x + static_cast<std::size_t>(r) * stride + c + 4 * u);
                    const __m256i p0 = _mm256_maddubs_epi16(row_codes, q0), p1 = _mm256_maddubs_epi16(row_codes, q1);
                    sums[r][0] = u ? _mm256_add_epi16(sums[r][0], p0) : p0;
                    sums[r][1] = u ? _mm256_add_epi16(sums[r][1], p1) : p1;
                    SPADE_PIN(sums[r][0]);
                    SPADE_PIN(sums[r][1]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
                for (int h = 0; h < kRegisters; ++h)
                    dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(sums[r][h], ones));
        }
    }
};

}  // namespace

SPADE_TARGET void filter_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    filter256<Avx2Products>(rows, groups, queries, minima);
}

}  // namespace spade
