// Units: ways of multiplying bytes that processors have, one filter each.
#pragma once

#include <string>
#include <vector>

#include "packs.hpp"

namespace spade {

// Groups of rows.
struct Range {
    int begin, end;
};

// For each query and each group of `groups`, the least over the group's rows of
//
//     |x|^2 / 2 - q'.x' = half - step_x * step_q * (codes_q . codes_x)
//
// to minima[group][panel][query]. All filters round alike: the same packs give the same bits.
using Filter = void (*)(const RowPack& rows, Range groups, const QueryPack& queries, float* minima);

void filter_reference(const RowPack&, Range, const QueryPack&, float*);  // plain C++: what the others must equal
void filter_avx2(const RowPack&, Range, const QueryPack&, float*);
void filter_avxvnni(const RowPack&, Range, const QueryPack&, float*);
void filter_avx512vnni(const RowPack&, Range, const QueryPack&, float*);
void filter_amx(const RowPack&, Range, const QueryPack&, float*);

struct Unit {
    const char* name;
    Format format;
    Filter filter;
    int chunk_bytes;         // of rows that stay in the nearest cache that holds them while the queries pass by
    std::string why_not;     // why this processor or system does not run it; empty if it does
};

// The fastest first; the reference last, which is there to compare with. The processor is looked at once.
const std::vector<Unit>& units();

// The unit of a name, or nullptr.
const Unit* find_unit(const std::string& name);

}  // namespace spade
