// The nearest rows of a block: the filter rules rows out, and direct distances decide among those that are left.
#pragma once

#include <cstdint>

#include "simd_levels.hpp"

namespace spade {

struct SearchStats {
    std::int64_t evaluated = 0;  // how many direct distances were computed, over all queries
    std::int64_t dense = 0;      // for how many queries that was done for a quarter of the block's rows or more
};

// Finds, for each query, the k nearest rows among those at a squared distance of at most `bound`.
//
//   queries, rows: packs of `xq` and `xb`, made by one packing for this SIMD level.
//   xq, xb: the vectors themselves; xq is float32, aligned.
//   bound: (queries), squared distances; -infinity: nothing is wanted for that query.
//   k: 1 to the number of rows.
//   margin: which share of the filter's error bound is added; 1 is exact. Tests pass less to show that less is not enough.
//   sq_dist, row: (queries, k), written; ascending by squared distance, then by row. Where fewer are found, infinity and -1.
//
// A squared distance is a sum of squared float32 differences in an order that d alone decides, so that the result depends
// neither on the SIMD level nor on the packing, the bound, or the other queries.
SearchStats search(const SimdLevel& level, const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb,
                   const float* bound, int k, float margin, float* sq_dist, std::int64_t* row);

// Filters all rows of a block, chunk by chunk. Returns the minima (groups, panels, kPanel), in memory that belongs to this
// thread and is overwritten by its next call.
const float* filter_block(const SimdLevel& level, const QueryPack& queries, const RowPack& rows);

}  // namespace spade
