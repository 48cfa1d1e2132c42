// The filter for AVX2, which adds products of bytes up in 16 bits: four such sums of six-bit codes fit before they are widened.
#include "target.hpp"
#define SPADE_TARGET SPADE_TARGET_AVX2
#include "filter256.hpp"
#include "window_screen.hpp"

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

// The sums of two products fit 16 bits: codes of queries are at most 127, those of maps 63.
struct Avx2Quads {
    SPADE_TARGET SPADE_INLINE static __m256i add(__m256i sums, __m256i query, __m256i cells) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(query, cells), _mm256_set1_epi16(1)));
    }
};

}  // namespace

void filter_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    filter_by<Avx2Products>(rows, groups, queries, minima);
}

void screen_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                 std::uint16_t* within) {
    screen_by<Avx2Products>(rows, groups, queries, thresholds, within);
}

void screen_windows_avx2(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within) {
    screen_windows_by<Avx2Quads>(map, line, window, within);
}

SPADE_TARGET void estimate_rows_avx2(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out) {
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(groups.begin) * kGroup * rows.stride;
    const __m256i initial_dot = _mm256_set1_epi32(query.initial_dot);
    const __m256 query_step = _mm256_set1_ps(query.step);
    for (int row = groups.begin * kGroup; row < groups.end * kGroup; row += kGroup, x += kGroup * rows.stride, out += kGroup) {
        __m256i dots[kGroup];
        for (int r = 0; r < kGroup; ++r) dots[r] = _mm256_setzero_si256();
        for (int c = 0; c < rows.stride; c += 16) {
            const __m256i query_codes =
                _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(query.codes + c)));
#pragma GCC unroll 8
            for (int r = 0; r < kGroup; ++r) {
                const auto* codes = reinterpret_cast<const __m128i*>(x + static_cast<std::size_t>(r) * rows.stride + c);
                const __m256i row_codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes));
                dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(row_codes, query_codes));
            }
        }
        const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(dots[0], dots[1]), _mm256_hadd_epi32(dots[2], dots[3]));
        const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(dots[4], dots[5]), _mm256_hadd_epi32(dots[6], dots[7]));
        const __m256i dot = _mm256_add_epi32(
            _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)),
            initial_dot);
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_loadu_ps(rows.step + row));
        _mm256_storeu_ps(out, _mm256_fnmadd_ps(scaled, query_step, _mm256_loadu_ps(rows.half_sq_norm + row)));
    }
}

}  // namespace spade
