// The filter for AVX-512 VNNI, which adds products of bytes up in 32 bits, 512 bits at a time: a register is a panel.
#include <cstdint>
#include <cstring>

#include "filter512.hpp"
#define SPADE_TARGET SPADE_TARGET_AVX512VNNI
#include "window_screen.hpp"

namespace spade {
namespace {

// Computes the sums of a group with P panels, which are multiplied side by side, and hands them on.
template <int P, typename Result>
SPADE_TARGET_AVX512VNNI SPADE_INLINE void filter_group(const RowCodes& rows, int group, const QueryPack& queries, int panel,
                                                       const __m512* begun, const Result& result) {
    const std::size_t panel_size = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * panel_size;
    __m512i dots[P][kGroup];
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < kGroup; ++r) dots[p][r] = _mm512_load_si512(queries.initial_dot.data() + (panel + p) * kPanel);
    for (int c = 0; c < rows.stride; c += 4) {
        __m512i query_codes[P];
        for (int p = 0; p < P; ++p)
            query_codes[p] = _mm512_load_si512(q + p * panel_size + static_cast<std::size_t>(c) * kPanel);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) {
            std::int32_t codes;
            std::memcpy(&codes, x + static_cast<std::size_t>(r) * rows.stride + c, 4);
            const __m512i row_codes = _mm512_set1_epi32(codes);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) dots[p][r] = _mm512_dpbusd_epi32(dots[p][r], row_codes, query_codes[p]);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) result(rows, group, queries, panel + p, begun[p], dots[p]);
}

template <int P, typename Result>
SPADE_TARGET_AVX512VNNI SPADE_INLINE void filter_panels(const RowCodes& rows, GroupRange groups, const QueryPack& queries,
                                                        int panel, const Result& result) {
    __m512 begun[P];
    for (int p = 0; p < P; ++p) begun[p] = result.begin(queries, panel + p);
    for (int group = groups.begin; group < groups.end; ++group) filter_group<P>(rows, group, queries, panel, begun, result);
}

template <typename Result>
SPADE_TARGET_AVX512VNNI void filter_all(const RowCodes& rows, GroupRange groups, const QueryPack& queries,
                                        const Result result) {
    for (int panel = 0; panel < queries.panels; panel += 2)
        if (panel + 1 < queries.panels)
            filter_panels<2>(rows, groups, queries, panel, result);
        else
            filter_panels<1>(rows, groups, queries, panel, result);
}

struct Avx512VnniQuads {
    SPADE_TARGET SPADE_INLINE static __m256i add(__m256i sums, __m256i query, __m256i cells) {
        return _mm256_dpbusd_epi32(sums, query, cells);
    }
};

}  // namespace

void screen_windows_avx512vnni(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within) {
    screen_windows_by<Avx512VnniQuads>(map, line, window, within);
}

void filter_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    if (rows.has_digits())
        filter_all(rows, groups, queries, Minima<ByDigits<true>>{minima, groups.begin});
    else
        filter_all(rows, groups, queries, Minima<ByRow>{minima, groups.begin});
}

void screen_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                       std::uint16_t* within) {
    if (rows.has_digits())
        filter_all(rows, groups, queries, Within<ByDigits<true>>(rows, groups, thresholds, within));
    else
        filter_all(rows, groups, queries, Within<ByRow>(rows, groups, thresholds, within));
}

SPADE_TARGET_AVX512VNNI void estimate_rows_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryCodes& query,
                                                      float* out) {
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(groups.begin) * kGroup * rows.stride;
    const __m256i initial_dot = _mm256_set1_epi32(query.initial_dot);
    const __m256 query_step = _mm256_set1_ps(query.step);
    for (int row = groups.begin * kGroup; row < groups.end * kGroup; row += kGroup, x += kGroup * rows.stride, out += kGroup) {
        __m128i dots[kGroup];
        for (int r = 0; r < kGroup; ++r) dots[r] = _mm_setzero_si128();
        for (int c = 0; c < rows.stride; c += 16) {
            const __m128i query_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(query.codes + c));
#pragma GCC unroll 8
            for (int r = 0; r < kGroup; ++r) {
                const auto* codes = reinterpret_cast<const __m128i*>(x + static_cast<std::size_t>(r) * rows.stride + c);
                dots[r] = _mm_dpbusd_epi32(dots[r], _mm_loadu_si128(codes), query_codes);
            }
        }
        const __m128i low = _mm_hadd_epi32(_mm_hadd_epi32(dots[0], dots[1]), _mm_hadd_epi32(dots[2], dots[3]));
        const __m128i high = _mm_hadd_epi32(_mm_hadd_epi32(dots[4], dots[5]), _mm_hadd_epi32(dots[6], dots[7]));
        const __m256i dot = _mm256_add_epi32(_mm256_set_m128i(high, low), initial_dot);
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_loadu_ps(rows.step + row));
        _mm256_storeu_ps(out, _mm256_fnmadd_ps(scaled, query_step, _mm256_loadu_ps(rows.half_sq_norm + row)));
    }
}

}  // namespace spade
