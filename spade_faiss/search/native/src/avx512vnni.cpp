// The filter for AVX-512 VNNI, which adds products of bytes up in 32 bits, 512 bits at a time: a register is a panel.
#include <cstdint>
#include <cstring>

#include "filter512.hpp"

namespace spade {
namespace {

// Writes a group's minima for P panels, which are multiplied side by side.
template <int P>
SPADE_TARGET_AVX512VNNI void filter_group(const RowCodes& rows, int group, const QueryPack& queries, int panel, float* out) {
    const std::size_t panel_size = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes + static_cast<std::size_t>(group) * kGroup * rows.stride;
    const std::int8_t* q = queries.codes.data() + panel * panel_size;
    __m512i dots[kGroup][P];
    for (int r = 0; r < kGroup; ++r)
        for (int p = 0; p < P; ++p) dots[r][p] = _mm512_load_si512(queries.initial_dot.data() + (panel + p) * kPanel);
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
            for (int p = 0; p < P; ++p) dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], row_codes, query_codes[p]);
        }
    }
    for (int p = 0; p < P; ++p) {
        const __m512 query_step = _mm512_load_ps(queries.step.data() + (panel + p) * kPanel);
        __m512 least = no_minima();
        for (int r = 0; r < kGroup; ++r) least = with_row(least, dots[r][p], rows, group * kGroup + r, query_step);
        _mm512_storeu_ps(out + p * kPanel, least);
    }
}

}  // namespace

SPADE_TARGET_AVX512VNNI void filter_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries,
                                               float* minima) {
    const std::size_t group_size = static_cast<std::size_t>(queries.panels) * kPanel;
    for (int panel = 0; panel < queries.panels; panel += 2) {
        float* out = minima + panel * kPanel;
        for (int group = groups.begin; group < groups.end; ++group, out += group_size)
            if (panel + 1 < queries.panels)
                filter_group<2>(rows, group, queries, panel, out);
            else
                filter_group<1>(rows, group, queries, panel, out);
    }
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
