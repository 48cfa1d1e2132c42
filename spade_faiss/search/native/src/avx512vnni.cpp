// The filter for AVX-512 VNNI, which adds products of bytes up in 32 bits, 512 bits at a time: a register is a panel.
#include <cstdint>
#include <cstring>

#include "filter512.hpp"

namespace spade {
namespace {

// Computes the sums of a group with P panels, which are multiplied side by side, and hands them on.
template <int P, typename Result>
SPADE_TARGET_AVX512VNNI SPADE_INLINE void filter_group(const RowPack& rows, int group, const QueryPack& queries, int panel,
                                                       const __m512* begun, const Result& result) {
    const std::size_t panel_size = static_cast<std::size_t>(kPanel) * queries.stride;
    const std::uint8_t* x = rows.codes.data() + static_cast<std::size_t>(group) * kGroup * rows.stride;
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
SPADE_TARGET_AVX512VNNI SPADE_INLINE void filter_panels(const RowPack& rows, GroupRange groups, const QueryPack& queries,
                                                        int panel, const Result& result) {
    __m512 begun[P];
    for (int p = 0; p < P; ++p) begun[p] = result.begin(queries, panel + p);
    for (int group = groups.begin; group < groups.end; ++group) filter_group<P>(rows, group, queries, panel, begun, result);
}

template <typename Result>
SPADE_TARGET_AVX512VNNI void filter_all(const RowPack& rows, GroupRange groups, const QueryPack& queries, const Result result) {
    for (int panel = 0; panel < queries.panels; panel += 2)
        if (panel + 1 < queries.panels)
            filter_panels<2>(rows, groups, queries, panel, result);
        else
            filter_panels<1>(rows, groups, queries, panel, result);
}

}  // namespace

void filter_avx512vnni(const RowPack& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    if (rows.packing->has_digits())
        filter_all(rows, groups, queries, Minima<ByDigits<true>>{minima, groups.begin});
    else
        filter_all(rows, groups, queries, Minima<ByRow>{minima, groups.begin});
}

void screen_avx512vnni(const RowPack& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                       std::uint16_t* within) {
    if (rows.packing->has_digits())
        filter_all(rows, groups, queries, Within<ByDigits<true>>(rows, groups, thresholds, within));
    else
        filter_all(rows, groups, queries, Within<ByRow>(rows, groups, thresholds, within));
}

}  // namespace spade
