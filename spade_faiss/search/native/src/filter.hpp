// The filter: estimates of all distances between a block's rows and the queries, reduced to one minimum for each group of rows.
#pragma once

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
// All filters round alike: the same packs give the same bits.
using Filter = void (*)(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);

// Plain C++, which all other filters must equal.
void filter_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
// One filter for each SIMD level. The processor must run it: see `SimdLevel::why_not`.
void filter_avx2(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_avxvnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);
void filter_amx(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima);

// One query, whose codes stand in their order; there are as many as a row has.
struct QueryCodes {
    const std::int8_t* codes;
    std::int32_t initial_dot;
    float step;
};

// The estimates of all rows of some groups for one query, out[row - groups.begin * kGroup]: what a filter takes the least of,
// to the bit. Codes of rows fill a byte.
using EstimateRows = void (*)(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);

void estimate_rows_avx2(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);
void estimate_rows_avx512vnni(const RowCodes& rows, GroupRange groups, const QueryCodes& query, float* out);

}  // namespace spade
