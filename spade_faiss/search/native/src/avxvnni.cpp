// The filter for AVX-VNNI, which adds products of bytes up in 32 bits, 256 bits at a time.
#define SPADE_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#include "filter256.hpp"
#include "window_screen.hpp"

namespace spade {
namespace {

struct AvxVnniProducts {
    SPADE_TARGET SPADE_INLINE static void multiply(const std::uint8_t* x, int stride, const std::int8_t* q,
                                                   const std::int32_t* initial_dot, __m256i dots[kRows][kRegisters]) {
        load_initial_dots(initial_dot, dots);
        for (int c = 0; c < stride; c += 4) {
            const auto* query_codes = reinterpret_cast<const __m256i*>(q + static_cast<std::size_t>(c) * kPanel);
            const __m256i q0 = _mm256_load_si256(query_codes), q1 = _mm256_load_si256(query_codes + 1);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m256i row_codes = broadcast_codes(x + static_cast<std::size_t>(r) * stride + c);
                dots[r][0] = _mm256_dpbusd_avx_epi32(dots[r][0], row_codes, q0);
                dots[r][1] = _mm256_dpbusd_avx_epi32(dots[r][1], row_codes, q1);
            }
        }
    }
};

struct AvxVnniQuads {
    SPADE_TARGET SPADE_INLINE static __m256i add(__m256i sums, __m256i query, __m256i cells) {
        return _mm256_dpbusd_avx_epi32(sums, query, cells);
    }
};

}  // namespace

void screen_windows_avxvnni(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within) {
    screen_windows_by<AvxVnniQuads>(map, line, window, within);
}

void filter_avxvnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    filter_by<AvxVnniProducts>(rows, groups, queries, minima);
}

void screen_avxvnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                    std::uint16_t* within) {
    screen_by<AvxVnniProducts>(rows, groups, queries, thresholds, within);
}

}  // namespace spade
