// The filter: estimates of all distances between a block's rows and the queries, reduced to one minimum for each group of rows.
#pragma once

#include <cstdint>

#include "packs.hpp"

namespace spade {

// The groups of rows from `begin` up to, but not including, `end`.
struct GroupRange {
    int begin, end;
};

// A filter writes to minima[group - groups.begin][panel][query], for each query and each group in `groups`, the least over the
// group's rows of
//
//     |x|^2 / 2 - q'.x' = half_sq_norm - step_x * step_q * (codes_q . codes_x)
//
// or, where packs have digits, which are among the codes then, what bounds it from below,
//
//     least half_sq_norm of the group - step of the group * step_q * largest of the group's (codes_q . codes_x)
//
// All filters round alike: the same packs give the same bits.
using Filter = void (*)(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);

// What the minima are compared with: thresholds of the queries, to which the filter's error is added; see bounds.hpp.
struct Thresholds {
    const float* of_query;  // (padded queries)
    float margin;
};

// A screen writes to within[group - groups.begin][panel], as bits, which queries of the panel cannot
// rule the group out: what `Bounds::queries_within` finds of the filter's minima.
using Screen = void (*)(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                        std::uint16_t* within);

// Plain C++, which all others must equal.
void filter_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void screen_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                      std::uint16_t* within);
// A filter and a screen for each SIMD level. The processor must run it: see `SimdLevel::why_not`.
void filter_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_avxvnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void screen_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                 std::uint16_t* within);
void screen_avxvnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                    std::uint16_t* within);
void screen_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                       std::uint16_t* within);
void screen_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                std::uint16_t* within);

// One query, whose codes stand in their order; there are as many as a row has.
struct QueryCodes {
    const std::int8_t* codes;
    std::int32_t initial_dot;
    float step;
};

// The estimates of all rows of some groups for one query, out[row - groups.begin * kGroup]: what a filter takes the least of,
// to the bit. Codes of rows fill a byte, there are no digits, and their number is padded to a multiple of 16.
using EstimateRows = void (*)(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);

void estimate_rows_avx2(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);
void estimate_rows_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);

}  // namespace spade
