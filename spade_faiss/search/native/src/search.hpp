// The nearest rows of a block: the filter names candidates, distances of the vectors themselves decide.
#pragma once

#include <cstdint>

#include "units.hpp"

namespace spade {

struct Effort {
    std::int64_t evaluated = 0;  // rows whose distance was evaluated
    std::int64_t dense = 0;      // queries for which a quarter of the block's rows or more were
};

// For each query: the k nearest rows among those at most as far as `bound`.
//
//   xq, xb: the vectors as they are, of which `queries` and `rows` were made by one packing, of this unit; xq is float32.
//   bound: (queries), a squared distance beyond which nothing is asked for; -infinity: nothing at all.
//   margin: 1. Tests lower it to see that less does not do.
//   sq_dist, location: (queries, k); ascending by squared distance, then by row; infinite and -1 where there is no more.
//
// A distance is the sum of squares of float32 differences in an order that d alone decides, so that what is found depends
// neither on the unit nor on the packing nor on the bound nor on the other queries.
Effort search(const Unit& unit, const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb,
              const float* bound, int k, float margin, float* sq_dist, std::int64_t* location);

// What the unit's filter says of all rows, chunk by chunk: (groups, panels, kPanel), in memory of this thread until the next call.
const float* filter_all(const Unit& unit, const QueryPack& queries, const RowPack& rows);

// The squared distance of two vectors in that order; `a` is float32.
float direct_sq_dist(const float* a, const void* b, Type type, int d);

}  // namespace spade
