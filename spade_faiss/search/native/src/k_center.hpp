// Greedy k-center: vectors that cover all others, picked one by one, each the one that is furthest from those before it.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace spade {

struct KCenter {
    std::vector<std::int64_t> picks;
    float sq_radius;  // the squared distance that is left between a vector and the nearest pick, at most
};

// Picks `count` of n vectors, beginning with `first`. Of vectors that are equally far, the smallest is picked; where all that
// is left equals a pick, there are fewer picks. They are those of the plain algorithm, which compares each pick with all
// vectors.
//
// `shadows` are (n, 16) float32 on the vectors' orthogonal projections to a space of so many dimensions; `slack` is how far two
// shadows may be further apart than their vectors, because they are rounded. Most distances are not computed because shadows
// say that a vector is not nearer. The picks do not depend on the number of threads.
constexpr int kShadow = 16;
KCenter k_center(const Vectors& xb, int count, int first, const float* shadows, float slack, int threads);

}  // namespace spade
